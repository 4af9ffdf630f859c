"""How plots look: colours, the heading above them, ticks, and the files that they become.

Each colour comes with a marker and a line of its own, and differs from the others in lightness, so that the colour-blind
and a grey print tell them apart. Colours of Okabe and Ito, where they do.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_moe_lmc.plots.values import Floats, Heading

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE, GREY = "#004D80", "#D55E00", "#3CB371", "#E69F00", "#595959"
SHARES = "cividis"  # from 0 to 1: perceptually uniform, and the same to the colour-blind
LOAD_EDGES = (0.25, 0.5, 0.8, 0.9, 1.1, 1.2, 2.0, 4.0)  # of the load over an even share
LOAD_LABELS = ("1/4", "1/2", "0.8", "0.9", "1.1", "1.2", "2", "4")
# Blue below an even share, grey at it, yellow above; ever lighter, so that grey print keeps the order.
LOAD_COLOURS = ("#05142E", "#17468A", "#4279BF", "#8AABD3", "#C2C2C2", "#E3C984", "#F5D03C", "#FAE878", "#FFFDD8")
NO_EXPERT = "xxxx"  # hatching
TITLE_SIZE, NOTE_SIZE = 11, 8.5  # points
NARROW = 20  # letters that may fit an inch, if all are narrow
DPI = 160


@dataclass(frozen=True)
class Style:
    """How the line of a path is drawn: paths in front are thinner and broken, so that one behind them still shows.

    Attributes:
        width: of the line, points.
        dash: as Matplotlib and as Plotly name it.
        marker: as Matplotlib and as Plotly name it.
        order: lines of higher order are in front.
    """

    colour: str
    width: float
    dash: tuple[str, str]
    marker: tuple[str, str]
    order: float


STYLES = {
    "aligned": Style(BLUE, 2.8, ("-", "solid"), ("s", "square"), 3.0),
    "naive": Style(VERMILION, 1.5, ("--", "dash"), ("o", "circle"), 3.2),
}
OTHER = Style(GREEN, 1.5, ("-.", "dashdot"), ("^", "triangle-up"), 3.1)


def canvas(heading: Heading, points: str, width: float, height: float) -> Figure:
    """An empty figure below its heading: the finding, the models, then text and points of t.

    Args:
        width, height: of the plot below the heading, inches.
    """
    from matplotlib.figure import Figure

    title, notes = heading_lines(heading, points, width)
    above = 0.12 + 0.2 * len(title) + 0.165 * len(notes)
    figure = Figure(figsize=(width, height + above))
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - above / (height + above)))
    text: dict[str, Any] = {"ha": "left", "va": "top", "parse_math": False}
    left, down = 0.1 / width, 1 - 0.08 / (height + above)
    figure.text(left, down, "\n".join(title), fontsize=TITLE_SIZE, weight="bold", linespacing=1.2, **text)
    down -= 0.2 * len(title) / (height + above)
    figure.text(left, down, "\n".join(notes), fontsize=NOTE_SIZE, color=GREY, linespacing=1.3, **text)
    return figure


def heading_lines(heading: Heading, points: str, width: float) -> tuple[list[str], list[str]]:
    """Lines of the title and of the notes below it, wrapped to `width` inches."""
    a, b = heading.models
    notes = [f"A: {a}    B: {b}", f"{heading.measured}; {points}"]
    if heading.title == f"{a} to {b}":
        notes = notes[1:]
    room = 0.96 * width - 0.2  # letters on a screen are a little wider
    return _wrapped(heading.title, room, TITLE_SIZE, "bold"), [
        line for note in notes for line in _wrapped(note, room, NOTE_SIZE, "normal")
    ]


def _wrapped(text: str, width: float, size: float, weight: str) -> list[str]:
    """Lines that are at most `width` inches wide."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)

    def wide(line: str) -> bool:
        return bool(text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] > 72 * width)

    letters = min(len(text), int(NARROW * width))
    while any(map(wide, lines := textwrap.wrap(text, letters, break_on_hyphens=False))):
        letters -= 1
    return lines


def grid(axes: Axes) -> None:
    """Light lines behind the plot."""
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def ticks(axis: Axis, labels: Sequence[int], most: int) -> None:
    """Labels the places 0, 1, ... of an axis in round steps, at most `most` of them."""
    step = next(size * power for power in (1, 10, 100, 1000) for size in (1, 2, 4, 5) if len(labels) <= most * size * power)
    axis.set_ticks(range(0, len(labels), step), labels=[str(label) for label in labels[::step]])


def cell_edges(t: Sequence[float]) -> list[float]:
    """Borders of the cells around the points of a path: half-way between them."""
    if len(t) == 1:
        return [t[0] - 0.05, t[0] + 0.05]
    between = [(x + y) / 2 for x, y in pairwise(t)]
    return [2 * t[0] - between[0], *between, 2 * t[-1] - between[-1]]


def write_numbers(axes: Axes, across: Sequence[float], values: Floats, ink: Callable[[float], str], form: str) -> None:
    """Writes the value into each cell of a map [row, column]."""
    for row, column in np.ndindex(*values.shape):
        value = float(values[row, column])
        if np.isfinite(value):
            axes.text(
                across[column], row, form.format(value), ha="center", va="center", fontsize="small", color=ink(value)
            )  # fmt: skip


@contextmanager
def own_settings() -> Iterator[None]:
    """Within it, Matplotlib's own defaults hold, whatever the user has set; equal figures give equal files."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "hf_moe_lmc"
        yield


def save(figure: Figure, path: Path) -> None:
    """Writes PATH.png and PATH.svg, whatever the suffix of `path`; the same figure gives the same files."""
    with own_settings():
        figure.savefig(path.with_suffix(".png"), dpi=DPI)
        figure.set_layout_engine("none")  # it has been laid out
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
