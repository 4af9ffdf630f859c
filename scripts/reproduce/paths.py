"""The straight path between two models: loss and accuracy at its points, naive and aligned by the package.

theta_t = (1 - t) A + t B', B' = B in the coordinates of a symmetry. Both models' weights come from the package's streams, and
the points from its one interpolation function, as in its own `barrier`. That verb knows language models alone; this evaluator
also knows images and accuracy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.matching.blocks import match_layer
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.matching.units import UnitMatch, UnitRows, match_units
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.runtime.progress import quiet_transformers
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry
from hf_moe_lmc.writing.interpolation import interpolate_into
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import ModelStream, whole

from .data import Images, Text
from .models import PaperModel
from .settings import POINTS
from .training import check, on

GRID = [i / (POINTS - 1) for i in range(POINTS)]
METHODS = {  # the paper's two, with plain hidden units, and the package's default
    "gate": WeightMatching(order="gate", units="plain"),
    "expert": WeightMatching(order="expert", units="plain"),
    "default": WeightMatching(),
}
EVALUATED = 4096  # tokens or image patches in one forward pass, about
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """Two trained models as the package reads them, and the one module that stands for every point."""

    a: MoEModel
    b: MoEModel
    module: PreTrainedModel
    device: str

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """MoE layers in which the two differ."""
        return tuple(layer for layer in self.a.layers if any(f".layers.{layer}." in name for name in self.differing))

    @cached_property
    def differing(self) -> tuple[str, ...]:
        one, other = tensors(self.a), tensors(self.b)
        return tuple(name for name in one if not torch.equal(one[name], other[name]))


@contextmanager
def opened(folder_a: Path, folder_b: Path, device: str) -> Iterator[Pair]:
    """Two trained models of one setting."""
    with Checkpoint.open(folder_a) as of_a, Checkpoint.open(folder_b) as of_b:
        yield Pair(read_model(of_a), read_model(of_b), on(load(folder_a), device), device)


def load(folder: Path) -> PreTrainedModel:
    with quiet_transformers(), Checkpoint.open(folder) as checkpoint:
        vision = "vit" in checkpoint.config["model_type"]
        auto: Any = AutoModelForImageClassification if vision else AutoModelForCausalLM
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    loaded: PreTrainedModel = model.eval()
    return loaded


def tensors(model: MoEModel, changed: Mapping[int, LayerSource] | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, its MoE layers replaced by the sources in `changed`."""
    stream = ModelStream(model, {**model.layers, **(changed or {})}, Copied(model.checkpoint))
    return {name: whole(stream, name).clone() for name in model.checkpoint.tensors}


def moved(model: MoEModel, elements: Mapping[int, LayerSymmetry]) -> dict[str, Tensor]:
    """All tensors of a checkpoint in the coordinates of group elements; layers without one stay."""
    identity = {index: layer.identity() for index, layer in model.layers.items()}
    return tensors(model, model.acted({**identity, **elements}))


class Evaluator:
    """Loss, nats a token or image, and accuracy of a module whose weights change; what no change reaches is computed once.

    Args:
        first: the first layer whose weights change, of a PaperModel.
    """

    def __init__(self, module: PreTrainedModel, data: Images | Text, device: str, first: int = 0) -> None:
        self.module, self.first = module, first
        length = data.test.shape[1] if isinstance(data, Text) else 17
        size = max(1, EVALUATED // length)
        self.targets = [part.to(device) for part in (data.test if isinstance(data, Text) else data.test_labels).split(size)]
        self.is_text = isinstance(data, Text)
        with torch.no_grad():
            inputs = data.test if self.is_text else data.test.to(next(module.parameters()).dtype)
            self.inputs = [self._before(part.to(device)) for part in inputs.split(size)]

    def _before(self, inputs: Tensor) -> Tensor:
        if not isinstance(self.module, PaperModel):
            return inputs
        return self.module.through(self.module.embed(inputs), range(self.first))

    def logits(self) -> Iterator[Tensor]:
        for hidden in self.inputs:
            if isinstance(self.module, PaperModel):
                yield self.module.logits(self.module.through(hidden, range(self.first, len(self.module.model.layers))))
            else:
                yield self.module(input_ids=hidden, use_cache=False, output_router_logits=False).logits

    @torch.no_grad()
    def __call__(self) -> tuple[float, float]:
        """Mean loss and accuracy."""
        loss, right, count = 0.0, 0, 0
        for logits, targets in zip(self.logits(), self.targets, strict=True):
            if self.is_text:
                logits, targets = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
            loss += float(F.cross_entropy(logits, targets, reduction="none").sum(dtype=torch.float64))
            right += int((logits.argmax(dim=-1) == targets).sum())
            count += len(targets)
        return loss / count, right / count


@dataclass(frozen=True)
class Curve:
    """Loss and accuracy at GRID."""

    loss: list[float]
    accuracy: list[float]

    def summary(self) -> dict[str, Any]:
        """Barrier (Eq. 1) and area of loss and accuracy, with the curves."""
        loss, accuracy = barrier_and_area(self.loss, 1), barrier_and_area(self.accuracy, -1)
        return {
            "loss_barrier": loss[0], "loss_area": loss[1], "accuracy_barrier": accuracy[0], "accuracy_area": accuracy[1],
            "loss": [round(value, 5) for value in self.loss], "accuracy": [round(value, 5) for value in self.accuracy],
        }  # fmt: skip


def barrier_and_area(values: list[float], sign: int) -> tuple[float, float]:
    """The maximum over the grid of sign * (value - the straight line between the ends), and its trapezoid.

    Example:
        >>> barrier_and_area([1.0, 3.0, 2.0], 1)
        (1.5, 0.75)
    """
    steps = len(values) - 1
    over = [sign * (value - (values[0] + (values[-1] - values[0]) * i / steps)) for i, value in enumerate(values)]
    return max(over), (sum(over) - (over[0] + over[-1]) / 2) / steps


def curve(pair: Pair, b: State, data: Images | Text, evaluator: Evaluator | None = None, deadline: float = 1e18) -> Curve:
    """The path from A to the weights `b`."""
    dtype = next(pair.module.parameters()).dtype
    at_a, at_b = ({name: value.to(pair.device, dtype) for name, value in state.items()} for state in (tensors(pair.a), b))
    changed = [name for name, value in at_a.items() if not torch.equal(value, at_b[name])]
    pair.module.load_state_dict(at_a)
    places = pair.module.state_dict()  # the memory of the module itself
    evaluate = evaluator or Evaluator(pair.module, data, pair.device, first_of(changed))
    found = []
    for t in GRID:
        check(deadline)
        for name in changed:
            interpolate_into(places[name], at_a[name], at_b[name], t)
        found.append(evaluate())
    return Curve([loss for loss, _ in found], [accuracy for _, accuracy in found])


def first_of(names: list[str] | tuple[str, ...]) -> int:
    """The first layer that holds one of these; nothing outside of the layers may be among them."""
    found = [re.match(r"model\.layers\.(\d+)\.mlp\.", name) for name in names]
    return min((int(match[1]) if match else 0 for match in found), default=0)


def aligned(pair: Pair, method: WeightMatching) -> dict[int, LayerSymmetry]:
    """The package's matching of the layers in which the two differ."""
    return {
        layer: match_layer(pair.a.layers[layer], pair.b.layers[layer], method, groups=pair.a.groups).symmetry
        for layer in pair.trained
    }


def unit_matches(pair: Pair, layer: int) -> list[list[UnitMatch]]:
    """Stage 2 for each pair of experts, of A and of B, with plain hidden units."""
    banks = pair.a.layers[layer].banks[FIRST], pair.b.layers[layer].banks[FIRST]
    of_a, of_b = ([UnitRows.of(bank, i, torch.device("cpu")) for i in range(bank.experts)] for bank in banks)
    return [[match_units(x, y, "plain") for y in of_b] for x in of_a]


def in_order(order: tuple[int, ...], matches: list[list[UnitMatch]], like: LayerSymmetry) -> LayerSymmetry:
    """Stage 2 alone, in a given order of B's experts; the shared expert as in `like`."""
    chosen = [matches[i][j].symmetry for i, j in enumerate(order)]
    bank = BankSymmetry(
        torch.tensor(order), torch.stack([one.order for one in chosen]), torch.stack([one.scale for one in chosen])
    )
    return like.with_bank(FIRST, bank)


def without_blocks(pair: Pair, evaluate: Evaluator) -> float:
    """A's loss where the blocks in which the two differ add nothing: what is above A's own loss is their worth."""
    pair.module.load_state_dict({name: value.to(pair.device) for name, value in tensors(pair.a).items()})
    handles = [
        pair.module.get_submodule(f"model.layers.{layer}.mlp").register_forward_hook(lambda block, given, out: out * 0)
        for layer in pair.trained
    ]
    loss, _ = evaluate()
    for handle in handles:
        handle.remove()
    return loss


def measure_pair(pair: Pair, data: Images | Text, orders: bool, deadline: float) -> dict[str, Any]:
    """Every path between two models: naive, aligned by each method, and with the order skipped (Table 10).

    Args:
        orders: also along every order of the experts (Table 2).
    """
    trained = pair.trained
    elements = {name: aligned(pair, method) for name, method in METHODS.items()}
    matches = {layer: unit_matches(pair, layer) for layer in trained}
    skipped = {layer: in_order(tuple(range(len(matches[layer]))), matches[layer], elements["gate"][layer]) for layer in trained}
    evaluator = Evaluator(pair.module, data, pair.device, first_of(pair.differing))
    run: Callable[[Mapping[int, LayerSymmetry]], dict[str, Any]] = lambda found: curve(  # noqa: E731
        pair, moved(pair.b, found), data, evaluator, deadline
    ).summary()
    paths = {"naive": run({}), **{name: run(found) for name, found in elements.items()}, "order_skipped": run(skipped)}
    chosen = {name: {str(k): found[k].expert_order.tolist() for k in trained} for name, found in elements.items()}
    result: dict[str, Any] = {"paths": paths, "chosen": chosen, "without_blocks": without_blocks(pair, evaluator)}
    if orders:
        (layer,) = trained
        result["orders"] = {
            " ".join(map(str, order)): run({layer: in_order(order, matches[layer], elements["gate"][layer])})["loss_barrier"]
            for order in permutations(range(len(matches[layer])))
        }
    return result
