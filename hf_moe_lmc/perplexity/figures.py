"""Plots: the loss along a path, the barriers of single layers, and the routing along the path.

All functions take plain values and return a figure for `save`. Colours are those of Okabe and Ito. Each colour comes with a
marker, line style or hatching of its own, so that a black-and-white print can be read as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
STYLES = {  # colour, marker, line, hatching of the band
    "naive": (VERMILION, "o", "--", r"\\\\\\"),
    "aligned": (BLUE, "s", "-", "//////"),
}
OTHER = (GREEN, "^", "-.", "....")
HEAT = "cividis"  # perceptually uniform, and the same to the colour-blind

Bounds = tuple[float, float] | None  # low and high of an interval; None: not known


@dataclass(frozen=True)
class Line:
    """One path to plot; all in nats per token.

    Attributes:
        t: its points, ascending from 0 to 1.
        nll: losses at these.
        band: pointwise intervals of the losses.
        barrier, interval: the barrier and its interval.
    """

    t: Sequence[float]
    nll: Sequence[float]
    band: Sequence[Bounds]
    barrier: float
    interval: Bounds


def curve(lines: Mapping[str, Line], title: str, level: float = 0.95) -> Figure:
    """The loss along each path with its pointwise interval, both ends, and the straight line between them.

    Args:
        lines: by path name.
        level: confidence level of the intervals.
    """
    figure, axes = _figure(6.8, 4.8)
    for name, line in lines.items():
        color, marker, style, hatch = STYLES.get(name, OTHER)
        label = f"{name}: barrier {line.barrier:.3g}"
        if line.interval is not None:
            label += f" [{line.interval[0]:.3g}, {line.interval[1]:.3g}]"
        low, high = np.array([bounds or (np.nan, np.nan) for bounds in line.band], dtype=float).T
        axes.fill_between(line.t, low, high, facecolor=color, alpha=0.15, linewidth=0)
        axes.fill_between(line.t, low, high, facecolor="none", edgecolor=color, alpha=0.22, hatch=hatch, linewidth=0)
        axes.plot(
            line.t, line.nll, style, marker=marker, markersize=4.5, markerfacecolor="white", color=color, label=label, zorder=3
        )  # fmt: skip
    ends = [max((line.nll[i] for line in lines.values()), key=lambda loss: (np.isfinite(loss), loss)) for i in (0, -1)]
    ends = [next(iter(lines.values())).nll[i] for i in (0, -1)] if not np.isfinite(ends).all() else ends
    axes.plot((0, 1), ends, ":", color="black", linewidth=1.2, label="straight line between the ends", zorder=2)
    axes.plot((0, 1), ends, "D", color="black", markersize=7, zorder=4)
    for t, loss, name in zip((0, 1), ends, "AB", strict=True):
        axes.annotate(name, (t, loss), (0, -9), textcoords="offset points", ha="center", va="top", weight="bold")
    axes.set_xlabel("t   (0 is A, 1 is B)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(-0.04, 1.04)
    axes.margins(y=0.1)
    axes.set_title(title, fontsize="medium")
    known = any(bounds is not None for line in lines.values() for bounds in line.band)
    heading = f"barriers in nats per token; bands and brackets: {100 * level:g} % intervals" if known else None
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small", title=heading, title_fontsize="small")
    return figure


def layerwise(values: Mapping[tuple[int, int], tuple[float, float, float]], title: str, whole: float | None = None) -> Figure:
    """The barriers of paths on which some layers alone are interpolated: bars for one layer, lines for a range.

    Args:
        values: (first, last) layer -> barrier and the ends of its interval (nan where unknown), nats per token.
        whole: barrier of the whole aligned path, to compare with.
    """
    lowest, highest = min(first for first, _ in values), max(last for _, last in values)
    count = highest - lowest + 1
    figure, axes = _figure(min(max(4.8, 0.34 * count + 2), 11), 4.2)
    if singles := {first: values[first, last] for first, last in sorted(values) if first == last}:
        barrier, low, high = np.array(list(singles.values()), dtype=float).T
        axes.bar(
            list(singles), barrier, width=0.75, color=BLUE, alpha=0.55, edgecolor="black", hatch="///", linewidth=0.8,
            label="one layer",
        )  # fmt: skip
        axes.errorbar(
            list(singles), barrier, [np.maximum(barrier - low, 0), np.maximum(high - barrier, 0)], fmt="none",
            ecolor="black", elinewidth=1.3, capsize=3 if count < 40 else 1.5,
        )  # fmt: skip
    for first, last in (ranges := [span for span in sorted(values) if span[0] != span[1]]):
        barrier, low, high = values[first, last]
        across = (first - 0.4, last + 0.4)
        axes.fill_between(
            across, low, high, facecolor=ORANGE, alpha=0.35, edgecolor="black", hatch="....", linewidth=0, zorder=3
        )
        label = "the layers of a range together" if (first, last) == ranges[0] else None
        axes.plot(across, (barrier, barrier), "|-", color="black", linewidth=2, markersize=9, zorder=4, label=label)
        top = np.nanmax([barrier, high]) if np.isfinite([barrier, high]).any() else 0
        axes.annotate(
            span(first, last), ((first + last) / 2, top), (0, 3), textcoords="offset points", ha="center", fontsize="small",
            bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}, zorder=5,
        )  # fmt: skip
    if whole is not None and np.isfinite(whole):
        axes.axhline(whole, color=VERMILION, linestyle="--", linewidth=1.3, label=f"the whole model: {whole:.3g}")
    figure.legend(loc="outside lower center", ncols=3 if count > 12 else 1, frameon=False, fontsize="small")
    _ticks(axes.xaxis, range(lowest, highest + 1), 24, first=lowest)
    axes.set_xlim(lowest - 0.8, highest + 0.8)
    axes.margins(y=0.14)
    axes.set_ylim(bottom=0)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer that is interpolated")
    axes.set_ylabel("barrier (nats per token)")
    axes.set_title(title, fontsize="medium")
    return figure


def span(first: int, last: int) -> str:
    """Layers in words.

    Example:
        >>> span(8, 8), span(0, 3)
        ('8', '0-3')
    """
    return str(first) if first == last else f"{first}-{last}"


def agreement(t: Sequence[float], layers: Sequence[int], to_a: NDArray[Any], to_b: NDArray[Any], title: str) -> Figure:
    """Two heat maps of layer over t: the share of a token's chosen experts that A, and that B, would choose as well.

    Args:
        layers: numbers of the layers.
        to_a, to_b: [point, layer], from 0 to 1; nan: not recorded.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, min(max(2.8, 0.16 * len(layers) + 1.6), 8)), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    between = [(x + y) / 2 for x, y in pairwise(t)] or [t[0] - 0.05, t[0] + 0.05]
    edges = between if len(t) == 1 else [2 * t[0] - between[0], *between, 2 * t[-1] - between[-1]]
    even = np.ptp(np.diff(t)) < 1e-6 if len(t) > 1 else True
    for axes, values, name in zip(both, (to_a, to_b), "AB", strict=True):
        shares = np.asarray(values, dtype=float).T
        image = axes.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, shares, cmap=HEAT, vmin=0, vmax=1, rasterized=True)
        axes.set_title(f"agreement with {name}", fontsize="medium")
        axes.set_xlabel("t   (0 is A, 1 is B)")
        _ticks(axes.yaxis, layers, 12)
        at = t if even and len(t) <= 7 else np.linspace(t[0], t[-1], 5)
        axes.set_xticks(at, [f"{x:.3g}" for x in at])
        axes.set_xlim(edges[0], edges[-1])
        if even and len(t) <= 9 and len(layers) <= 12:
            _numbers(axes, t, shares, 0.55, "{:.2f}")
    both[0].set_ylabel("layer")
    figure.colorbar(image, ax=both, label="share of the top-k experts")
    figure.suptitle(title, fontsize="medium")
    return figure


def load(loads: Mapping[float, NDArray[Any]], layers: Sequence[int], title: str) -> Figure:
    """Heat maps of expert over layer, a map for each t: the tokens of an expert, relative to an even share.

    Args:
        loads: t -> [layer, expert], shares that add up to 1 in each layer; nan where there is no such expert.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(loads) + 1.6, min(max(2.8, 0.16 * len(layers) + 1.6), 8)), layout="constrained")
    panels = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for axes, (t, values) in zip(panels, sorted(loads.items()), strict=True):
        shares = np.asarray(values, dtype=float)
        relative = shares * np.isfinite(shares).sum(axis=1, keepdims=True)
        image = axes.imshow(
            np.where(np.isfinite(relative), np.clip(relative, 0.25, 4), np.nan), origin="lower", aspect="auto", cmap=HEAT,
            norm=LogNorm(0.25, 4), interpolation="nearest",
        )  # fmt: skip
        axes.set_title(f"t = {t:.3g}", fontsize="medium")
        axes.set_xlabel("expert")
        _ticks(axes.xaxis, range(shares.shape[1]), 7)
        _ticks(axes.yaxis, layers, 12)
        if shares.size <= 60:
            _numbers(axes, range(shares.shape[1]), relative, 0.9, "{:.1f}")
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=panels, label="load relative to an even share", extend="both")
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1", "2", "4"])
    bar.minorticks_off()
    figure.suptitle(title, fontsize="medium")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes PATH.png and PATH.svg, whatever the suffix of `path`; the same figure gives the same files."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "hf_moe_lmc"}):
        figure.savefig(path.with_suffix(".png"), dpi=160)
        figure.set_layout_engine("none")  # it has been laid out
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _ticks(axis: Axis, labels: Sequence[int], most: int, first: int = 0) -> None:
    """Labels the places `first`, `first` + 1, ... of an axis in round steps, at most `most` of them."""
    step = next(size * power for power in (1, 10, 100, 1000) for size in (1, 2, 4, 5) if len(labels) <= most * size * power)
    axis.set_ticks([first + i for i in range(0, len(labels), step)], labels=[str(label) for label in labels[::step]])


def _numbers(axes: Axes, across: Sequence[float], values: NDArray[Any], middle: float, form: str) -> None:
    """Writes the value into each cell, legible on dark and on light."""
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if np.isfinite(value):
            ink = "black" if value > middle else "white"
            axes.text(across[column], row, form.format(value), ha="center", va="center", fontsize="x-small", color=ink)
