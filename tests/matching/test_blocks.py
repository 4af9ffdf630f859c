from __future__ import annotations

import re
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.matching.blocks import match_layer
from hf_moe_lmc.matching.expert_costs import expert_cost, gate_cost, margin, sketched_expert_cost
from hf_moe_lmc.matching.options import UnitMethod, WeightMatching
from hf_moe_lmc.matching.units import SCALE_GAIN, UnitRows, match_units, unit_cost
from hf_moe_lmc.moe.action import ActedLayer
from hf_moe_lmc.moe.experts import Bank, SharedExpert
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import LayerSymmetry
from tests import tiny

CPU = torch.device("cpu")


def rows(units: int, width: int, seed: int) -> UnitRows:
    generator = torch.Generator().manual_seed(seed)
    return UnitRows(*(torch.randn(units, width, generator=generator) for _ in range(3)))


def moved(rows: UnitRows, order: torch.Tensor, scale: torch.Tensor) -> UnitRows:
    return UnitRows(rows.gate[order], rows.up[order] * scale[:, None], rows.down[order] / scale[:, None])


def model(folder: Path) -> MoEModel:
    return read_model(Checkpoint.open(folder))


def literal_cost(a: UnitRows, b: UnitRows, k: int, l: int, units: UnitMethod) -> float:  # noqa: E741
    """The documented cost of one pair of units, term by term in float64."""
    g, u, d = a.gate[k].double(), a.up[k].double(), a.down[k].double()
    g2, u2, d2 = b.gate[l].double(), b.up[l].double(), b.down[l].double()
    gate = float((g - g2).square().sum())
    if units == "plain":
        return gate + float((u - u2).square().sum() + (d - d2).square().sum())
    norms = [float(x.norm()) for x in (u, d, u2, d2)]
    s = 1.0 if 0 in norms else ((norms[0] * norms[3]) / (norms[1] * norms[2])) ** 0.5
    return gate + min(float((u - x * u2).square().sum() + (d - d2 / x).square().sum()) for x in (s, -s))


@pytest.mark.parametrize("units", ["plain", "scaled"])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_unit_assignment_is_optimal_for_its_documented_cost(units: UnitMethod, dead: bool, seed: int) -> None:
    a, b = rows(6, 4, seed), rows(6, 4, seed + 100)
    if dead:
        a.up[2] = 0
        b.down[4] = 0
    literal = torch.tensor([[literal_cost(a, b, k, m, units) for m in range(6)] for k in range(6)], dtype=torch.float64)
    found = match_units(a, b, units).symmetry.order
    best = min(float(literal[range(6), list(order)].sum()) for order in permutations(range(6)))
    assert float(literal[range(6), found].sum()) == pytest.approx(best, rel=1e-6)
    cost = unit_cost(a, b, units)  # equal to the literal one up to constants of rows and columns
    gap = literal - cost
    assert torch.allclose(gap - gap[:1] - gap[:, :1] + gap[0, 0], torch.zeros_like(gap), atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_scaled_units_find_order_sign_and_scale_and_plain_ones_do_not(scale: float) -> None:
    a = rows(40, 16, 0)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(40, generator=generator)
    factor = (torch.randint(2, (40,), generator=generator) * 2.0 - 1) * scale ** (torch.rand(40, generator=generator) * 2 - 1)
    b = moved(a, order, factor)
    found = match_units(a, b, "scaled")
    assert torch.equal(found.symmetry.order, order.argsort())
    assert torch.allclose(found.symmetry.scale, (1 / factor)[order.argsort()], rtol=1e-5)
    assert found.squared_after < 1e-8 * found.squared_before and found.symmetry.is_lossless == (scale == 1)
    plain = match_units(a, b, "plain")
    assert plain.squared_after > 0.1 * plain.squared_before
    assert torch.equal(plain.symmetry.scale, torch.ones(40))


def test_scales_that_do_not_pay_stay_exactly_one() -> None:
    a = rows(40, 16, 0)
    noise = rows(40, 16, 1)
    b = UnitRows(*(getattr(a, role) + 0.01 * getattr(noise, role) for role in ("gate", "up", "down")))
    found = match_units(a, b, "scaled")
    assert (
        torch.equal(found.symmetry.order, torch.arange(40))
        and torch.equal(found.symmetry.scale, torch.ones(40))
        and found.symmetry.is_lossless
    )
    same = match_units(a, a, "scaled")
    assert torch.equal(same.symmetry.scale, torch.ones(40)) and same.squared_after == 0
    # the control: where scales do pay, more than SCALE_GAIN, they are kept
    found = match_units(a, moved(a, torch.arange(40), torch.full((40,), 1.5)), "scaled")
    assert not found.symmetry.is_lossless and found.squared_after < (1 - SCALE_GAIN) * found.squared_before


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_gate_cost_is_equation_10(saved: Callable[..., Path], family: str) -> None:
    a, b = (model(saved(family, "per-expert", seed)).layers[1] for seed in (0, 1))
    w, v = a.stored("router").double(), b.stored("router").double()
    if family != "deepseek_v3":  # softmax: centred
        w, v = w - w.mean(0), v - v.mean(0)
    expected = torch.stack([(w[i] - v).norm(dim=1) for i in range(a.experts)])
    found = gate_cost(a.banks[FIRST], b.banks[FIRST])
    assert torch.allclose(found, expected)
    shifted = gate_cost(a.banks[FIRST], _Shifted(b.banks[FIRST]))
    assert torch.allclose(found, shifted) == (family != "deepseek_v3")


class _Shifted:
    """A bank whose router rows have been translated."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.roles, self.router = bank, bank.roles, bank.router

    def values(self, role: str, expert: int | None = None) -> torch.Tensor:
        return self.bank.values(role, expert) + (5 if role == "router" else 0)


def literal_expert_cost(a: MoEModel, b: MoEModel, balanced: bool) -> torch.Tensor:
    """Eq. 11 over gate, up and down, from explicit Gram matrices."""

    def grams(source: MoEModel, expert: int) -> list[torch.Tensor]:
        gate, up, down = (source.layers[1].stored(role, expert).double() for role in ("gate", "up", "down"))
        if balanced:
            ratio = (up.norm(dim=1, keepdim=True) / down.norm(dim=1, keepdim=True)).sqrt()
            up, down = up / ratio, down * ratio
        return [x.T @ x for x in (gate, up, down)]

    n = a.layers[1].experts
    of_a, of_b = [grams(a, i) for i in range(n)], [grams(b, i) for i in range(n)]
    return torch.tensor(
        [[sum(float((x - y).square().sum()) for x, y in zip(p, q, strict=True)) ** 0.5 for q in of_b] for p in of_a],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("units", ["plain", "scaled"])
def test_expert_cost_is_equation_11_in_every_form(
    saved: Callable[..., Path], family: str, units: UnitMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (model(saved(family, "per-expert", seed)) for seed in (0, 1))
    expected = literal_expert_cost(a, b, balanced=units == "scaled")
    of_a, of_b = a.layers[1].banks[FIRST], b.layers[1].banks[FIRST]
    found = expert_cost(of_a, of_b, units, CPU)
    assert found.form == "gram" and torch.allclose(found.values, expected, rtol=1e-4)
    products = expert_cost(_Narrow(of_a), of_b, units, CPU)
    assert products.form == "products" and torch.allclose(products.values, expected, rtol=1e-4)
    # too little room for Gram matrices: a sketch, unbiased, and zero where the experts are equal
    monkeypatch.setattr(Bank, "expert_numel", 1)
    sketch = expert_cost(of_a, of_b, units, CPU, workspace=6 * of_a.experts * 16 * 4)
    assert (sketch.form, sketch.columns) == ("sketch", 6)
    assert (sketch.values / expected).log().abs().mean() < 0.3
    own = expert_cost(of_a, of_a, units, CPU, workspace=6 * of_a.experts * 16 * 4).values
    assert (own.diagonal() < 1e-2 * own.mean()).all() and own.mean() > 1


class _Narrow:
    """A bank that claims to have one hidden unit, which makes products the cheaper form."""

    unit_count = 1

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def __getattr__(self, name: str) -> object:
        return getattr(self.bank, name)


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("order", ["gate", "expert", "best"])
def test_a_planted_symmetry_is_found_exactly(saved: Callable[..., Path], family: str, order: str) -> None:
    a = model(saved(family))
    generator = torch.Generator().manual_seed(3)
    for layer in a.layers.values():
        planted = layer.random(generator, groups=a.groups, scale=3.0)
        b = _Planted(layer, planted)
        found = match_layer(layer, b, WeightMatching(order=order), groups=a.groups)
        assert found.symmetry.isclose(planted.inverse())
        assert found.first.distance_after_units < 1e-5 * found.first.distance_before
        assert found.first.router_distance_after < 1e-6 * found.first.router_distance_before
        found.symmetry.validate("found", a.groups)
        plain = match_layer(layer, b, WeightMatching(order=order, units="plain"), groups=a.groups)
        assert plain.first.distance_after_units > 0.1 * plain.first.distance_before  # signs are invisible to it


class _Planted:
    """A block on disk seen in other coordinates."""

    def __init__(self, layer: MoELayer, symmetry: LayerSymmetry) -> None:
        self.layer, self.stored = layer, ActedLayer(layer, symmetry, layer.units).stored
        self.banks = {name: Bank(self, name) for name in layer.banks}
        self.shared = SharedExpert(self)

    def __getattr__(self, name: str) -> object:
        return getattr(self.layer, name)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_best_keeps_the_order_that_leaves_less_and_reports_all_distances(saved: Callable[..., Path], family: str) -> None:
    a, b = (model(saved(family, "per-expert", seed)) for seed in (0, 1))
    layer_a, layer_b = a.layers[1], b.layers[1]
    found = {
        order: match_layer(layer_a, layer_b, WeightMatching(order=order), groups=a.groups)
        for order in ("gate", "expert", "best")
    }
    best = found["best"]
    assert best.first.candidates == {
        "gate": found["gate"].first.distance_after_units,
        "expert": found["expert"].first.distance_after_units,
    }
    assert (
        best.first.distance_after_units == min(best.first.candidates.values()) == best.first.candidates[best.first.order_method]
    )
    assert best.first.distance_after_units < best.first.distance_after_order
    for matching in found.values():
        acted = ActedLayer(layer_b, matching.symmetry, layer_b.units)
        pairs = [(r, e) for r in layer_a.expert_roles for e in range(layer_a.experts)]
        after = sum(float((layer_a.stored(r, e) - acted.stored(r, e)).double().square().sum()) for r, e in pairs) ** 0.5
        before = sum(float((layer_a.stored(r, e) - layer_b.stored(r, e)).double().square().sum()) for r, e in pairs) ** 0.5
        assert after == pytest.approx(matching.first.distance_after_units, rel=1e-5)
        assert before == pytest.approx(matching.first.distance_before, rel=1e-5)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(InputError, match="expected one of gate, expert, best"):
        WeightMatching(order="random")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected one of plain, scaled"):
        WeightMatching(units="some")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("order", ["gate", "expert", "best"])
@pytest.mark.parametrize(
    ("part", "named"),
    [("mlp.gate.weight", "router row 3"), ("mlp.experts.3.up", "expert 3"), ("mlp.shared_expert.down", "the shared expert")],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_weights_that_are_not_finite_are_named(
    saved: Callable[..., Path], copy: Callable[..., Path], order: str, part: str, named: str, value: float, swapped: bool
) -> None:
    bad = copy("qwen2_moe", "per-expert", 1)

    def spoil(content: dict[str, torch.Tensor]) -> None:
        for name in [name for name in content if name.startswith(f"model.layers.1.{part}")]:
            content[name].view(-1)[3 * 16] = value

    tiny.edit(bad, spoil)
    pair = [model(folder).layers[1] for folder in (saved("qwen2_moe"), bad)]
    with pytest.raises(CheckpointError, match=f"{re.escape(str(bad))}: layer 1: {named} holds NaN"):
        match_layer(*(pair[::-1] if swapped else pair), WeightMatching(order=order))


@pytest.fixture
def every_expert_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_lmc.matching.units.SMALL", 0)


NUMBERS = ("norm", "distance_before", "distance_after_order", "distance_after_units", "router_distance_after")


@pytest.mark.usefixtures("every_expert_is_wide")
@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("order", ["gate", "expert", "best"])
def test_sketches_find_what_the_full_costs_find(saved: Callable[..., Path], family: str, order: str) -> None:
    a = model(saved(family))
    generator = torch.Generator().manual_seed(3)
    for layer in a.layers.values():
        b = _Planted(layer, layer.random(generator, groups=a.groups, scale=3.0))
        found = match_layer(layer, b, WeightMatching(order=order), groups=a.groups)
        exact = match_layer(layer, b, WeightMatching(order=order, exact=True), groups=a.groups)
        assert found.symmetry.isclose(exact.symmetry) and found.symmetry.isclose(exact.symmetry)
        for name in NUMBERS:
            assert getattr(found.first, name) == pytest.approx(getattr(exact.first, name), rel=1e-5, abs=1e-5), name
        assert set(exact.first.certificates) == {"exact"} and "exact" not in found.first.certificates
        assert exact.first.order_margin is None and exact.first.order_decided == ("both" if order == "best" else "asked")
        assert found.first.order_decided == {"gate": "asked", "expert": "margin", "best": "margin"}[order]
        assert found.first.candidates.keys() == exact.first.candidates.keys()


@pytest.mark.usefixtures("every_expert_is_wide")
@pytest.mark.parametrize("order", ["gate", "expert"])
def test_unrelated_experts_go_the_exact_way(saved: Callable[..., Path], order: str) -> None:
    a, b = (model(saved("mixtral", "per-expert", seed)).layers[1] for seed in (0, 1))
    found, exact = (match_layer(a, b, WeightMatching(order=order, exact=exact)) for exact in (False, True))
    assert found.symmetry.isclose(exact.symmetry)
    for name in NUMBERS:
        assert getattr(found.first, name) == pytest.approx(getattr(exact.first, name), rel=1e-5), name
    assert set(found.first.certificates) == {"exact"}
    best = match_layer(a, b, WeightMatching())  # unproved orders are said to be so
    assert (
        best.first.order_decided in ("sketch", "both") and best.first.order_margin is not None and best.first.order_margin > 0.5
    )


@pytest.mark.usefixtures("every_expert_is_wide")
def test_each_related_expert_is_read_once_and_the_first_of_each_cycle_twice(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model(saved("qwen3_moe")).layers[1]
    read: list[int | None] = []
    real = UnitRows.of.__func__

    def counted(cls: type[UnitRows], bank: Bank, expert: int | None, device: torch.device) -> UnitRows:
        read.append(expert)
        return real(cls, bank, expert, device)

    monkeypatch.setattr(UnitRows, "of", classmethod(counted))
    match_layer(layer, layer, WeightMatching())
    assert len(read) == 2 * layer.experts
    read.clear()
    planted = layer.random(torch.Generator().manual_seed(0))
    match_layer(layer, _Planted(layer, planted), WeightMatching())
    order, cycles, seen = planted.banks[FIRST].expert_order.tolist(), 0, set()
    for start in range(layer.experts):
        cycles += start not in seen and order[start] != start
        while start not in seen:
            seen.add(start)
            start = order[start]
    assert len(read) == 2 * layer.experts + cycles


def test_the_sketched_gram_costs_are_unbiased_and_their_margin_is_that_of_the_kept_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 60, 40, generator=generator, dtype=torch.float64)
    exact = float((x.T @ x - y.T @ y).square().sum())
    estimates = []
    for _ in range(300):
        signs = torch.randint(2, (40, 12), generator=generator) * 2.0 - 1
        grams = [((rows @ signs.double()).T @ (rows @ signs.double()) / 12)[None] for rows in (x, y)]
        estimates.append(float(sketched_expert_cost(grams[:1], grams[1:])))
    assert torch.tensor(estimates).mean() == pytest.approx(exact, rel=0.05)
    cost = torch.tensor([[1.0, 9.0, 8.0], [9.0, 9.0, 2.0], [7.0, 3.0, 9.0]], dtype=torch.float64)
    assert margin(cost, torch.tensor([0, 2, 1])) == pytest.approx(3 / 7)  # 2 / 8 and 1 / 7 are less
    assert margin(cost, torch.tensor([0, 1, 2])) == pytest.approx(9 / 2)
    assert margin(cost[:1, :1], torch.tensor([0])) == 0
