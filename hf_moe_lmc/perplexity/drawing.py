"""The plots of a measurement: its results as the plain values that are plotted, and the files they become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe_lmc.perplexity import curve as curves
from hf_moe_lmc.perplexity.bootstrap import Bootstrap, Floats
from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.references import REPAIRED
from hf_moe_lmc.perplexity.results import PathResult, Span
from hf_moe_lmc.plots import page, style
from hf_moe_lmc.plots.layerwise import draw_layers
from hf_moe_lmc.plots.losses import draw_losses
from hf_moe_lmc.plots.names import short_names
from hf_moe_lmc.plots.options import PlotKind
from hf_moe_lmc.plots.routing import draw_agreement, draw_load
from hf_moe_lmc.plots.values import Heading, Layers, Line, Losses, Routing

Records = Sequence[Mapping[str, Any]]  # of the routing, as in report.json
POOLED = "all texts as one, weighted by token"


@dataclass(frozen=True, kw_only=True)
class Plots:
    """What is plotted of one measurement.

    Attributes:
        layers: None: not measured.
        routing: of each path; empty: not recorded.
    """

    losses: Losses
    layers: Layers | None
    routing: Sequence[Routing]

    def write(self, file: Path, kind: PlotKind) -> None:
        """Writes the losses as `file` in PNG and SVG, the others beside it, and the page as the same name in HTML."""
        with style.own_settings():
            style.save(draw_losses(self.losses), file)
            if self.layers is not None:
                style.save(draw_layers(self.layers), file.with_name("layerwise.png"))
            for routing in self.routing:
                style.save(draw_agreement(routing), file.with_name(f"routing-{routing.path}.png"))
                style.save(draw_load(routing), file.with_name(f"load-{routing.path}.png"))
        if kind == "interactive":
            html = page.render_page(self.losses, self.layers, self.routing)
            file.with_suffix(".html").write_text(html, encoding="utf-8")


def plots(
    names: tuple[str, str],
    paths: Mapping[str, PathResult],
    means: TextMeans,
    *,
    layers: Mapping[Span, PathResult],
    routing: Records,
    measured: str,
    finding: str | None = None,
    left: str = REPAIRED,
) -> Plots:
    """The plots of a measurement.

    Args:
        names: of A and B.
        paths: by name; all share their windows and their bootstrap.
        means: of the texts; the losses are those of their unweighted mean, as in a verdict.
        layers: by first and last layer; empty: not measured. Their losses are of all texts as one, as in report.md.
        routing: as in report.json.
        measured: texts and tokens.
        finding: what the plots say, in one short sentence; None: the models are their title.
        left: what merges that have left the straight line are called.
    """
    a, b = short_names(*names)
    heading = Heading(title=finding or f"{a} to {b}", models=(a, b), measured=measured)
    several = len(means.names) > 1
    named = sorted(paths, key=lambda name: name == "naive")
    on_mean = replace(heading, measured=f"{measured}; unweighted mean of the texts") if several else heading
    pooled = replace(heading, measured=f"{measured}; {POOLED}") if several else heading
    bootstrap = next(iter(paths.values())).bootstrap
    return Plots(
        losses=Losses(
            heading=on_mean,
            lines={left if name == REPAIRED else name: _line(name, paths[name], means) for name in named},
            sure=_sure_of_losses(bootstrap, means),
        ),
        layers=_layers(layers, pooled, paths["aligned"].curve.barrier, bootstrap) if layers else None,
        routing=list(_routing(routing, heading)),
    )


def _line(name: str, path: PathResult, means: TextMeans) -> Line:
    """A path on the mean of the texts. Each resample has its own line between the ends, so the band is paired."""
    losses = path.losses.numpy()
    curve = BarrierCurve(path.t, tuple(means.of(None, losses).tolist()))
    resampled = means.resampled(None, losses)
    band = [means.interval(None, over) for over in curves.excess(path.t, resampled).T]
    return Line(
        t=curve.t,
        nll=curve.nll,
        excess=curve.excess,
        band=[bounds for bounds in band if bounds is not None],
        barrier=curve.barrier,
        interval=means.interval(None, curves.barrier(path.t, resampled)),
        straight=name != REPAIRED,
    )


def _layers(layers: Mapping[Span, PathResult], heading: Heading, whole: float, bootstrap: Bootstrap) -> Layers:
    return Layers(
        heading=heading,
        barriers={span: path.curve.barrier for span, path in layers.items()},
        intervals={span: path.barrier_interval for span, path in layers.items()},
        t=next(iter(layers.values())).t,
        whole=whole,
        sure=_sure("error bars", bootstrap, [bootstrap.caveat] if bootstrap.caveat else []),
    )


def _sure_of_losses(bootstrap: Bootstrap, means: TextMeans) -> str:
    if means.clusters(None) < 2:
        return "\n".join(means.caveats)
    return _sure("brackets and pointwise bands", bootstrap, means.caveats)


def _sure(what: str, bootstrap: Bootstrap, caveats: Sequence[str]) -> str:
    """What the intervals of a plot are, and what weakens them."""
    if bootstrap.count < 2:
        return "\n".join(caveats)
    text = f"{what}: {100 * bootstrap.level:g} % intervals, paired over {bootstrap.count} {bootstrap.unit}s"
    return "\n".join([text, *caveats])


def _routing(records: Records, heading: Heading) -> Iterator[Routing]:
    for name in path_names(records):
        t, numbers, to_a, to_b, load = routing_arrays(records, name)
        yield Routing(heading=heading, path=name, t=t, layers=numbers, to_a=to_a, to_b=to_b, load=load)


def path_names(records: Records) -> list[str]:
    """Names of the paths, each once, in the order of the records."""
    return list(dict.fromkeys(record["path"] for record in records))


def routing_arrays(records: Records, path: str) -> tuple[list[float], list[int], Floats, Floats, Floats]:
    """Records of one path as arrays; nan where there is no record.

    Returns:
        t; numbers of the layers; agreement with A and with B, float64 [point, layer]; load, float64 [point, layer, expert].

    Example:
        >>> record = {"path": "naive", "t": 0.5, "layer": 1, "load": [0.25, 0.75], "agreement_a": 1.0, "agreement_b": 0.5}
        >>> t, layers, to_a, to_b, load = routing_arrays([record], "naive")
        >>> t, layers, to_b.tolist(), load.tolist()
        ([0.5], [1], [[0.5]], [[[0.25, 0.75]]])
    """
    found = [record for record in records if record["path"] == path]
    t = sorted({record["t"] for record in found})
    layers = sorted({record["layer"] for record in found})
    experts = max(len(record["load"]) for record in found)
    agreement = np.full((2, len(t), len(layers)), np.nan)
    load = np.full((len(t), len(layers), experts), np.nan)
    for record in found:
        at = t.index(record["t"]), layers.index(record["layer"])
        agreement[:, *at] = record["agreement_a"], record["agreement_b"]
        load[at][: len(record["load"])] = record["load"]
    return t, layers, agreement[0], agreement[1], load
