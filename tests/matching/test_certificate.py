from __future__ import annotations

import math

import pytest
import torch

from hf_moe_lmc.matching import certificate
from hf_moe_lmc.matching.certificate import (
    COLUMNS,
    WIDER,
    Sketched,
    certified_permutation,
    excess,
)
from hf_moe_lmc.matching.options import UnitMethod
from hf_moe_lmc.matching.units import UnitRows, match_units
from hf_moe_lmc.moe.notation import UNIT_KINDS

UNITS, WIDTH = 400, 96
KINDS = [("swiglu", True), ("clamped", True), ("plain", True), ("relu", False), ("relu2", False), ("affine", True)]


def pair(
    kind: str = "swiglu",
    gated: bool = True,
    sigma: float = 0.1,
    seed: int = 0,
    units: int = UNITS,
    width: int = WIDTH,
    method: str = "scaled",
) -> tuple[UnitRows, UnitRows, torch.Tensor]:
    """An expert, another at a relative distance of sigma with what kind and method allow planted, and the order planted."""
    generator = torch.Generator().manual_seed(seed)
    what = UNIT_KINDS[kind]

    def drawn() -> list[torch.Tensor]:
        found = [torch.randn(units, width, generator=generator) for _ in range(3)]
        return found if gated else [found[0][:, :0], *found[1:]]

    of_a, noise = drawn(), drawn()
    order = torch.randperm(units, generator=generator)
    scale = torch.exp(0.5 * torch.randn(units, 1, generator=generator))
    scale = scale if what.scale and method == "scaled" else torch.ones(units, 1)
    if what.sign and method == "scaled":
        scale *= torch.randint(2, (units, 1), generator=generator) * 2 - 1
    mixed = [(noisy if math.isinf(sigma) else x + sigma * noisy)[order] for x, noisy in zip(of_a, noise, strict=True)]
    b = UnitRows(mixed[0], mixed[1] * scale, mixed[2] / scale**what.power, kind=what)
    return UnitRows(*of_a, kind=what), b, order.argsort()


def costs(a: UnitRows, b: UnitRows, units: UnitMethod) -> torch.Tensor:
    """The documented cost of all pairs of units, constants included, from float64 differences."""
    kind = a.kind

    def distance(x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        x, y = x.double(), y.double()
        inner = (x @ y.T) * factor
        return x.square().sum(1, keepdim=True) + y.square().sum(1) * factor.square() - 2 * inner

    norms = [x.double().norm(dim=1) for x in (a.up, a.down, b.up, b.down)]
    scale = torch.ones(len(a.up), len(b.up), dtype=torch.float64)
    if kind.scale and units == "scaled":
        of_a, of_b = (torch.where((u > 0) & (d > 0), u / d, torch.nan) for u, d in (norms[:2], norms[2:]))
        scale = (of_a[:, None] / of_b[None, :]).nan_to_num(1.0).pow(1 / (1 + kind.power))
    ones = torch.ones_like(scale)
    found = [
        distance(a.up, b.up, sign * scale) + distance(a.down, b.down, sign * scale**-kind.power)
        for sign in ((1, -1) if kind.sign and units == "scaled" else (1,))
    ]
    return distance(a.gate, b.gate, ones) + torch.stack(found).amin(dim=0)


def total(cost: torch.Tensor, order: torch.Tensor) -> float:
    return float(cost.gather(1, order[:, None]).sum())


@pytest.mark.parametrize("columns", [COLUMNS, WIDER, 384])
def test_the_tail_bound_is_what_its_formula_says(columns: int) -> None:
    t = excess(columns, 1e9)
    assert 1e9 * math.exp(-columns / 2 * (t - math.log1p(t))) == pytest.approx(certificate.FAILURE, rel=1e-3)
    # it holds for sketches of what is hardest for it, one direction, and of random ones: 20,000 sketches against 1e-2
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (20_000, 8, columns), generator=generator).float() * 2 - 1
    for x in (
        torch.eye(8)[0],
        torch.ones(8) / 8**0.5,
        torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0),
    ):
        squared = (x @ signs).square().mean(dim=1)
        assert int((squared > 1 + excess(columns, 1.0, 1e-2)).sum()) <= 200


@pytest.mark.parametrize(("kind", "gated"), KINDS)
@pytest.mark.parametrize("sigma", [0.0, 0.3, math.inf])
def test_no_cost_lies_below_its_bound(kind: str, gated: bool, sigma: float) -> None:
    for seed in range(3):
        a, b, _ = pair(kind, gated, sigma, seed)
        if seed:  # dead units, on both sides
            a.up[:3], b.down[5:9], b.up[7] = 0, 0, 0
        for units in ("scaled", "plain"):
            exact = costs(a, b, units)
            of_a, of_b = Sketched(a, units), Sketched(b, units)
            for roles, columns in ((("gate",), COLUMNS), (of_a.roles, COLUMNS), (of_a.roles, WIDER)):
                if gated or roles != ("gate",):
                    sketched = (
                        certificate._LowerBounds(of_a, of_b, roles, columns)
                        .block(slice(0, UNITS))
                        .flatten(1)[:, :UNITS]
                        .double()
                    )
                    bound = sketched / (1 + excess(columns, 2.0 * UNITS**2))
                    assert bool((bound <= exact * (1 + 1e-9) + 1e-9).all())
                    if sigma and roles != ("gate",):  # the control: without the margin of the tail they are no bounds
                        assert int((sketched > exact).sum()) > UNITS


@pytest.mark.parametrize(("kind", "gated"), KINDS)
@pytest.mark.parametrize("units", ["scaled", "plain"])
def test_what_is_certified_is_what_the_full_costs_give(kind: str, gated: bool, units: UnitMethod) -> None:
    ways = set()
    for sigma in (0.0, 0.02, 0.2, 0.4, 0.55, 0.8, math.inf):
        for seed in range(2):
            a, b, planted = pair(kind, gated, sigma, seed, method=units)
            found = certified_permutation(Sketched(a, units), Sketched(b, units))
            exact = match_units(a, b, units)
            if found is None:
                ways.add(None)
                continue
            matched = found[0].match(found[1])
            ways.add(matched.certificate)
            assert torch.equal(matched.symmetry.order, exact.symmetry.order) and torch.equal(
                matched.symmetry.scale, exact.symmetry.scale
            )
            assert matched.squared_after == pytest.approx(exact.squared_after, rel=1e-5, abs=1e-6)
            assert sigma <= 0.8 and torch.equal(matched.symmetry.order, planted)
    assert None in ways and {"sketch", "wider sketch", "partly exact"} & ways


@pytest.mark.parametrize("sigma", [0.0, 0.01, 0.03, 0.1, 0.3, 0.5])
def test_related_experts_are_certified(sigma: float) -> None:
    for seed in range(2):
        a, b, planted = pair(sigma=sigma, seed=seed, units=1500, width=256)
        found = certified_permutation(Sketched(a, "scaled"), Sketched(b, "scaled"))
        assert found is not None and torch.equal(found[0].permutation, planted)
        assert found[1] == "sketch" if sigma <= 0.03 else found[1] in ("sketch", "wider sketch")


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("what", ["duplicates", "dead", "dead in a", "zero rows"])
def test_duplicates_and_dead_units_cost_no_more_than_in_full(what: str, sigma: float) -> None:
    a, b, _ = pair("clamped", sigma=sigma, width=600)  # where unrelated units are all equally far apart, as in wide models
    if what == "duplicates":
        for x in (a.gate, a.up, a.down, b.gate, b.up, b.down):
            x[10:14] = x[10]
    else:
        for x in [a.up, a.down][: 1 if what == "dead" else 2] + ([] if what == "dead in a" else [b.up, b.down]):
            x[20:24] = 0
        if what == "zero rows":
            a.gate[20:24], b.gate[20:24] = 0, 0
    exact, found = match_units(a, b, "scaled"), certified_permutation(Sketched(a, "scaled"), Sketched(b, "scaled"))
    assert found is not None
    cost = costs(a, b, "scaled")
    assert total(cost, found[0].permutation) == pytest.approx(total(cost, exact.symmetry.order), rel=1e-6, abs=1e-2)
    assert torch.equal(found[0].permutation.sort().values, torch.arange(UNITS))


def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_lmc.matching.rows.BLOCK", 1 << 12)
    a, b, _ = pair(sigma=0.3)
    stored = [
        UnitRows(x.gate.bfloat16(), x.up.bfloat16(), x.down.bfloat16().T.contiguous().T, kind=x.kind)  # as on disk
        for x in (a, b)
    ]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pairs = certified_permutation(*(Sketched(UnitRows(x.gate, x.up, x.down), "scaled") for x in stored))
        assert pairs is not None
        found.append(pairs[0])
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    for other in found[1:]:
        for name in ("permutation", "sign", "gate", "up", "down"):
            assert torch.equal(getattr(found[0], name), getattr(other, name)), name
