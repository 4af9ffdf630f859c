"""Maps of the routing along a path: agreement with both models, and the load of the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hf_moe_lmc.plots.style import (
    LOAD_COLOURS,
    LOAD_EDGES,
    LOAD_LABELS,
    NO_EXPERT,
    SHARES,
    canvas,
    cell_edges,
    ticks,
    write_numbers,
)
from hf_moe_lmc.plots.values import Floats, Routing, points_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SIDE_BY_SIDE = 48  # experts of the widest panel that has others beside it
ROW, FEWEST_ROWS = 0.075, 1.5  # inches of a layer, and of a panel at least
FEW = 60  # cells that have room for their numbers


def draw_agreement(routing: Routing) -> Figure:
    """Two maps of layer over t: the share of a token's chosen experts that A, and that B, would choose as well."""
    count, t = len(routing.layers), routing.t
    figure = canvas(routing.heading, f"{routing.path} path, {points_in_words(t)}", 8.4, min(max(2.6, 0.16 * count + 1.2), 8))
    edges, even = cell_edges(t), len(t) < 3 or np.ptp(np.diff(t)) < 1e-6
    both = figure.subplots(1, 2, sharey=True)
    for axes, values, name in zip(both, (routing.to_a, routing.to_b), "AB", strict=True):
        image = axes.pcolormesh(edges, np.arange(count + 1) - 0.5, values.T, cmap=SHARES, vmin=0, vmax=1, rasterized=True)
        axes.set_title(f"agreement with {name}", fontsize="medium")
        axes.set_xlabel("t   (0 is A, 1 is B)")
        ticks(axes.yaxis, routing.layers, 12)
        at = t if even and len(t) <= 7 else np.linspace(t[0], t[-1], 5)
        axes.set_xticks(at, [f"{x:.3g}" for x in at])
        axes.set_xlim(edges[0], edges[-1])
        if even and len(t) <= 9 and count <= 12:
            write_numbers(axes, t, values.T, lambda share: "black" if share > 0.55 else "white", "{:.2f}")
    both[0].set_ylabel("layer")
    figure.colorbar(image, ax=both, label="share of top-k experts")
    return figure


def draw_load(routing: Routing) -> Figure:
    """Maps of expert over layer at both ends and in the middle of the path: the tokens of an expert over an even share.

    Panels stand side by side, or with many experts below each other.
    """
    count, experts = routing.load.shape[1:]
    middle = min(range(len(routing.t)), key=lambda i: abs(routing.t[i] - 0.5))
    shown = sorted({0, middle, len(routing.t) - 1})
    wide = experts > SIDE_BY_SIDE
    panel = min(max(FEWEST_ROWS, (ROW if wide else 0.16) * count), 6.5)
    size = (8.6, (panel + 0.35) * len(shown) + 0.5) if wide else (min(2.7 * len(shown) + 1.5, 9.6), panel + 1.0)
    figure = canvas(routing.heading, f"{routing.path} path, {points_in_words([routing.t[i] for i in shown])}", *size)
    rows, columns = (len(shown), 1) if wide else (1, len(shown))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, i in zip(panels, shown, strict=True):
        image = _load_map(axes, routing.relative[i])
        axes.set_title(f"t = {routing.t[i]:.3g}", fontsize="medium")
        ticks(axes.xaxis, range(experts), 16 if wide else 7)
        ticks(axes.yaxis, routing.layers, 12)
    for axes in panels if wide else panels[:1]:
        axes.set_ylabel("layer")
    for axes in panels[-1:] if wide else panels:
        axes.set_xlabel("expert")
    bar = figure.colorbar(
        image, ax=panels, label="load over an even share", extend="both", extendfrac=1 / 7, spacing="uniform",
        **({"shrink": min(1.0, 4 / size[1])} if wide else {}),
    )  # fmt: skip
    bar.set_ticks(LOAD_EDGES, labels=LOAD_LABELS)
    bar.minorticks_off()
    return figure


def _load_map(axes: Axes, relative: Floats) -> AxesImage:
    """[layer, expert] -> cells in steps of colour; places without an expert are hatched."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap(LOAD_COLOURS).with_extremes(bad=(0, 0, 0, 0))
    axes.patch.set(hatch=NO_EXPERT, edgecolor="silver")
    norm = BoundaryNorm(LOAD_EDGES, len(LOAD_COLOURS), extend="both")
    image = axes.imshow(relative, origin="lower", aspect="auto", cmap=colours, norm=norm, interpolation="none")
    if relative.size <= FEW:
        write_numbers(
            axes, range(relative.shape[1]), relative, lambda load: "white" if load < 0.5 else "black", "{:.2f}"
        )  # fmt: skip
    return image
