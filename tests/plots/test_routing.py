from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hf_moe_lmc.plots.routing import draw_agreement, draw_load
from hf_moe_lmc.plots.style import LOAD_COLOURS, LOAD_LABELS
from tests.plots.plotted import routing


@pytest.mark.parametrize(("layers", "experts", "pixels"), [(2, 8, 20), (24, 32, 6), (48, 128, 6), (61, 256, 4)])
def test_every_expert_of_every_layer_has_a_cell_of_some_pixels(layers: int, experts: int, pixels: int) -> None:
    figure = draw_load(routing(layers, experts))
    figure.set_dpi(160)
    figure.draw_without_rendering()
    panels, bar = figure.axes[:3], figure.axes[3]
    for axes in panels:
        (image,) = axes.get_images()
        assert image.get_array().shape == (layers, experts) and image.get_interpolation() == "none"
        box = axes.get_window_extent()
        assert box.width / experts >= pixels and box.height / layers >= pixels
    assert [axes.get_title() for axes in panels] == ["t = 0", "t = 0.5", "t = 1"]
    assert [text.get_text() for text in bar.get_yticklabels()] == list(LOAD_LABELS)
    assert figure.get_figwidth() <= 10  # on a page of 830 pixels, letters of 10 points have 11 pixels or more


def test_colours_tell_little_more_or_less_from_an_even_share() -> None:
    relative = np.array([0.1, 0.3, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0, 5.0])
    load = (relative / 9)[None, None]
    (image,) = draw_load(routing(1, 9, (0.0,), load)).axes[0].get_images()
    found = [to_hex(colour).upper() for colour in image.to_rgba(image.get_array())[0]]
    assert found == list(LOAD_COLOURS)


def test_places_without_an_expert_are_hatched_and_do_not_count_for_the_even_share() -> None:
    load = np.array([[[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, np.nan, np.nan]]])
    found = routing(2, 4, (0.0,), load)
    assert found.relative[0, 1, :2].tolist() == [1, 1]
    axes = draw_load(found).axes[0]
    colours = axes.get_images()[0].to_rgba(axes.get_images()[0].get_array())
    assert colours[1, 2, 3] == 0 and colours[1, 0, 3] == 1 and axes.patch.get_hatch()
    assert len(axes.texts) == 6


def test_numbers_agree_with_the_steps_of_colour() -> None:
    texts = [text.get_text() for text in draw_load(routing(1, 2, (0.0,), np.array([[[0.43, 0.57]]]))).axes[0].texts]
    assert texts == ["0.86", "1.14"]
    assert not draw_load(routing(20, 20)).axes[0].texts  # no room


@pytest.mark.parametrize("t", [(0.5,), (0.0, 0.5, 1.0), (0.0, 0.1, 0.11, 1.0), tuple(i / 59 for i in range(60))])
@pytest.mark.parametrize("layers", [1, 61])
def test_agreement_is_drawn_at_the_points(t: tuple[float, ...], layers: int) -> None:
    found = routing(layers, 4, t)
    figure = draw_agreement(found)
    for axes, values in zip(figure.axes[:2], (found.to_a, found.to_b), strict=True):
        (mesh,) = axes.collections
        assert np.asarray(mesh.get_array()).reshape(layers, len(t)) == pytest.approx(values.T)
        ticks = [text.get_text() for text in axes.get_xticklabels()]
        assert ticks[0] == f"{t[0]:.3g}" and ticks[-1] == f"{t[-1]:.3g}" and len(ticks) <= 7
    assert any("naive path" in text.get_text() for text in figure.texts)
