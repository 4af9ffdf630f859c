"""The loss along each path, and below it the excess over the straight line between the ends."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from hf_moe_lmc.plots.style import GREY, OTHER, STYLES, canvas, grid
from hf_moe_lmc.plots.values import Floats, Line, Losses, points_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SPAN = 1e-4  # nats per token that an axis shows at least; less is rounding
WIDTH = 2.0  # points; curves that are never further apart coincide
MANY = 30  # points, where marks become smaller


def draw_losses(losses: Losses) -> Figure:
    """Above, the loss with both ends; below, the excess with its pointwise paired intervals, which are nothing at the ends."""
    points = points_in_words(max((line.t for line in losses.lines.values()), key=len))
    figure = canvas(losses.heading, points, 7.2, 6.0)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
    for name, line in losses.lines.items():
        _draw(above, name, line, line.nll, line.best, label=f"{name}: {line.label}")
        _draw(below, name, line, line.excess, line.peak)
        _band(below, name, line)
    _ends(above, losses)
    below.axhline(0, linestyle=":", color="black", linewidth=1.4, zorder=2)
    _missing(above, losses.lines)
    for axes in (above, below):
        grid(axes)
        axes.margins(y=0.16)
        axes.ticklabel_format(axis="y", useOffset=False)
        _widen(axes)
    above.set_ylabel("loss (nats per token)")
    below.set_ylabel("excess over the line\n(nats per token)")
    below.set_xlabel("t   (0 is A, 1 is B)")
    below.set_xlim(-0.03, 1.03)
    if not np.isfinite(losses.ends).all():
        below.set_yticks([])
        below.text(0.5, 0.5, "no line: the loss of an end is not finite", ha="center", va="bottom", transform=below.transAxes)
    _legend(figure, above, below, losses)
    return figure


def _draw(axes: Axes, name: str, line: Line, values: object, filled: int | None, label: str | None = None) -> None:
    """A curve with open marks; the mark of one point is filled."""
    style, y = STYLES.get(name, OTHER), _finite(values)
    size = 5.0 if len(line.t) <= MANY else 3.0
    axes.plot(
        line.t, y, style.dash[0], linewidth=style.width, color=style.colour, marker=style.marker[0], markersize=size,
        markerfacecolor="white", markeredgewidth=1.0, label=label, gid=name, zorder=style.order,
    )  # fmt: skip
    if filled is not None:
        axes.plot(
            line.t[filled], y[filled], style.marker[0], color=style.colour, markersize=8.5, markeredgecolor="black",
            gid=f"{name} mark", zorder=style.order + 1,
        )  # fmt: skip


def _band(axes: Axes, name: str, line: Line) -> None:
    if not line.band:
        return
    style = STYLES.get(name, OTHER)
    low, high = _finite(line.band).T
    axes.fill_between(line.t, low, high, color=style.colour, alpha=0.22, linewidth=0, gid=f"{name} band", zorder=1)
    for edge in (low, high):
        axes.plot(line.t, edge, style.dash[0], color=style.colour, linewidth=0.7, alpha=0.8, zorder=1.5)


def _ends(axes: Axes, losses: Losses) -> None:
    """Both models, the line between them, and the height of the better one; letters on the side without curves."""
    ends = losses.ends
    excess = _finite([x for line in losses.lines.values() for x in line.excess])
    side = -1 if np.nansum(excess) >= 0 else 1
    axes.plot((0, 1), _finite(ends), ":", color="black", linewidth=1.4, label="straight line between the ends", zorder=2)
    if np.isfinite(ends).all():
        better = min(ends)
        axes.axhline(better, color=GREY, linewidth=0.8, label=f"the better end: {better:.4g}", zorder=1)
    axes.plot((0, 1), _finite(ends), "D", color="black", markersize=7, zorder=5, clip_on=False)
    for t, loss, name in zip((0, 1), ends, "AB", strict=True):
        if np.isfinite(loss):
            axes.annotate(
                name, (t, loss), (0, 8 * side), textcoords="offset points", ha="center", weight="bold", zorder=6,
                va="top" if side < 0 else "bottom",
            )  # fmt: skip


def _missing(axes: Axes, lines: Mapping[str, Line]) -> None:
    """Crosses along the upper edge where a loss is not finite."""
    at = sorted({t for line in lines.values() for t in line.missing})
    if at:
        axes.plot(
            at, [0.96] * len(at), "x", color="black", markersize=7, markeredgewidth=1.8, transform=axes.get_xaxis_transform(),
            label="loss not finite", gid="missing", zorder=5,
        )  # fmt: skip


def _widen(axes: Axes) -> None:
    """An axis does not blow up rounding errors."""
    low, high = axes.get_ylim()
    lacking = LEAST_SPAN - (high - low)
    if lacking > 0:
        axes.set_ylim(low - lacking / 2, high + lacking / 2)


def _legend(figure: Figure, above: Axes, below: Axes, losses: Losses) -> None:
    from matplotlib.lines import Line2D

    handles, labels = above.get_legend_handles_labels()
    for note in coinciding(figure, below, losses.lines):
        handles.append(Line2D([], [], linestyle="none"))
        labels.append(note)
    figure.legend(
        handles, labels, loc="outside lower left", frameon=False, fontsize="small", handlelength=3.2,
        title=f"nats per token; {losses.sure}\nfilled: the least loss (above), the barrier (below)", title_fontsize="small",
        alignment="left",
    )  # fmt: skip


def coinciding(figure: Figure, axes: Axes, lines: Mapping[str, Line]) -> list[str]:
    """Which curves lie within the width of a line of each other, in words: at all inner points, or at more than half."""
    figure.draw_without_rendering()  # lays out: only then is known how long a nat is
    low, high = axes.get_ylim()
    nats = WIDTH * (high - low) / (axes.get_window_extent().height * 72 / figure.dpi)
    notes = []
    for (one, first), (other, second) in combinations(lines.items(), 2):
        shared = [t for t in first.t if 0 < t < 1 and t in second.t]
        apart = [abs(first.excess[first.t.index(t)] - second.excess[second.t.index(t)]) for t in shared]
        close = sum(distance <= nats for distance in apart)
        if close > len(shared) / 2:
            where = "" if close == len(shared) else f" at {close} of {len(shared)} inner points"
            notes.append(f"{one} and {other} coincide{where}: they differ by less than a line is wide")
    return notes


def _finite(values: object) -> Floats:
    """As an array, with nan for what is not finite."""
    found = np.asarray(values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)
