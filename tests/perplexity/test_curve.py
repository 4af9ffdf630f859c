from __future__ import annotations

import math

import numpy as np
import pytest

from hf_moe_lmc.perplexity.curve import BarrierCurve, area, barrier


def test_barrier_and_area_are_measured_from_the_straight_line() -> None:
    curve = BarrierCurve((0.0, 0.25, 0.5, 1.0), (1.0, 2.0, 4.0, 3.0))
    assert curve.excess == pytest.approx((0, 0.5, 2.0, 0))
    assert (curve.barrier, curve.barrier_t) == (2.0, 0.5)
    assert curve.area == pytest.approx(0.25 * 0.25 + 0.25 * 1.25 + 0.5 * 1.0)
    assert curve.perplexity == pytest.approx([math.exp(x) for x in (1, 2, 4, 3)])


def test_a_loss_that_is_not_finite_makes_no_barrier() -> None:
    for bad in (math.nan, math.inf):
        assert math.isnan(BarrierCurve((0.0, 0.5, 1.0), (1.0, bad, 2.0)).barrier)


def test_a_path_below_the_line_has_no_barrier_but_a_negative_area() -> None:
    curve = BarrierCurve((0.0, 0.5, 1.0), (1.0, 0.5, 2.0))
    assert (curve.barrier, curve.barrier_t) == (0.0, 0.0)
    assert curve.area == pytest.approx(-0.5)


def test_the_array_functions_are_those_of_single_curves() -> None:
    t = (0.0, 0.25, 0.5, 1.0)
    many = np.array([[1.0, 2.0, 4.0, 3.0], [1.0, 0.5, 0.5, 2.0], [1.0, math.nan, 9.0, 1.0], [1.0, 2.0, 2.0, math.inf]])
    singles = [BarrierCurve(t, tuple(row)) for row in many.tolist()]
    assert np.array_equal(barrier(t, many), [single.barrier for single in singles], equal_nan=True)
    assert np.array_equal(area(t, many), [single.area for single in singles], equal_nan=True)
    assert math.isnan(singles[2].barrier) and math.isnan(singles[3].barrier)


def test_the_barrier_over_the_worse_end_and_as_a_ratio() -> None:
    curve = BarrierCurve((0.0, 0.5, 1.0), (1.0, 3.0, 2.0))
    assert curve.barrier_worse_end == 1.0 and curve.barrier == 1.5
    assert curve.perplexity_ratio == pytest.approx(math.exp(1.5))
    assert BarrierCurve((0.0, 0.5, 1.0), (1.0, 1.6, 2.0)).barrier_worse_end == 0
    broken = BarrierCurve((0.0, 0.5, 1.0), (1.0, math.nan, 2.0))
    assert math.isnan(broken.barrier_worse_end) and math.isnan(broken.perplexity_ratio)


@pytest.mark.parametrize(
    ("nll", "half_width", "words"),
    [
        ((1.0, 1.95, 2.0, 1.95, 1.0), 0.0, None),
        ((1.0, 1.5, 2.0, 1.95, 1.0), 0.0, "falls by 0.5 nats from its maximum at t = 0.5"),
        ((1.0, 1.5, 2.0, 1.95, 1.0), 0.6, None),  # no more than noise
        ((1.0, 2.0, 1.99, 1.5, 1.0), 0.0, "the first inner point"),
        ((1.0, 2.0, 1.99, 1.5, 1.0), 1.5, None),  # the barrier itself is noise
        ((1.0, 1.0005, 1.0, 1.0, 1.0), 0.0, None),
        ((1.0, 0.5, 0.4, 0.5, 1.0), 0.0, None),
        ((1.0, math.nan, 2.0, 1.5, 1.0), 0.0, None),
    ],
)
def test_a_maximum_that_the_grid_may_have_missed_is_said(nll: tuple[float, ...], half_width: float, words: str | None) -> None:
    found = BarrierCurve((0.0, 0.25, 0.5, 0.75, 1.0), nll).unresolved(half_width)
    assert found is None if words is None else words in (found or "")


@pytest.mark.parametrize(("t", "end"), [((0.0, 0.2, 0.3, 0.4, 1.0), "first"), ((0.0, 0.6, 0.7, 0.8, 1.0), "last")])
def test_a_maximum_at_the_edge_of_the_grid_is_said(t: tuple[float, ...], end: str) -> None:
    nll = (1.0, 2.0, 1.99, 1.5, 1.0) if end == "first" else (1.0, 1.5, 1.99, 2.0, 1.0)
    assert f"the {end} inner point" in (BarrierCurve(t, nll).unresolved() or "")
    assert "falls by 1 nats" in (BarrierCurve((0.0, 0.5, 1.0), (1.0, 2.0, 1.0)).unresolved() or "")
