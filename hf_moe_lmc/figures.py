"""Plots: the loss along a path, what each layer adds to the barrier, where the router sends tokens on the way.

All take arrays, know nothing of models, and return a figure for `save`. Colours are those of Okabe and Ito; what colour says
is said once more by marker, line style or hatching, so that a black-and-white print can be read, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
STYLES = {  # colour, marker, line, hatching of the band
    "naive": (VERMILION, "o", "--", r"\\\\\\"),
    "aligned": (BLUE, "s", "-", "//////"),
}
OTHER = (GREEN, "^", "-.", "....")
HEAT = "cividis"  # even in lightness, and the same to the colour-blind

Bounds = tuple[float, float] | None  # of an interval


@dataclass(frozen=True)
class Line:
    """One path: losses in nats per token at t, a pointwise interval where it is known, the barrier and its interval."""

    t: Sequence[float]
    nll: Sequence[float]
    band: Sequence[Bounds]
    barrier: float
    interval: Bounds


def curve(lines: Mapping[str, Line], title: str, level: float = 0.95) -> Figure:
    """The loss along each path with its pointwise interval, both ends, and the straight line between them."""
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
    """The barrier when one layer alone goes from A to B, or those of a range together: a bar as wide as the range.

    Args:
        values: (first, last) layer -> barrier and the ends of its interval (nan where unknown), nats per token.
        whole: barrier of the whole aligned path, to compare with.
    """
    lowest, highest = min(first for first, _ in values), max(last for _, last in values)
    figure, axes = _figure(min(max(4.5, 0.34 * (highest - lowest + 1) + 2), 11), 4.0)
    for kind, (color, hatch, depth) in {"one layer": (BLUE, "///", 2), "a range of layers": (GREEN, "..", 1)}.items():
        spans = [span for span in sorted(values) if (span[0] == span[1]) == (depth == 2)]
        if not spans:
            continue
        barrier, low, high = np.array([values[span] for span in spans], dtype=float).T
        middle, width = np.array([((last + first) / 2, last - first + 0.75) for first, last in spans]).T
        axes.bar(
            middle, barrier, width, color=color, alpha=0.55 if depth == 2 else 0.25, edgecolor="black", hatch=hatch,
            linewidth=0.8, zorder=depth, label=kind,
        )  # fmt: skip
        axes.errorbar(
            middle, barrier, [np.maximum(barrier - low, 0), np.maximum(high - barrier, 0)], fmt="none",
            ecolor="black", elinewidth=1.3, capsize=3 if highest - lowest < 40 else 1.5, zorder=3,
        )  # fmt: skip
        for (first, last), at, top in zip(spans, middle, np.fmax(high, barrier), strict=True):
            if depth == 1 and np.isfinite(top):
                axes.annotate(span(first, last), (at, top), (0, 3), textcoords="offset points", ha="center", fontsize="small")
    if whole is not None and np.isfinite(whole):
        axes.axhline(whole, color=VERMILION, linestyle="--", linewidth=1.3, label=f"the whole model: {whole:.3g}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    axes.set_xticks(range(lowest, highest + 1, max(1, -(-(highest - lowest + 1) // 24))))
    axes.set_xlim(lowest - 0.8, highest + 0.8)
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("what is interpolated: layer")
    axes.set_ylabel("barrier (nats per token)")
    axes.set_title(title, fontsize="medium")
    return figure


def span(first: int, last: int) -> str:
    """Layers in words: 8, or 0-3."""
    return str(first) if first == last else f"{first}-{last}"


def agreement(t: Sequence[float], layers: Sequence[int], to_a: NDArray[Any], to_b: NDArray[Any], title: str) -> Figure:
    """Two heat maps of layer over t: the share of a token's chosen experts that A, and that B, would choose as well.

    Args:
        to_a, to_b: [point, layer], from 0 to 1; nan where it was not recorded.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, min(max(2.8, 0.16 * len(layers) + 1.6), 8)), layout="constrained")
    both = figure.subplots(1, 2, sharey=True)
    for axes, values, name in zip(both, (to_a, to_b), "AB", strict=True):
        image = axes.imshow(
            np.asarray(values, dtype=float).T, origin="lower", aspect="auto", cmap=HEAT, vmin=0, vmax=1, interpolation="nearest"
        )
        axes.set_title(f"agreement with {name}", fontsize="medium")
        axes.set_xlabel("t   (0 is A, 1 is B)")
        _ticks(axes, t, layers)
        if len(t) * len(layers) <= 120:
            _numbers(axes, np.asarray(values, dtype=float).T, 0.55, "{:.2f}")
    both[0].set_ylabel("layer")
    figure.colorbar(image, ax=both, label="share of the top-k experts")
    figure.suptitle(title, fontsize="medium")
    return figure


def load(loads: Mapping[float, NDArray[Any]], layers: Sequence[int], title: str) -> Figure:
    """Heat maps of expert over layer, one for each t: how much of the tokens an expert gets, relative to an even share.

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
        _ticks(axes, range(shares.shape[1]), layers)
        if shares.size <= 60:
            _numbers(axes, relative, 0.9, "{:.1f}")
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
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _ticks(axes: Axes, across: Sequence[float], layers: Sequence[int]) -> None:
    """Labels at most seven columns and twelve rows of a heat map."""
    for axis, labels, most in ((axes.xaxis, across, 7), (axes.yaxis, layers, 12)):
        step = max(1, -(-len(labels) // most))
        places = list(range(0, len(labels), step))
        if step > 1 and labels[-1] == 1:  # t: both ends of the path are worth a label
            places = sorted({round(i) for i in np.linspace(0, len(labels) - 1, 5)})
        axis.set_ticks(places, labels=[f"{labels[i]:.3g}" for i in places])


def _numbers(axes: Axes, values: NDArray[Any], middle: float, form: str) -> None:
    """Writes the value into each cell, legible on dark and on light."""
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        if np.isfinite(value):
            ink = "black" if value > middle else "white"
            axes.text(column, row, form.format(value), ha="center", va="center", fontsize="x-small", color=ink)
