from __future__ import annotations

import math

import pytest

from hf_moe_lmc.curve import BarrierCurve


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
