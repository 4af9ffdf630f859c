"""The paper's claims about symmetry as measurements (Sec. 3 and 4): what leaves the loss where it was, and what does not.

Each claim is a change of the weights of every MoE layer of a trained model; each control is the same change with a part
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.moe.action import ActedLayer
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry

from .data import Images, Text
from .models import MoE, PaperModel
from .paths import Evaluator, Pair, State, aligned, curve, tensors

SHIFT = 1.0  # standard deviation of a translation of router rows, in units of the deviation of the router's weights
FACTOR = 3.0  # of the scores of a gate
Source = Callable[[MoELayer, torch.Generator], LayerSource]


@dataclass(frozen=True)
class InDouble:
    """A block in float64, so that rounding does not hide what a change does, or turn a choice between two experts."""

    source: LayerSource

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        return self.source.stored(role, expert).double()


@dataclass(frozen=True)
class Changed:
    """A block, some roles of which are changed before they are read.

    Attributes:
        source: what is read otherwise; changes: by role, what becomes of its tensor.
    """

    source: LayerSource
    changes: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        values = self.source.stored(role, expert)
        return self.changes[role](values) if role in self.changes else values


def translated(layer: MoELayer, generator: torch.Generator, rows: slice = slice(None)) -> LayerSource:
    """Router rows moved by one common vector, their biases by one number (Sec. 3); with `rows`, those alone."""
    deviation = float(layer.stored("router").float().std()) * SHIFT
    vector = torch.randn(layer.stored("router").shape[1], generator=generator) * deviation
    number = float(torch.randn((), generator=generator))

    def moved(values: Tensor, by: Tensor | float) -> Tensor:
        out = values.clone()
        out[rows] += by
        return out

    return Changed(layer, {"router": lambda values: moved(values, vector), "router_bias": lambda values: moved(values, number)})


def permuted(layer: MoELayer, generator: torch.Generator, *, rows: bool = True) -> LayerSource:
    """Experts in another order, with or without the rows of the router that are theirs."""
    order = torch.arange(layer.banks[FIRST].experts).roll(1)
    identity = layer.identity()
    element = identity.with_bank(FIRST, replace(identity.banks[FIRST], expert_order=order))
    acted = _acted(layer, element)
    back = order.argsort()
    left = {role: (lambda values: values[back]) for role in ("router", "router_bias", "correction_bias")}
    return acted if rows else Changed(acted, left)


def units_permuted(layer: MoELayer, generator: torch.Generator, *, whole: bool = True) -> LayerSource:
    """Hidden units of every expert in another order; without `whole`, their down columns stay where they were."""
    identity = layer.identity()
    experts, units = identity.banks[FIRST].unit_order.shape
    orders = torch.rand(experts, units, generator=generator).argsort(dim=1)
    element = identity.with_bank(FIRST, BankSymmetry(torch.arange(experts), orders, torch.ones(experts, units)))
    if layer.shared.unit_count:
        shared = torch.rand(layer.shared.unit_count, generator=generator).argsort()
        element = replace(element, shared=UnitSymmetry(shared, torch.ones(len(shared))))
    acted = _acted(layer, element)
    return acted if whole else _Split(acted, InDouble(layer))


@dataclass(frozen=True)
class _Split:
    """Down matrices of routed experts from one source, everything else from another."""

    source: LayerSource
    downs: LayerSource

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        return (self.downs if role == "down" else self.source).stored(role, expert)


def scaled_units(layer: MoELayer, generator: torch.Generator) -> LayerSource:
    """A random element of the whole group that the package uses: orders, signs and scales of hidden units."""
    return _acted(layer, layer.random(generator, scale=2.0))


def scores_scaled(layer: MoELayer, generator: torch.Generator, factor: float = FACTOR) -> LayerSource:
    """All scores of the gate times one factor: a symmetry where a token goes to one expert, if the factor is positive."""
    times = {role: (lambda values: values * factor) for role in ("router", "router_bias")}
    return Changed(InDouble(layer), times)


def _acted(layer: MoELayer, element: Any) -> LayerSource:
    return ActedLayer(InDouble(layer), element, layer.units)


CLAIMS: dict[str, Source] = {
    "experts permuted with their router rows": permuted,
    "hidden units permuted": units_permuted,
    "random element of the package's whole group": scaled_units,
}
CONTROLS: dict[str, Source] = {
    "one router row translated": lambda layer, generator: translated(layer, generator, slice(0, 1)),
    "experts permuted without their router rows": lambda layer, generator: permuted(layer, generator, rows=False),
    "hidden units permuted, but for the down columns": lambda layer, generator: units_permuted(layer, generator, whole=False),
}
TRANSLATION = "all router rows translated"


def measure_claims(pair: Pair, data: Images | Text) -> dict[str, Any]:
    """The change of A's loss under each claim and each control, nats; and of the barrier under a translation (Prop. D.1).

    The module computes in float64 afterwards.
    """
    layers = pair.a.layers
    if not isinstance(pair.module, PaperModel):
        pair.module.set_experts_implementation("eager")  # the faster ones have no float64
    pair.module.double()
    softmax = all(layer.router == "softmax" for layer in layers.values())
    claims = {**({TRANSLATION: translated} if softmax else {}), **CLAIMS}
    controls = {**({} if softmax else {TRANSLATION: translated}), **CONTROLS}
    evaluate = Evaluator(pair.module, data, pair.device)
    plain = tensors(pair.a)
    loss = _loss(pair, evaluate, plain)

    def change(source: Source) -> float:
        return _loss(pair, evaluate, _with(pair, source)) - loss

    found: dict[str, Any] = {
        "loss": loss,
        "router": next(iter(layers.values())).router,
        "claims": {name: change(source) for name, source in claims.items()},
        "controls": {name: change(source) for name, source in controls.items()},
    }
    if blocks := [module for module in pair.module.modules() if isinstance(module, MoE)]:
        found["top_1"] = _top_1(pair, evaluate, plain, blocks)
    found["barrier"] = _translated_barrier(pair, data)
    return found


def _with(pair: Pair, source: Source, model: str = "a") -> dict[str, Tensor]:
    model_read = getattr(pair, model)
    generator = torch.Generator().manual_seed(0)
    return tensors(model_read, {index: source(layer, generator) for index, layer in model_read.layers.items()})


def _loss(pair: Pair, evaluate: Evaluator, state: State) -> float:
    pair.module.load_state_dict(dict(state))
    return evaluate()[0]


def _top_1(pair: Pair, evaluate: Evaluator, plain: State, blocks: list[MoE]) -> dict[str, float]:
    """The extra scale of a gate that takes one expert: the same weights with k = 1; k as it is, and a negative scale, fail."""
    own = [block.top_k for block in blocks]
    scaled = _with(pair, scores_scaled)
    negative = _with(pair, lambda layer, generator: scores_scaled(layer, generator, -FACTOR))
    found = {f"k = {own[0]}, scores times {FACTOR:g}": _loss(pair, evaluate, scaled) - _loss(pair, evaluate, plain)}
    for block in blocks:
        block.top_k = 1
    base = _loss(pair, evaluate, plain)
    found[f"k = 1, scores times {FACTOR:g}"] = _loss(pair, evaluate, scaled) - base
    found[f"k = 1, scores times {-FACTOR:g}"] = _loss(pair, evaluate, negative) - base
    for block, top_k in zip(blocks, own, strict=True):
        block.top_k = top_k
    return found


def _translated_barrier(pair: Pair, data: Images | Text) -> dict[str, float]:
    """The aligned path from A to B, and to B with its router rows translated: both barriers, and the largest difference."""
    elements = aligned(pair, WeightMatching())
    acted = pair.b.acted({**{index: layer.identity() for index, layer in pair.b.layers.items()}, **elements})
    generator = torch.Generator().manual_seed(0)
    shifts = {index: translated(layer, generator) for index, layer in pair.b.layers.items() if index in elements}
    moved = {index: Changed(acted[index], shift.changes) for index, shift in shifts.items() if isinstance(shift, Changed)}
    before, after = curve(pair, tensors(pair.b, acted), data), curve(pair, tensors(pair.b, moved), data)
    return {
        "aligned": before.summary()["loss_barrier"],
        "aligned_and_translated": after.summary()["loss_barrier"],
        "largest_difference_on_the_curve": max(abs(x - y) for x, y in zip(before.loss, after.loss, strict=True)),
    }
