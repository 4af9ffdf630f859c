"""Repairs that are fitted on text: all candidates go through the model together, one decoder layer after the other.

A layer of A and of B' is read once for all candidates. Each candidate runs on calibration text, stops before the MoE block of
a layer, has its block fitted on what arrives there, and goes on with the new weights: all layers below are repaired already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.path.cost import IN_FLIGHT, SHARE, EvaluationOptions, compute_device
from hf_moe_lmc.path.endpoints import Endpoints, conversions
from hf_moe_lmc.path.skeleton import Skeleton
from hf_moe_lmc.repair.fitted import Fitted
from hf_moe_lmc.repair.fitting_pass import Pass
from hf_moe_lmc.repair.methods import Method
from hf_moe_lmc.repair.run_models import PATH, Calibration, RunModels
from hf_moe_lmc.runtime.memory import available_memory
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.writing.spans import Interpolated
from hf_moe_lmc.writing.streams import ModelStream, layers_at


@dataclass(frozen=True)
class Outcome:
    """What candidates gave.

    Attributes:
        losses: of each window that they are compared on, summed over its tokens, float64 [candidate, window], nats.
        fits: by candidate, an entry for each layer that was fitted.
    """

    losses: Tensor
    fits: list[list[dict[str, Any]]]


class Calibrated:
    """Runs candidates for the merge of two models.

    Memory: a decoder layer of A, of B' and of a candidate; what a fit needs, see `ridge`; the activations of all candidates
    of a pass, by which `activation_memory` decides how many go together.

    Args:
        symmetry: takes B to B'.
        t: of the merge.
        starts: the MoE layers that a repair without data gives at `t`, by its name.

    Raises:
        ForeignError, CheckpointError: as `Evaluator`.
    """

    def __init__(
        self,
        a: MoEModel,
        b: MoEModel,
        symmetry: ModelSymmetry,
        t: float,
        calibration: Calibration,
        options: EvaluationOptions,
        starts: Mapping[str, Mapping[int, LayerSource]],
    ) -> None:
        self.a, self.b, self.t, self.calibration, self.starts = a, b, t, calibration, starts
        skeleton = Skeleton(options.model_class, a.config, dtype=options.dtype, device=compute_device(options.device))
        ends = Endpoints(a, b, {PATH: symmetry}, skeleton, conversions(skeleton, a, b))
        outside = Interpolated(a.checkpoint, b.checkpoint, (t,))
        streams = {name: ModelStream(a, dict(layers), outside) for name, layers in starts.items()}
        self._models = RunModels(a, ends, t, streams, calibration, options)

    def layers(self, start: str) -> dict[int, LayerSource]:
        """The MoE layers that a repair starts from."""
        if start in self.starts:
            return dict(self.starts[start])
        return layers_at(self.a, self.b.acted(self._models.ends.symmetries[PATH].layers), self.t)

    def facts(self) -> dict[str, Any]:
        """All that fitted weights depend on, but for the candidates."""
        sides = {"a": self.a.checkpoint.resume_key(), "b": self.b.checkpoint.resume_key()}
        return {
            **sides,
            "symmetry": digest(self._models.ends.symmetries[PATH]),
            "t": self.t,
            "windows": self.calibration.windows.describe(),
            "domains": [sorted(names) for names in self.calibration.domains],
            "dtype": str(self._models.options.dtype),
            "batch_size": self._models.options.batch_size,
            "device": self._models.skeleton.device.type,
            **{f"layout_{side}": found for side, found in self._models.ends.layouts().items()},
        }

    def check_sites(self) -> None:
        """Raises UnsuitedError where the experts of this family cannot be fitted, as far as their modules tell."""
        assert self._models.sites

    def run(
        self, methods: Sequence[Method], fit: Sequence[int], compare: Sequence[int], kept: Mapping[Method, Fitted] | None = None
    ) -> Outcome:
        """Fits the candidates on some windows, and gives their losses on others.

        Args:
            fit, compare: numbers of windows.
            kept: takes the fitted weights, layer by layer, and has those that an earlier call has left.

        Raises:
            UnsuitedError: the experts of this family cannot be fitted.
            InputError: more tokens than memory allows.
        """
        losses, fits = torch.empty(len(methods), len(compare), dtype=torch.float64), []
        size = self.together(len(fit) + len(compare))
        for first in range(0, len(methods), size):
            group = methods[first : first + size]
            for number, runner in enumerate(Pass(self._models, group, fit, compare, kept or {}).run()):
                for lane in runner.compared:
                    for place, value in lane.result:
                        losses[first + number, place] = value
                fits.append(runner.facts)
        return Outcome(losses, fits)

    def memory(self, methods: Sequence[Method], windows: int) -> int:
        """Bytes, about, but for the equations of a ridge fit: a layer of A, of B' and of a candidate, and activations.

        With RegMean also a merged layer, and what it knows of the inputs of that layer's maps.

        Args:
            windows: that candidates are fitted and compared on.
        """
        ends, skeleton = self._models.ends, self._models.skeleton
        parts, beside = ends.parts()
        averaged = any(method.fit == "regmean" for method in methods)
        largest, outside = max(skeleton.nbytes_of(part.names) for part in parts), skeleton.nbytes_of(beside.names)
        widths = [
            [skeleton.state[name].shape[-1] for name in part.names if skeleton.state[name].ndim == 2]
            for part in (parts if averaged else ())
        ]
        grams = max((sum(2 * 4 * width**2 for width in of_layer) for of_layer in widths), default=0)
        going = min(1 + len(methods), self.together(windows)) + (2 if averaged else 0)
        return (4 if averaged else 3) * largest + 3 * outside + grams + going * self._activations(windows)

    def _activations(self, windows: int) -> int:
        """Bytes of one candidate."""
        tokens = windows * self.calibration.windows.context
        return tokens * IN_FLIGHT * int(self.a.text_config.hidden_size) * self._models.options.dtype.itemsize

    def together(self, windows: int) -> int:
        """How many candidates go through the model at once."""
        each = self._activations(windows)
        budget = self._models.options.activation_memory or int(SHARE * available_memory())
        return max(1, budget // each)
