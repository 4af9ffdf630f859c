"""Hidden units stay where they are unless moving them gains more than noise."""

from __future__ import annotations

import pytest
import torch

from hf_moe_lmc.matching.assignment import assign
from hf_moe_lmc.matching.moves import UNIT_GAIN, cycles, worthwhile
from hf_moe_lmc.matching.options import UnitMethod
from hf_moe_lmc.matching.units import Paired, UnitRows, match_units, unit_cost

UNITS, WIDTH = 96, 24
STAY = torch.arange(UNITS)


def expert(seed: int) -> UnitRows:
    return UnitRows(*torch.randn(3, UNITS, WIDTH, generator=torch.Generator().manual_seed(seed)))


def drifted(base: UnitRows, noise: float, seed: int) -> UnitRows:
    """What training makes of a copy."""
    more = expert(seed)
    return UnitRows(*(getattr(base, role) + noise * getattr(more, role) for role in ("gate", "up", "down")))


def order(a: UnitRows, b: UnitRows, units: UnitMethod = "scaled") -> torch.Tensor:
    return match_units(a, b, units).symmetry.order


def test_cycles_are_those_of_a_walk_along_the_permutation() -> None:
    for seed in range(5):
        permutation = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
        expected = [-1] * 50
        for start in range(50):
            i = start
            while expected[i] < 0:
                expected[i], i = start, int(permutation[i])
        assert cycles(permutation).tolist() == expected
    assert cycles(torch.arange(0)).tolist() == []


@pytest.mark.parametrize("units", ["scaled", "plain"])
def test_units_of_two_fine_tunes_stay(units: UnitMethod) -> None:
    for noise in (0.0, 0.05, 0.3):
        base = expert(0)
        a, b = drifted(base, noise, 1), drifted(base, noise, 2)
        assert torch.equal(order(a, b, units), STAY)


@pytest.mark.parametrize("units", ["scaled", "plain"])
def test_units_that_would_gain_no_more_than_noise_stay_and_others_move(units: UnitMethod) -> None:
    base = expert(0)
    a = drifted(base, 0.3, 1)
    b = drifted(base, 0.3, 2)
    # units 0 and 1 of both are one unit but for a trace, so that either order is as good
    for role, rows in (("gate", b.gate), ("up", b.up), ("down", b.down)):
        own = getattr(a, role)
        own[1], rows[0] = own[0] + 1e-3 * own[2], rows[0]
        rows[1] = rows[0] + 1e-3 * own[3]
        rows[4:9] = rows[4:9].roll(1, 0)  # these were shuffled
    swapped = b.gate.clone(), b.up.clone(), b.down.clone()
    shuffled = STAY.clone()
    shuffled[4:9] = shuffled[4:9].roll(-1)
    for rows in swapped:
        rows[:2] = rows[:2].flip(0)
    cheaper = [assign(unit_cost(a, other, units)) for other in (b, UnitRows(*swapped))]
    assert any(not torch.equal(found[:2], STAY[:2]) for found in cheaper), "the control: one of both is cheaper swapped"
    for other in (b, UnitRows(*swapped)):
        assert torch.equal(order(a, other, units), shuffled)


def test_units_of_unrelated_experts_move() -> None:
    a, b = expert(0), expert(1)
    match = match_units(a, b, "scaled")
    assert int((match.symmetry.order != STAY).sum()) > 0.9 * UNITS
    assert match.squared_after < 0.9 * match.squared_before


def test_what_is_given_up_is_less_than_the_threshold() -> None:
    for seed in range(4):
        base = expert(seed)
        a, b = drifted(base, 0.9, seed + 10), drifted(base, 0.9, seed + 20)
        optimum = Paired.of(a, b, "scaled", assign(unit_cost(a, b, "scaled")))
        standing = Paired.of(a, b, "scaled", STAY)
        settled = optimum.settled(standing)
        assert sorted(settled.permutation.tolist()) == STAY.tolist()
        again = Paired.of(a, b, "scaled", settled.permutation)
        torch.testing.assert_close(settled.cost()[0], again.cost()[0])
        lost = float(settled.cost()[0].sum() - optimum.cost()[0].sum())
        assert lost + 1e-9 >= 0 and lost <= UNIT_GAIN * float(standing.cost()[0].sum())
        moves = worthwhile(optimum.permutation, standing.cost()[0], optimum.cost()[0])
        assert torch.equal(settled.permutation, torch.where(moves, optimum.permutation, STAY))


def test_the_distance_before_is_that_of_the_experts_as_they_are() -> None:
    a, b = expert(0), expert(0)
    b = UnitRows(b.gate, b.up * torch.where(STAY[:, None] % 3 == 0, -1, 1), b.down * torch.where(STAY[:, None] % 3 == 0, -1, 1))
    match = match_units(a, b, "scaled")
    assert match.squared_before == pytest.approx(a.squared_distance(b)) and match.squared_after == pytest.approx(0, abs=1e-6)
    other = expert(1)
    assert match_units(a, other, "scaled").squared_before == pytest.approx(a.squared_distance(other))
