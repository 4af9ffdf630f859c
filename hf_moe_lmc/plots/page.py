"""One page of HTML with all plots of a measurement, to hover over and zoom into. It holds Plotly's own code: no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_moe_lmc.plots.style import BLUE, GREY, LOAD_COLOURS, LOAD_EDGES, LOAD_LABELS, ORANGE, OTHER, STYLES, VERMILION
from hf_moe_lmc.plots.values import Floats, Layers, Line, Losses, Routing, layers_in_words, points_in_words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 1000px; margin: 1em auto; padding: 0 1em; color: #222; }}
p {{ color: #444; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>A: {a}<br>B: {b}<br>{measured}; {points}</p>
{sections}
</body>
</html>
"""
SECTION = '<section id="{name}">\n<h2>{title}</h2>\n<p>{note}</p>\n{plot}\n</section>'
BAND = {"aligned": "rgba(0, 77, 128, 0.22)", "naive": "rgba(213, 94, 0, 0.22)"}
OTHER_BAND = "rgba(60, 179, 113, 0.22)"
ROW, SHORTEST = 12, 380  # pixels of a layer, and of a map at least

Section = tuple[str, str, str, "Figure"]  # name, title, note, plot


def render_page(losses: Losses, layers: Layers | None, routing: Sequence[Routing]) -> str:
    """The page as HTML; equal plots give equal text."""
    sections = [_losses(losses)]
    if layers is not None:
        sections.append(_layers(layers))
    for found in routing:
        sections += [_agreement(found), _load(found)]
    heading = losses.heading
    return PAGE.format(
        title=escape(heading.title),
        a=escape(heading.models[0]),
        b=escape(heading.models[1]),
        measured=escape(heading.measured),
        points=points_in_words(max((line.t for line in losses.lines.values()), key=len)),
        sections="\n".join(_html(sections)),
    )


def _html(sections: Sequence[Section]) -> Iterator[str]:
    """Each section; Plotly's code goes with the first."""
    for number, (name, title, note, figure) in enumerate(sections):
        plot = figure.to_html(
            full_html=False, include_plotlyjs=number == 0, div_id=f"{name}-plot", config={"displaylogo": False}
        )  # fmt: skip
        yield SECTION.format(name=name, title=escape(title), note=escape(note), plot=plot)


def _losses(losses: Losses) -> Section:
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.55, 0.45], vertical_spacing=0.04)
    for name, line in losses.lines.items():
        if line.band:
            figure.add_trace(_band(name, line), row=2, col=1)
        for row, values, what in ((1, line.nll, "loss"), (2, line.excess, "excess")):
            figure.add_trace(_curve(name, line, values, what, listed=row == 1), row=row, col=1)
    figure.add_trace(
        graph_objects.Scatter(
            x=[0, 1], y=_plain(losses.ends), mode="lines+markers+text", text=["A", "B"], name="straight line between the ends",
            textposition=["bottom right", "bottom left"], line={"dash": "dot", "color": "black"},
            marker={"symbol": "diamond", "size": 11}, hovertemplate="%{text}: %{y:.4f}<extra></extra>",
        ),
        row=1, col=1,
    )  # fmt: skip
    if np.isfinite(losses.ends).all():
        figure.add_hline(y=min(losses.ends), line={"color": GREY, "width": 1}, row=1, col=1)
    figure.add_hline(y=0, line={"dash": "dot", "color": "black"}, row=2, col=1)
    figure.update_yaxes(title="loss (nats per token)", row=1, col=1)
    figure.update_yaxes(title="excess over the line", row=2, col=1)
    figure.update_xaxes(title="t   (0 is A, 1 is B)", row=2, col=1)
    _layout(figure, 680, legend={"orientation": "h", "y": -0.12})
    return "loss", "Loss along the path", f"Nats per token; {_in_a_row(losses.sure)}.", figure


def _curve(name: str, line: Line, values: Sequence[float], what: str, *, listed: bool) -> Any:
    from plotly import graph_objects

    style = STYLES.get(name, OTHER)
    bounds = np.array(line.band) if line.band and what == "excess" else None
    return graph_objects.Scatter(
        x=list(line.t), y=_plain(values), mode="lines+markers", name=f"{name}: {line.label}", legendgroup=name,
        showlegend=listed, line={"color": style.colour, "width": style.width, "dash": style.dash[1]},
        marker={"symbol": style.marker[1], "size": 7, "color": "white", "line": {"color": style.colour, "width": 1.5}},
        customdata=bounds,
        hovertemplate=f"{name}<br>t = %{{x:.4g}}<br>{what} %{{y:.4f}}"
        + ("" if bounds is None else " [%{customdata[0]:.4f}, %{customdata[1]:.4f}]") + "<extra></extra>",
    )  # fmt: skip


def _band(name: str, line: Line) -> Any:
    """The band as one outline: there along its lower edge, back along the upper one."""
    from plotly import graph_objects

    known = [(t, low, high) for t, (low, high) in zip(line.t, line.band, strict=True) if np.isfinite([low, high]).all()]
    there, back = [(t, low) for t, low, _ in known], [(t, high) for t, _, high in reversed(known)]
    x, y = zip(*there, *back, strict=True) if known else ((), ())
    return graph_objects.Scatter(
        x=x, y=y, fill="toself", fillcolor=BAND.get(name, OTHER_BAND), line={"width": 0}, mode="lines", legendgroup=name,
        showlegend=False, hoverinfo="skip", name=f"{name} band",
    )  # fmt: skip


def _layers(layers: Layers) -> Section:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    for spans, name, colour in ((layers.singles, "one layer alone", BLUE), (layers.ranges, "layers of a range", ORANGE)):
        if not spans:
            continue
        barriers = np.array([layers.barriers[span] for span in spans])
        low, high = np.array([layers.intervals[span] or (np.nan, np.nan) for span in spans]).T
        words = [layers_in_words(*span) for span in spans]
        figure.add_trace(
            graph_objects.Bar(
                x=words, y=_plain(barriers), name=name, marker={"color": colour, "opacity": 0.6},
                error_y={"array": _plain(high - barriers), "arrayminus": _plain(barriers - low), "color": "black"},
                hovertemplate="layers %{x}: %{y:.5f}<extra></extra>",
            )
        )  # fmt: skip
        figure.add_trace(
            graph_objects.Scatter(
                x=words, y=_plain(barriers), mode="markers", showlegend=False, hoverinfo="skip",
                marker={"symbol": "diamond", "size": 7, "color": colour, "line": {"color": "black", "width": 1}},
            )
        )  # fmt: skip
    every = [layers_in_words(*span) for span in [*layers.singles, *layers.ranges]]
    figure.add_trace(
        graph_objects.Scatter(
            x=every, y=_plain([layers.whole] * len(every)), mode="lines", line={"dash": "dash", "color": VERMILION},
            name=layers.whole_label, visible="legendonly" if layers.far else True,
        )
    )  # fmt: skip
    figure.update_xaxes(title="layers that are interpolated", type="category")
    figure.update_yaxes(title="barrier (nats per token)", rangemode="tozero")
    _layout(figure, 460, legend={"orientation": "h", "y": -0.2})
    return "layerwise", "Layer by layer", f"{_in_a_row(layers.sure)}; {points_in_words(layers.t)}.", figure


def _agreement(routing: Routing) -> Section:
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=["agreement with A", "agreement with B"])
    for column, values in enumerate((routing.to_a, routing.to_b), 1):
        figure.add_trace(
            graph_objects.Heatmap(
                x=[f"{t:.4g}" for t in routing.t], y=[str(layer) for layer in routing.layers], z=_small(values.T),
                coloraxis="coloraxis", hovertemplate="t = %{x}, layer %{y}: %{z:.3f}<extra></extra>",
            ),
            row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title="t   (0 is A, 1 is B)", type="category", nticks=9, tickangle=0)
    figure.update_yaxes(type="category")
    figure.update_yaxes(title="layer", row=1, col=1)
    figure.update_coloraxes(colorscale="Cividis", cmin=0, cmax=1, colorbar={"title": "share"})
    _layout(figure, _height(routing))
    note = "The share of a token's top-k experts that A, or B in the coordinates of the path, would choose as well."
    return f"routing-{routing.path}", f"Routing, {routing.path} path", note, figure


def _load(routing: Routing) -> Section:
    """A map of expert over layer, with a slider for t. Cells show steps, as the pictures do; hovering shows the number."""
    from plotly import graph_objects

    steps = len(LOAD_COLOURS)
    cells = [(_cells(np.digitize(relative, LOAD_EDGES), relative), _cells(relative.round(3), relative))
             for relative in routing.relative]  # fmt: skip
    heat = graph_objects.Heatmap(
        y=[str(layer) for layer in routing.layers],
        z=cells[0][0],
        customdata=cells[0][1],
        zmin=-0.5,
        zmax=steps - 0.5,
        colorscale=[(edge / steps, colour) for i, colour in enumerate(LOAD_COLOURS) for edge in (i, i + 1)],
        hovertemplate="expert %{x}, layer %{y}: %{customdata:.3f}<extra></extra>",
        colorbar={
            "title": "load over<br>an even share",
            "tickvals": [i + 0.5 for i in range(len(LOAD_EDGES))],
            "ticktext": list(LOAD_LABELS),
        },
    )
    moves = [
        {"method": "restyle", "label": f"t = {t:.4g}", "args": [{"z": [z], "customdata": [numbers]}]}
        for t, (z, numbers) in zip(routing.t, cells, strict=True)
    ]
    figure = graph_objects.Figure(heat, {"sliders": [{"steps": moves, "pad": {"t": 50}}]})
    figure.update_xaxes(title="expert", tick0=0, dtick=max(1, routing.load.shape[-1] // 16))
    figure.update_yaxes(title="layer", type="category")
    _layout(figure, _height(routing) + 100)
    note = f"{routing.path} path; move the slider along t."
    return f"load-{routing.path}", f"Load of the experts, {routing.path} path", note, figure


def _cells(values: Any, known: Floats) -> list[list[float | None]]:
    """Rows of a map as lists, which take few digits on the page; None where nothing is known."""
    return [
        [value if there else None for value, there in zip(row, known_row, strict=True)]
        for row, known_row in zip(values.tolist(), np.isfinite(known).tolist(), strict=True)
    ]


def _in_a_row(lines: str) -> str:
    return "; ".join(lines.splitlines())


def _height(routing: Routing) -> int:
    return max(SHORTEST, ROW * len(routing.layers) + 160)


def _layout(figure: Figure, height: int, **more: Any) -> None:
    figure.update_layout(template="simple_white", height=height, margin={"t": 40}, font={"color": GREY}, **more)


def _plain(values: Any) -> list[float | None]:
    """Numbers for the page: None, a gap, stands for what is not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _small(values: Floats) -> Any:
    """Half as large on the page, and as exact as can be seen."""
    return np.asarray(values, dtype=np.float32)
