"""The barriers of paths on which some layers alone are interpolated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hf_moe_lmc.plots.style import BLUE, GREY, ORANGE, VERMILION, canvas, grid, ticks
from hf_moe_lmc.plots.values import Layers, Span, layers_in_words, points_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LISTED = 6  # ranges that the legend names
LEAST = 1e-3  # nats per token, where all is zero


def draw_layers(layers: Layers) -> Figure:
    """A bar for each layer alone, and beside them, on the same scale, a bar for each range of layers together.

    A mark stands on every bar, so that a barrier of zero shows as well.
    """
    top = layers.highest or LEAST
    groups = [group for group in (layers.singles, layers.ranges) if group]
    widths = [_width(group) for group in groups]
    figure = canvas(layers.heading, points_in_words(layers.t), min(max(6.4, sum(widths) + 1.2), 11), 4.4)
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, group in zip(panels, groups, strict=True):
        alone = group == layers.singles
        _bars(axes, layers, group, BLUE if alone else ORANGE, _label(layers, alone=alone))
        axes.axhline(layers.whole, color=VERMILION, linestyle="--", linewidth=1.5, label=layers.whole_label, zorder=4)
        grid(axes)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("layer" if alone else "range of layers")
    panels[0].set_ylim(-0.04 * top, 1.12 * top)  # the marks of zeros are whole
    panels[0].set_ylabel("barrier (nats per token)")
    _legend(figure, panels, layers)
    return figure


def _width(group: Sequence[Span]) -> float:
    """Inches of a panel."""
    return max(1.6, 0.17 * len(group)) if group[0][0] == group[0][1] else max(1.4, 0.34 * len(group))


def _label(layers: Layers, *, alone: bool) -> str:
    if alone:
        return "one layer alone"
    named = [layers_in_words(*span) for span in layers.ranges]
    more = f" and {len(named) - LISTED} more" if len(named) > LISTED else ""
    return f"layers of a range together: {', '.join(named[:LISTED])}{more}"


def _bars(axes: Axes, layers: Layers, group: Sequence[Span], colour: str, label: str) -> None:
    at = np.arange(len(group))
    barrier = np.array([layers.barriers[span] for span in group])
    low, high = np.array([layers.intervals[span] or (np.nan, np.nan) for span in group]).T
    axes.bar(at, np.nan_to_num(barrier, posinf=0.0), width=0.72, color=colour, alpha=0.6, label=label)
    axes.errorbar(
        at, barrier, [np.maximum(barrier - low, 0), np.maximum(high - barrier, 0)], fmt="none", ecolor="black",
        elinewidth=1.3, capsize=3 if len(group) < 40 else 1.5, zorder=3,
    )  # fmt: skip
    size = 5 if len(group) < 40 else 4
    axes.plot(
        at, barrier, "D", color=colour, markersize=size, markeredgecolor="black", markeredgewidth=0.8, gid="marks", zorder=3.5
    )  # fmt: skip
    missing = at[~np.isfinite(barrier)]
    if len(missing):
        axes.plot(missing, np.zeros(len(missing)), "x", color="black", markersize=7, label="loss not finite", gid="missing")
    if group[0][0] == group[0][1]:
        ticks(axes.xaxis, [first for first, _ in group], 24)
    else:
        steep = len(group) > 5
        axes.set_xticks(at, [layers_in_words(*span) for span in group], rotation=60 if steep else 0)
    axes.set_xlim(-0.8, len(group) - 0.2)


def _legend(figure: Figure, panels: Sequence[Axes], layers: Layers) -> None:
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    legend = figure.legend(
        list(found.values()), list(found), loc="outside lower left", frameon=False, fontsize="small", title=layers.sure,
        title_fontsize="small", alignment="left",
    )  # fmt: skip
    legend.get_title().set_color(GREY)
