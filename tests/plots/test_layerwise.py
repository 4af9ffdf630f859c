from __future__ import annotations

import math

import pytest
from matplotlib.axes import Axes

from hf_moe_lmc.plots.layerwise import LISTED, draw_layers
from tests.plots.plotted import layers


def marks(axes: Axes, gid: str = "marks") -> list[tuple[float, float]]:
    found = [artist for artist in axes.get_lines() if artist.get_gid() == gid]
    return [point for artist in found for point in zip(artist.get_xdata(), artist.get_ydata(), strict=True)]


@pytest.mark.parametrize("count", [1, 2, 12, 61])
def test_each_bar_has_a_mark_inside_the_plot_so_that_zero_shows(count: int) -> None:
    figure = draw_layers(layers({(2 * i + 1,) * 2: 0.1 * (i % 3) for i in range(count)}))
    (axes,) = figure.axes
    assert len(axes.patches) == count and [y for _, y in marks(axes)] == pytest.approx([0.1 * (i % 3) for i in range(count)])
    low, high = axes.get_ylim()
    assert low < 0 < max(0.15, 0.3) < high  # intervals and the line of the whole model as well
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert shown[0] == "1" and len(shown) <= 24


def test_ranges_have_a_panel_on_the_same_scale_and_stand_in_the_legend() -> None:
    spans = {(0, 0): 0.1, (1, 1): 0.0, (0, 7): 0.2, (4, 7): 0.15, (0, 3): 0.05}
    figure = draw_layers(layers(spans))
    singles, ranges = figure.axes
    assert [text.get_text() for text in ranges.get_xticklabels()] == ["0-3", "4-7", "0-7"]
    assert [y for _, y in marks(ranges)] == [0.05, 0.15, 0.2] and singles.get_ylim() == ranges.get_ylim()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["all layers: 0.3", "layers of a range together: 0-3, 4-7, 0-7", "one layer alone"]
    assert singles.patches[0].get_facecolor() != ranges.patches[0].get_facecolor()


def test_many_ranges_are_counted() -> None:
    figure = draw_layers(layers({(i, i + 1): 0.1 for i in range(LISTED + 4)}))
    assert len(figure.axes) == 1
    assert any(text.get_text().endswith("5-6 and 4 more") for text in figure.legends[0].get_texts())


@pytest.mark.parametrize(("whole", "said"), [(5.0, "5, above this plot"), (0.3, "0.3"), (math.nan, "not finite")])
def test_a_model_far_above_its_layers_does_not_flatten_them(whole: float, said: str) -> None:
    figure = draw_layers(layers({(0, 0): 0.1, (1, 1): 0.0}, whole))
    assert figure.axes[0].get_ylim()[1] < 0.4
    assert f"all layers: {said}" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_all_zero_and_not_finite_are_drawn() -> None:
    figure = draw_layers(layers({(0, 0): math.nan, (1, 1): 0.0}, 0.0))
    assert marks(figure.axes[0], "missing") == [(0, 0.0)] and figure.axes[0].get_ylim()[1] > 0
    figure.draw_without_rendering()
