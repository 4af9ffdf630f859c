"""Repairs without text: over families and layouts, what they make of each hidden unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.experts import MATRICES
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import split_role
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.repair.data_free import REPAIRS, UngatedError, check_gated, gated_roles, starts
from hf_moe_lmc.writing.streams import InterpolatedLayer, interpolated, whole
from tests import tiny

Pair = tuple[MoEModel, MoEModel]
Opened = Callable[[str, str], Pair]


@pytest.fixture
def pair(saved: Callable[..., Path]) -> Opened:
    def get(family: str, layout: str) -> Pair:
        a, b = (read_model(Checkpoint.open(saved(family, layout, seed))) for seed in (0, 1))
        return a, b

    return get


def experts(layer: MoELayer) -> list[tuple[str, int | None]]:
    """(what stands before its roles, number) of each expert with a gate."""
    routed = [("", number) for number in range(layer.experts)]
    return [*routed, ("shared_", None)] if layer.shared.unit_count else [*routed]


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
@pytest.mark.parametrize("name", REPAIRS)
def test_at_both_ends_a_repair_gives_the_parent(pair: Opened, family: str, layout: str, name: str) -> None:
    a, b = pair(family, layout)
    elements = b.random(torch.Generator().manual_seed(0)).layers
    for t in (0, 1):
        stream = interpolated(a, b, elements, t, merging=REPAIRS[name])
        straight = interpolated(a, b, elements, t)
        assert all(torch.equal(whole(stream, key), whole(straight, key)) for key in a.checkpoint.tensors)


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
@pytest.mark.parametrize("name", REPAIRS)
def test_nothing_but_units_leaves_the_line(pair: Opened, family: str, layout: str, name: str) -> None:
    a, b = pair(family, layout)
    elements = b.random(torch.Generator().manual_seed(0)).layers
    stream, straight = interpolated(a, b, elements, 0.3, merging=REPAIRS[name]), interpolated(a, b, elements, 0.3)
    units = {
        key for layer in a.layers.values() for key, claim in layer.claims.items() if set(claim.roles) <= {*gated_roles(layer)}
    }
    moved = {key for key in a.checkpoint.tensors if not torch.equal(whole(stream, key), whole(straight, key))}
    assert moved == units


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
@pytest.mark.parametrize("t", [0.3, 0.5])
def test_units_have_the_interpolated_norm(pair: Opened, family: str, layout: str, t: float) -> None:
    a, b = pair(family, layout)
    elements = b.random(torch.Generator().manual_seed(0)).layers
    acted, found = b.acted(elements), starts(a, b, elements, t)["norms"]
    for index, layer in a.layers.items():
        straight = InterpolatedLayer(index, layer, acted[index], t)
        for before, number in experts(layer):
            for role in MATRICES:
                norms = [norm_of(source, before + role, number) for source in (layer, acted[index], found[index], straight)]
                torch.testing.assert_close(norms[2], (1 - t) * norms[0] + t * norms[1])
                assert not torch.allclose(norms[3], norms[2])  # an average alone is shorter
                values = [source.stored(before + role, number).float() for source in (found[index], straight)]
                assert torch.cosine_similarity(*values, dim=1).min() > 1 - 1e-5


def norm_of(source: LayerSource, role: str, expert: int | None) -> Tensor:
    return source.stored(role, expert).float().norm(dim=1)


@pytest.mark.parametrize(("family", "layout"), tiny.TABLE)
@pytest.mark.parametrize("t", [0.3, 0.5, 0.9])
def test_units_cross_over_whole(pair: Opened, family: str, layout: str, t: float) -> None:
    a, b = pair(family, layout)
    elements = b.random(torch.Generator().manual_seed(0)).layers
    acted, found = b.acted(elements), starts(a, b, elements, t)["crossover"]
    for index, layer in a.layers.items():
        for before, number in experts(layer):
            of_a, of_b, merged = (
                torch.cat([source.stored(before + role, number).float() for role in MATRICES], dim=1)
                for source in (layer, acted[index], found[index])
            )
            from_a, from_b = (merged == of_a).all(dim=1), (merged == of_b).all(dim=1)
            assert bool((from_a ^ from_b).all())
            assert int(from_a.sum()) == round((1 - t) * len(merged))
            ratio = strength(layer, before, number) / strength(acted[index], before, number)
            if 0 < int(from_a.sum()) < len(merged):
                assert ratio[from_a].min() >= ratio[from_b].max()


def strength(source: LayerSource, before: str, expert: int | None) -> Tensor:
    gate, up, down = (norm_of(source, before + role, expert) for role in MATRICES)
    return gate * up * down


def test_units_of_length_zero_do_not_become_nan(pair: Opened) -> None:
    a, b = pair("mixtral", "per-expert")

    class Dead:
        def __init__(self, source: LayerSource, units: slice) -> None:
            self.source, self.units = source, units

        def stored(self, role: str, expert: int | None = None) -> Tensor:
            values = self.source.stored(role, expert).clone()
            if split_role(role)[1] in MATRICES:
                values[self.units] = 0
            return values

    layer = a.layers[0]
    for name, repair in REPAIRS.items():
        made = repair.between(layer)(0, Dead(layer, slice(0, 2)), Dead(b.layers[0], slice(1, 3)), 0.5)
        values = made.stored("up", 0)
        assert bool(values.isfinite().all()), name
        assert not bool(values[1].any())


def test_experts_without_a_gate_are_refused_by_name(real: Callable[[str, int], Path]) -> None:
    model = read_model(Checkpoint.open(real("nemotron-3-nano", 0)))
    with pytest.raises(UngatedError, match="--repair norms acts on gated experts"):
        check_gated(model, "norms")
