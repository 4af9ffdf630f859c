"""The ensemble of two models: both run, and their predictions are averaged; what a merge of equal data could hope for.

Two means are taken. That of the logits multiplies the probabilities (a geometric mean, normalised), that of the probabilities
adds them. Each model runs by itself, under its own configuration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.cost import Cost, EvaluationOptions, compute_device, planned, rounds_of
from hf_moe_lmc.path.endpoints import Endpoints, Part, conversion, groups
from hf_moe_lmc.path.evaluation import predictions, stages
from hf_moe_lmc.path.skeleton import Skeleton
from hf_moe_lmc.path.sweep import Lane, Sweep
from hf_moe_lmc.perplexity.references import KINDS
from hf_moe_lmc.perplexity.scores import Scores, token_scores
from hf_moe_lmc.perplexity.windows import Windows, batches_of
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.runtime.progress import bar
from hf_moe_lmc.runtime.threads import products_of, suited
from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import ModelStream, whole
from hf_moe_lmc.writing.workspace import Workspace

AT_ONCE = 1 << 24  # logits of one model that are widened to float32 at a time
ROUND = 8  # batches between two exchanges of processes where all weights are in place


class Ensemble:
    """Evaluates two models together on one text.

    Args:
        a, b: each by itself, as its files have it; their vocabularies may be of different sizes.
        windows: what is evaluated on; all their ids are in both vocabularies.
        options: `masked` has no effect, `common` takes its place.
        common: ids that both models have, bool [rows]; None: their vocabularies are alike.

    Raises:
        ForeignError: transformers cannot build a model.
        CheckpointError: transformers finds no tensors for some parameters.
    """

    def __init__(
        self, a: MoEModel, b: MoEModel, windows: Windows, options: EvaluationOptions, common: Tensor | None = None
    ) -> None:
        self.windows, self.options, self.common = windows, options, common
        device = compute_device(options.device)
        self._members = tuple(_Member.of(model, options, device) for model in (a, b))

    def on(self, windows: Windows, batch_size: int) -> Ensemble:
        """The same on another text; both share their models without weights, so use one at a time."""
        other = copy.copy(self)
        other.windows, other.options = windows, replace(self.options, batch_size=batch_size)
        other.__dict__.pop("_batches", None)
        return other

    @cached_property
    def _batches(self) -> list[list[int]]:
        return batches_of(self.windows.rows, self.options.batch_size)

    @property
    def nbytes(self) -> int:
        """Bytes of both checkpoints: what one pass reads."""
        return sum(member.model.checkpoint.stored.nbytes for member in self._members)

    def cost(self) -> Cost:
        """What it takes, with the memory that is free now."""
        first = self._members[0]
        return planned(
            first.skeleton.device,
            sum(member.skeleton.nbytes for member in self._members),
            len(self._members),
            self.windows,
            self.options,
            stored=self.nbytes,
            hidden=int(first.model.text_config.hidden_size),
            layers=len(first.layers),
        )

    def score(self, weights: Sequence[float], progress: Workspace | None = None) -> dict[float, dict[str, Scores]]:
        """Scores of each window, by the weight t of B, then by the names of KINDS: point 0 of the Scores.

        With the weight t, logits are (1 - t) logits_A + t logits_B, over the ids that both models have, and probabilities
        are (1 - t) p_A + t p_B, each over its own vocabulary. Whatever the number of weights, both models run once.

        Memory: all weights of both models, or the decoder layer of one at a time and the weights outside the layers; the
        hidden states of all windows on their way; the logits of one batch from both models, [batch, length, vocabulary]
        each; and about eight float32 arrays of AT_ONCE numbers. Logits of different batches are never held together.

        Args:
            weights: of B, from 0 to 1.
            progress: takes the scores of each batch, and has those of an earlier call, in process 0.
        """
        plan, processes = self.cost(), process_group()
        kept = progress.results("ensemble", self._facts(weights)) if progress else None
        labels = [(t, kind) for t in weights for kind in KINDS]
        found: dict[int, Tensor] = processes.from_main(_restored(kept))
        left = [number for number in range(len(self._batches)) if number not in found]
        chunks = rounds_of(processes.share(left), plan, ROUND)
        ran = [stages(member.ends, plan.mode) for member in self._members]
        total = 2 * len(ran[0]) * sum(map(len, chunks))
        tokens = max((sum(len(self.windows.rows[i]) for i in batch) for batch in self._batches), default=0)
        products = products_of(self._members[0].skeleton.module, tokens, self._members[0].model.top_k)
        with (
            torch.inference_mode(),
            suited(products),
            bar(total=total, desc="evaluating the ensemble", unit="step", quiet=not processes.is_main) as shown,
        ):
            for number in range(max(processes.exchange(len(chunks)))):
                chunk = chunks[number] if number < len(chunks) else []
                mine = self._run(plan.mode, ran, chunk, weights, shown.update) if chunk else {}
                for theirs in processes.exchange(mine):
                    found |= theirs
                    for batch, values in theirs.items() if kept else ():
                        assert kept is not None
                        kept.write(str(batch), {"scores": values})
        for member, parts in zip(self._members, ran, strict=True):
            member.clear([part for stage in parts for part in stage])
        return self._by_weight(labels, found)

    def _by_weight(self, labels: Sequence[tuple[float, str]], found: Mapping[int, Tensor]) -> dict[float, dict[str, Scores]]:
        scores = torch.empty(len(labels), len(self.windows.rows), 2, dtype=torch.float64)
        for batch, values in found.items():
            scores[:, self._batches[batch]] = values
        by_weight: dict[float, dict[str, Scores]] = {}
        for number, (t, kind) in enumerate(labels):
            by_weight.setdefault(t, {})[kind] = Scores.of(scores[number : number + 1])
        return by_weight

    def _run(
        self,
        mode: str,
        ran: Sequence[Sequence[tuple[Part, ...]]],
        chunk: Sequence[int],
        weights: Sequence[float],
        progress: Callable[[int], Any],
    ) -> dict[int, Tensor]:
        """Takes some batches through both models: float64 [label, window of the batch, 2] by the number of the batch."""
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            sweeps = [
                stack.enter_context(Sweep(member.layers if mode == "layers" else [], partial(self._forward, member)))
                for member in self._members
            ]
            lanes = [sweep.start([0], chunk) for sweep in sweeps]
            for number in range(len(ran[0]) - 1):
                for member, parts, sweep, own in zip(self._members, ran, sweeps, lanes, strict=True):
                    member.place(parts[number])
                    for lane in own:
                        sweep.advance(lane, number)
                        progress(1)
                    member.clear(parts[number])
            for member, parts in zip(self._members, ran, strict=True):
                member.place(parts[-1])
            for pair in zip(*lanes, strict=True):
                for sweep, lane in zip(sweeps, pair, strict=True):
                    sweep.advance(lane, None)
                    progress(1)
                found[pair[0].batch] = self._combined(pair, weights)
            if mode == "layers":
                for member, parts in zip(self._members, ran, strict=True):
                    member.clear(parts[-1])
        return found

    def _ids(self, batch: int) -> Tensor:
        return torch.stack([self.windows.rows[i] for i in self._batches[batch]])

    def _forward(self, member: _Member, batch: int) -> Tensor:
        return predictions(member.skeleton, self._ids(batch))

    def _combined(self, pair: Sequence[Lane], weights: Sequence[float]) -> Tensor:
        """Scores of one batch, whose lanes have come to their end; lets go of their logits."""
        batch = pair[0].batch
        of_a, of_b = (lane.result for lane in pair)
        for lane in pair:
            lane.result = None
        per_token = combined(of_a, of_b, self._ids(batch)[:, 1:], weights, self.common)  # [label, 2, window, token]
        rows = self._batches[batch]
        return torch.stack([torch.stack([self.windows.sums(rows, one) for one in label], dim=1) for label in per_token]).cpu()

    def _facts(self, weights: Sequence[float]) -> dict[str, Any]:
        """All that scores depend on."""
        return {
            "models": [member.model.checkpoint.resume_key() for member in self._members],
            "layouts": [member.model.checkpoint.layout_digest() for member in self._members],
            "weights": list(weights),
            "windows": self.windows.describe(),
            "context_only": list(self.windows.context_only),
            "batch_size": self.options.batch_size,
            "dtype": str(self.options.dtype),
            "device": self._members[0].skeleton.device.type,
            "common": None if self.common is None else self.common.int().tolist(),
        }


def combined(a: Tensor, b: Tensor, targets: Tensor, weights: Sequence[float], common: Tensor | None = None) -> Tensor:
    """Loss and first choice of both ensembles for each token: float64 [weight and kind, 2, batch, token], nats.

    Args:
        a, b: logits, [batch, token, vocabulary of that model].
        targets: int64 [batch, token].
        weights: of B; each gives the means of KINDS, in their order.
        common: ids that both models have, bool [rows]; None: all.

    Example:
        >>> one = torch.tensor([[[0.0, 2.0]]])  # one token, two ids
        >>> found = combined(one, -one, torch.tensor([[1]]), [0.5])
        >>> found.exp().flatten(1)[:, 0]  # p = 1/2 either way, by symmetry
        tensor([2.0000, 2.0000], dtype=torch.float64)
        >>> combined(one, one, torch.tensor([[1]]), [0.3])[:, 1].flatten()  # id 1 is the first choice
        tensor([1., 1.], dtype=torch.float64)
    """
    shape, device = targets.shape, a.device
    flat_a, flat_b, wanted = a.flatten(0, 1), b.flatten(0, 1), targets.flatten().to(device)
    found = torch.empty(len(weights) * len(KINDS), 2, len(wanted), dtype=torch.float64, device=device)
    step = max(1, AT_ONCE // max(a.shape[-1], b.shape[-1]))
    for first in range(0, len(wanted), step):
        here = slice(first, first + step)
        both = flat_a[here].float(), flat_b[here].to(device).float()
        means = (mean for t in weights for mean in (_mean_of_logits(*both, t, common), _mean_of_probabilities(*both, t)))
        for number, mean in enumerate(means):
            scores = token_scores(mean[None], wanted[None, here])
            found[number, 0, here], found[number, 1, here] = scores.losses[0], scores.right[0]
    return found.view(*found.shape[:2], *shape)


def _mean_of_logits(a: Tensor, b: Tensor, t: float, common: Tensor | None) -> Tensor:
    """[token, id]; over the ids that both models have."""
    width = min(a.shape[1], b.shape[1])
    a, b = a[:, :width], b[:, :width]
    mean = (a, b)[int(t)] if t in (0, 1) else torch.lerp(a, b, t)
    if common is None:
        return mean
    return mean.masked_fill(~common[:width].to(mean.device), -math.inf)


def _mean_of_probabilities(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Logarithms of the mean probabilities, [token, id]; an id that one model lacks has no probability there."""
    width = max(a.shape[1], b.shape[1])
    logs = [nn.functional.pad(one.log_softmax(dim=1), (0, width - one.shape[1]), value=-math.inf) for one in (a, b)]
    if t in (0, 1):
        return logs[int(t)]
    return torch.logaddexp(logs[0] + math.log1p(-t), logs[1] + math.log(t))


def _restored(kept: ResultFolder | None) -> dict[int, Tensor]:
    """What an earlier call has left, by the number of the batch."""
    found = {int(name): kept.read(name)["scores"] for name in kept.names()} if kept else {}
    if found:
        note(f"continuing: {len(found)} batches of the ensemble were evaluated by an earlier call")
    return found


@dataclass(frozen=True)
class _Member:
    """One of two models: its weights are put in place as its files have them."""

    model: MoEModel
    skeleton: Skeleton
    ends: Endpoints

    @classmethod
    def of(cls, model: MoEModel, options: EvaluationOptions, device: torch.device) -> _Member:
        skeleton = Skeleton(options.model_class, model.config, dtype=options.dtype, device=device)
        found = conversion(skeleton, model)
        return cls(model, skeleton, Endpoints(model, model, {}, skeleton, (found, found)))

    @cached_property
    def layers(self) -> list[nn.Module]:
        return list(self.skeleton.module.get_submodule(self.ends.layers_path).children())

    def place(self, parts: Sequence[Part]) -> None:
        """Reads what does not stand in its place yet, one group of tensors at a time."""
        names = [name for part in parts for name in part.names if self.skeleton.value(name) is None]
        stream = ModelStream(self.model, dict(self.model.layers), Copied(self.model.checkpoint))
        wanted = set(names)
        for group in groups(self.ends.conversions[0], names):
            values = self.ends.conversions[0].convert(group, partial(whole, stream))
            self.skeleton.place({name: value for name, value in values.items() if name in wanted})

    def clear(self, parts: Sequence[Part]) -> None:
        self.skeleton.clear([name for part in parts for name in part.names])
