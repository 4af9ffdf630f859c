from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_rgb

from hf_moe_lmc.plots.losses import draw_losses
from hf_moe_lmc.plots.style import (
    LOAD_COLOURS,
    LOAD_EDGES,
    LOAD_LABELS,
    OTHER,
    STYLES,
    canvas,
    own_settings,
    save,
)
from hf_moe_lmc.plots.values import Heading
from tests.plots.plotted import HEADING, hump, line, losses


def luminance(colour: str) -> float:
    """Relative luminance of WCAG, from 0 to 1: what grey print keeps."""
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_paths_differ_in_grey_and_in_more_than_colour() -> None:
    aligned, naive = STYLES["aligned"], STYLES["naive"]
    assert contrast(aligned.colour, naive.colour) > 2 and min(contrast(x.colour, "white") for x in (aligned, naive)) > 3
    assert contrast("#0072B2", "#D55E00") < 2  # the usual blue would not do
    styles = [aligned, naive, OTHER]
    for kind in ("colour", "dash", "marker", "order"):
        assert len({getattr(style, kind) for style in styles}) == 3, kind
    behind = sorted(styles, key=lambda style: style.order)
    assert behind[0].width > behind[-1].width and behind[0].dash[0] == "-"  # what lies behind still shows


def test_loads_rise_in_lightness_and_change_in_hue_at_an_even_share() -> None:
    light = [luminance(colour) for colour in LOAD_COLOURS]
    assert all(high > low for low, high in pairwise(light)) and len(LOAD_COLOURS) == len(LOAD_EDGES) + 1 == len(LOAD_LABELS) + 1
    assert {0.8, 1.2} <= set(LOAD_EDGES) and [float(Fraction(label)) for label in LOAD_LABELS] == list(LOAD_EDGES)
    for i, colour in enumerate(LOAD_COLOURS):
        red, _, blue = to_rgb(colour)
        assert (blue > red + 0.05, red > blue + 0.05) == (i < 4, i > 4), colour


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_equal_figures_give_equal_files_without_a_date(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two", "other"):
        with own_settings():
            figure = draw_losses(losses(aligned=line(hump(0.2 if name != "other" else 0.3))))
        save(figure, tmp_path / f"{name}.png")
    one, two, other = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other and b"date" not in one.lower().replace(b"update", b"")


def test_settings_of_the_user_do_not_matter_and_come_back() -> None:
    with matplotlib.rc_context({"lines.linewidth": 9.0, "axes.facecolor": "black", "text.usetex": True}):
        with own_settings():
            figure = draw_losses(losses(aligned=line(hump(0.2))))
        assert matplotlib.rcParams["lines.linewidth"] == 9.0
    assert figure.axes[0].get_facecolor()[:3] == (1.0, 1.0, 1.0)


def test_pyplot_knows_nothing_of_our_figures() -> None:
    from matplotlib import pyplot

    draw_losses(losses(aligned=line(hump(0.2))))
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("name", ["org/a", "costs $5 and $6", "a_{b}^c", "x" * 200, "words " * 60])
def test_the_heading_says_everything_and_stays_inside(name: str) -> None:
    heading = Heading(title=name, models=(name, "org/b"), measured="held_out.txt, 800 tokens")
    figure = canvas(heading, "t = 0, 1", 7.2, 3.0)
    figure.subplots().set_title("plot")
    figure.draw_without_rendering()
    said = "".join("".join(text.get_text().split()) for text in figure.texts)
    assert all("".join(part.split()) in said for part in (name, "A: org/a"[:2], "B: org/b", heading.measured, "t = 0, 1"))
    boxes = [text.get_window_extent() for text in figure.texts]
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert min(box.y0 for box in boxes) >= figure.axes[0].title.get_window_extent().y1


def test_models_are_named_once() -> None:
    plain = Heading(title="org/a to org/b", models=("org/a", "org/b"), measured="x")
    said = [[text.get_text() for text in canvas(heading, "", 7, 3).texts][1] for heading in (plain, HEADING)]
    assert "A: org/a" not in said[0] and "A: org/a" in said[1]
