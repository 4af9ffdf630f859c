from __future__ import annotations

import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from hf_moe_lmc.plots.losses import LEAST_SPAN, draw_losses
from hf_moe_lmc.plots.style import STYLES
from hf_moe_lmc.plots.values import Line
from tests.plots.plotted import GRID, hump, line, losses


def artists(axes: Axes, gid: str) -> list:
    return [artist for artist in axes.get_children() if artist.get_gid() == gid]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("fall", [0.0, 5.0])
def test_the_band_is_that_of_the_excess_and_has_no_width_at_the_ends(fall: float) -> None:
    figure = draw_losses(losses(aligned=line(hump(0.2), fall=fall), naive=line(hump(0.9), fall=fall)))
    above, below = figure.axes
    for name, height in (("aligned", 0.2), ("naive", 0.9)):
        (band,) = artists(below, f"{name} band")
        assert isinstance(band, PolyCollection) and band.get_hatch() is None
        points = band.get_paths()[0].vertices
        widths = [np.ptp(points[np.isclose(points[:, 0], t), 1]) for t in (0.0, 0.5, 1.0)]
        assert widths == pytest.approx([0, 0.2 * height, 0]) and not artists(above, f"{name} band")
        (curve,) = artists(below, name)
        assert curve.get_ydata() == pytest.approx(hump(height))  # whatever the slope of the line
    assert artists(above, "naive")[0].get_ydata()[-1] == pytest.approx(2.5 - fall)


def test_one_path_stands_before_the_other_thinner_and_broken() -> None:
    below = draw_losses(losses(naive=line(hump(0.2)), aligned=line(hump(0.2)))).axes[1]
    (aligned,), (naive,) = artists(below, "aligned"), artists(below, "naive")
    assert naive.get_zorder() > aligned.get_zorder() and naive.get_linewidth() < aligned.get_linewidth()
    assert (naive.get_linestyle(), aligned.get_linestyle()) == ("--", "-")
    assert [x.get_color() for x in (aligned, naive)] == [STYLES["aligned"].colour, STYLES["naive"].colour]


@pytest.mark.parametrize(
    ("naive", "said"),
    [
        (hump(0.2), "naive coincide:"),
        (hump(0.2004), "naive coincide:"),
        (hump(0.22), None),
        ([x if i < 16 else x + 0.05 for i, x in enumerate(hump(0.2)[:-1])] + [0.0], "coincide at 15 of 23 inner points"),
        (hump(math.nan), None),
    ],
)
def test_curves_that_coincide_are_said_to(naive: list[float], said: str | None) -> None:
    notes = [label for label in labels(draw_losses(losses(aligned=line(hump(0.2)), naive=line(naive)))) if "coincide" in label]
    assert len(notes) == (said is not None) and all(said in note for note in notes)


@pytest.mark.parametrize(
    ("height", "width", "said", "filled"),
    [
        (0.2, 0.1, "barrier 0.2 [0.18, 0.22] at t = 0.5", True),
        (0.2, None, "barrier 0.2 at t = 0.5", True),
        (-0.012, 0.5, "no barrier, 0.012 below the line [0.006, 0.018] at t = 0.5", False),
        (0.0, 0.1, "no barrier", False),
        (1e-9, 0.1, "no barrier", False),
        (math.nan, None, "the loss is not finite at 25 points", False),
    ],
)
def test_a_curve_is_put_in_words(height: float, width: float | None, said: str, filled: bool) -> None:
    figure = draw_losses(losses(aligned=line(hump(height), width=width)))
    assert labels(figure)[0] == f"aligned: {said}"
    assert bool(artists(figure.axes[1], "aligned mark")) == filled
    assert bool(artists(figure.axes[1], "aligned band")) == (width is not None)


def test_the_least_loss_is_marked_where_it_is_inside_the_path() -> None:
    figures = [draw_losses(losses(aligned=line(hump(height), fall=0.02))) for height in (-0.02, 0.002)]
    marks = [artists(figure.axes[0], "aligned mark") for figure in figures]
    assert marks[0][0].get_xdata()[0] == GRID[15] and not marks[1]  # t = 0.625, where 0.08 (2 t - 1) = 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [12, 24])
def test_a_loss_that_is_not_finite_leaves_a_gap_and_a_cross(value: float, at: int) -> None:
    excess = hump(0.2)
    excess[at] = value
    broken = line(excess if at < 24 else [math.nan] * 25, width=None)
    nll = [2.5] * 25
    nll[at] = value
    whole = Line(t=GRID, nll=nll, excess=broken.excess, band=[], barrier=math.nan, interval=None)
    figure = draw_losses(losses(naive=whole))
    (crosses,) = artists(figure.axes[0], "missing")
    assert list(crosses.get_xdata()) == [GRID[at]] and "not finite" in " ".join(labels(figure))
    assert np.isnan(artists(figure.axes[0], "naive")[0].get_ydata()).tolist() == [i == at for i in range(25)]
    assert any("no line" in text.get_text() for text in figure.axes[1].texts) == (at == 24)
    assert np.isfinite(figure.axes[0].get_ylim()).all()


def test_rounding_is_not_blown_up_and_small_effects_fill_the_plot() -> None:
    tiny, small = (draw_losses(losses(aligned=line(hump(height)))).axes[1].get_ylim() for height in (1e-12, 0.001))
    assert np.ptp(tiny) >= LEAST_SPAN and np.ptp(small) < 0.002


def test_marks_are_smaller_where_they_are_many() -> None:
    fine = tuple(np.linspace(0, 1, 60).tolist())
    sizes = [
        artists(draw_losses(losses(aligned=line(hump(0.2, t), t))).axes[1], "aligned")[0].get_markersize() for t in (GRID, fine)
    ]
    assert sizes[1] < sizes[0]


def test_letters_stand_on_the_side_without_curves() -> None:
    for height, below in ((0.2, True), (-0.2, False)):
        axes = draw_losses(losses(aligned=line(hump(height)))).axes[0]
        assert [text.get_text() for text in axes.texts] == ["A", "B"]
        assert {text.get_va() == "top" for text in axes.texts} == {below}
