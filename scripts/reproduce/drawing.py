"""Figures 1 and 2 of the paper: the loss along the path, for each gating and place."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from hf_moe_lmc.plots.style import BLUE, GREEN, GREY, VERMILION, grid, own_settings

from .tables import GATINGS, Cell, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = {
    "naive": ("naive", VERMILION, "--", 1.4),
    "order_skipped": ("order skipped", GREY, ":", 1.2),
    "gate": ("aligned, gate order", GREEN, "-.", 1.4),
    "expert": ("aligned, Gram order", BLUE, "-", 1.6),
}


def draw(results: Results, data: str, path: Path) -> None:
    """Writes an SVG: rows are gatings, columns places. Lines are means over the pairs, thin ones single pairs."""
    from matplotlib.figure import Figure

    cells = {(cell["gating"], cell["place"]): cell for cell in results.cells("places") if cell["data"] == data}
    gatings, places = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    with own_settings():
        import matplotlib

        matplotlib.rcParams["svg.fonttype"] = "none"
        figure = Figure(figsize=(8.4, 2.0 * len(gatings) + 0.6), layout="constrained")
        every = figure.subplots(len(gatings), len(places), squeeze=False, sharex=True)
        for (gating, place), cell in cells.items():
            axes = every[gatings.index(gating)][places.index(place)]
            _curves(axes, cell)
            axes.set_title(f"{GATINGS[gating]}, {place}", fontsize=9)
        for row in every:
            row[0].set_ylabel("loss, nats", fontsize=8)
        for axes in every[-1]:
            axes.set_xlabel("t (0 is A, 1 is B)", fontsize=8)
        handles, labels = every[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES), frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def _curves(axes: Axes, cell: Cell) -> None:
    for name, (label, colour, dash, width) in LINES.items():
        curves = [pair["paths"][name]["loss"] for pair in cell["pairs"]]
        t = [i / (len(curves[0]) - 1) for i in range(len(curves[0]))]
        for one in curves if len(curves) > 1 else []:
            axes.plot(t, one, dash, color=colour, linewidth=0.5, alpha=0.5)
        middle = [mean(point) for point in zip(*curves, strict=True)]
        axes.plot(t, middle, dash, color=colour, linewidth=width, label=label)
    grid(axes)
    axes.tick_params(labelsize=7)
