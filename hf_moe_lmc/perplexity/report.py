"""What a barrier measurement leaves behind: report.json, tables, plots, report.md.

`report.schema.json` beside this module describes every key of report.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hf_moe_lmc.perplexity import curve as curves
from hf_moe_lmc.perplexity import figures
from hf_moe_lmc.perplexity.bootstrap import (
    Bootstrap,
    Floats,
    Interval,
    half_width,
)
from hf_moe_lmc.perplexity.curve import NEGLIGIBLE, BarrierCurve
from hf_moe_lmc.perplexity.windows import Windows

REPORT_VERSION = 1
PACKAGES = ("hf_moe_lmc", "torch", "transformers", "safetensors", "accelerate")


Span = tuple[int, int]  # first and last of neighbouring decoder layers


@dataclass(frozen=True)
class LayerLosses:
    """The path on which some layers alone are interpolated: losses float64 [point, window], nats summed over each window."""

    t: tuple[float, ...]
    losses: Tensor


@dataclass(frozen=True)
class BarrierReport:
    """The barrier between two models on the naive and on the aligned path.

    Attributes:
        a, b: origin of the two checkpoints.
        evaluation, matching: as in report.json, see its schema.
        windows: what was evaluated on.
        losses: by path name, float64 [point, window], nats summed over each window.
        t: the grid.
        layerwise: by first and last layer, the path on which these alone go from A to aligned B; None: not measured.
        routing: as in report.json, see its schema; None: not recorded.
    """

    a: dict[str, str]
    b: dict[str, str]
    evaluation: dict[str, Any]
    matching: dict[str, Any]
    windows: Windows
    losses: dict[str, Tensor]
    t: tuple[float, ...]
    seconds: float
    layerwise: dict[Span, LayerLosses] | None = None
    routing: Sequence[Mapping[str, Any]] | None = None

    def curve(self, path: str) -> BarrierCurve:
        total = self.losses[path].sum(dim=1) / self.windows.scored.sum()
        return BarrierCurve(self.t, tuple(total.tolist()))

    @property
    def aligned(self) -> BarrierCurve:
        return self.curve("aligned")

    @property
    def naive(self) -> BarrierCurve | None:
        return self.curve("naive") if "naive" in self.losses else None

    @property
    def percent_of_naive(self) -> float | None:
        if self.naive is None or not self.naive.barrier >= NEGLIGIBLE:
            return None
        return 100 * self.aligned.barrier / self.naive.barrier

    @property
    def endpoint_change(self) -> float | None:
        """L(B') - L(B), nats per token."""
        return None if self.naive is None else self.aligned.nll[-1] - self.naive.nll[-1]

    @cached_property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.windows.documents, tuple(self.windows.scored.int().tolist()))

    @cached_property
    def _resampled(self) -> dict[str, Floats]:
        """By path, losses in each resample: [replicate, point], nats per token."""
        return {name: self.bootstrap.means(losses.numpy()) for name, losses in self.losses.items()}

    def barrier_interval(self, path: str) -> Interval | None:
        return self.bootstrap.interval(curves.barrier(self.t, self._resampled[path]))

    def area_interval(self, path: str) -> Interval | None:
        return self.bootstrap.interval(curves.area(self.t, self._resampled[path]))

    def nll_interval(self, path: str) -> list[Interval | None]:
        """Pointwise."""
        return self.bootstrap.intervals(self._resampled[path])

    @property
    def difference(self) -> float | None:
        """Naive barrier - aligned barrier, nats per token."""
        return None if self.naive is None else self.naive.barrier - self.aligned.barrier

    @property
    def difference_interval(self) -> Interval | None:
        if self.naive is None:
            return None
        naive, aligned = (curves.barrier(self.t, self._resampled[path]) for path in ("naive", "aligned"))
        return self.bootstrap.interval(naive - aligned)

    def bits_per_byte(self, path: str) -> list[float] | None:
        """Of the scored text at each point; None where its bytes are not known."""
        if self.windows.bytes_scored is None:
            return None
        return (self.losses[path].sum(dim=1) / (math.log(2) * sum(self.windows.bytes_scored))).tolist()

    @property
    def warnings(self) -> list[str]:
        """What the reader of the barriers should know: maxima that the grid may have missed."""
        found = {name: self.curve(name).unresolved(half_width(self.barrier_interval(name))) for name in self.losses}
        return [
            f"{name} path: the barrier may be higher than measured: {why}; --refine adds points there"
            for name, why in found.items()
            if why
        ]

    def of_layers(self, first: int, last: int | None = None) -> tuple[BarrierCurve, Interval | None]:
        """Curve of the path on which some layers alone are interpolated, and the interval of its barrier.

        Raises:
            KeyError: that was not measured.
        """
        found = (self.layerwise or {})[first, first if last is None else last]
        t, losses = found.t, found.losses
        means = (losses.sum(dim=1) / self.windows.scored.sum()).tolist()
        interval = self.bootstrap.interval(curves.barrier(t, self.bootstrap.means(losses.numpy())))
        return BarrierCurve(t, tuple(means)), interval

    @property
    def relabelling_floor(self) -> float | None:
        """What relabelling experts alone does to the loss of B in a dtype narrower than float32, nats per token.

        Two losses that differ by less cannot be told apart. None in float32, or without a naive path.
        """
        narrow = self.evaluation.get("dtype") != "float32"
        return abs(self.endpoint_change) if narrow and self.endpoint_change is not None else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": REPORT_VERSION,
            "a": self.a,
            "b": self.b,
            "evaluation": self.evaluation,
            "matching": self.matching,
            "windows": {"tokens": self.windows.scored.int().tolist(), "document": list(self.windows.documents)},
            "paths": {name: self._path(name) for name in self.losses},
            **({} if self.layerwise is None else {"layerwise": self._layers()}),
            **({} if self.routing is None else {"routing": [dict(record) for record in self.routing]}),
            "summary": {
                "aligned_percent_of_naive": self.percent_of_naive,
                "endpoint_change": self.endpoint_change,
                "relabelling_floor": self.relabelling_floor,
                "difference": self.difference,
                "difference_interval": self.difference_interval,
            },
            "statistics": self.bootstrap.describe(),
            "warnings": self.warnings,
            "versions": {name: version(name) for name in PACKAGES},
            "seconds": self.seconds,
        }

    def _path(self, name: str) -> dict[str, Any]:
        curve = self.curve(name)
        return {
            "t": list(curve.t),
            "nll": list(curve.nll),
            "perplexity": list(curve.perplexity),
            "excess": list(curve.excess),
            "barrier": curve.barrier,
            "barrier_t": curve.barrier_t,
            "area": curve.area,
            "window_nll": (self.losses[name] / self.windows.scored).tolist(),
            "barrier_interval": self.barrier_interval(name),
            "area_interval": self.area_interval(name),
            "nll_interval": self.nll_interval(name),
            "barrier_worse_end": curve.barrier_worse_end,
            "barrier_perplexity_ratio": curve.perplexity_ratio,
            "bits_per_byte": self.bits_per_byte(name),
        }

    def _layers(self) -> list[dict[str, Any]]:
        found = []
        for first, last in self.layerwise or {}:
            curve, interval = self.of_layers(first, last)
            facts = {"barrier": curve.barrier, "barrier_interval": interval, "t": list(curve.t), "nll": list(curve.nll)}
            found.append({**({"layer": first} if first == last else {"layers": [first, last]}), **facts})
        return found

    def to_json(self) -> str:
        return json.dumps(_without_nan(self.to_dict()), indent=2, allow_nan=False) + "\n"

    def table(self) -> str:
        """Losses along the path and the barriers, for a terminal."""
        found = {name: self.curve(name) for name in self.losses}
        lines = ["     t" + "".join(f"{name + ' nll':>14}{'perplexity':>14}" for name in found)]
        for i, t in enumerate(self.t):
            lines.append(f"{t:6.3f}" + "".join(f"{c.nll[i]:14.4f}{c.perplexity[i]:14.4f}" for c in found.values()))
        lines.append("")
        lines += [self.sentence(name) for name in found]
        if self.difference is not None and self.bootstrap.count > 1:
            lines.append(f"naive - aligned: {self.difference:.4f}{_between(self.difference_interval, '.4f')}")
            lines.append(
                f"brackets: {100 * self.bootstrap.level:g} % intervals over {self.bootstrap.count} {self.bootstrap.unit}s"
            )
        return "\n".join(lines)

    def sentence(self, name: str) -> str:
        """One path's barrier in words."""
        curve = self.curve(name)
        interval = _between(self.barrier_interval(name), ".4f")
        text = f"barrier, {name} path: {curve.barrier:.4f} nats per token{interval} at t = {curve.barrier_t:.3g}"
        text += f"; area {curve.area:+.4f}"
        if name == "aligned" and self.percent_of_naive is not None:
            text += f"; {self.percent_of_naive:.1f} % of the naive barrier"
        return text

    def to_markdown(self) -> str:
        parts = [
            f"# Perplexity barrier between {_short(self.a['source'])} and {_short(self.b['source'])}\n",
            "![loss along the path](barrier.png)\n",
            self._table_of_barriers(),
        ]
        if self.difference is not None:
            parts.append(
                f"Alignment lowers the barrier by {self.difference:.4f} nats per token"
                f"{_between(self.difference_interval, '.4f')}.\n"
            )
        if self.percent_of_naive is not None:
            parts.append(f"The aligned barrier is {self.percent_of_naive:.1f} % of the naive one.\n")
        if self.endpoint_change is not None:
            parts.append(
                f"Alignment changed the loss of B itself by {self.endpoint_change:+.1e} nats (it should not beyond rounding).\n"
            )
        parts += [f"**Warning.** {warning[0].upper()}{warning[1:]}.\n" for warning in self.warnings]
        parts.append(self._what_is_measured())
        parts.append(self._how_sure())
        if self.layerwise is not None:
            parts.append(self._layers_in_words())
        if self.routing:
            parts.append(self._routing_in_words())
        return "\n".join(parts)

    def _table_of_barriers(self) -> str:
        head = "path | barrier, nats | at t | over the worse end | perplexity ratio | area | nll of A | nll of B"
        rows = [head, "|".join(["---"] * (head.count("|") + 1))]
        for name in reversed(self.losses):
            c = self.curve(name)
            rows.append(
                f"{name} | {c.barrier:.4f}{_between(self.barrier_interval(name), '.4f')} | {c.barrier_t:.3g} | "
                f"{c.barrier_worse_end:.4f} | {c.perplexity_ratio:.4f} | {c.area:+.4f}"
                f"{_between(self.area_interval(name), '+.4f')} | {c.nll[0]:.4f} | {c.nll[-1]:.4f}"
            )
        return "".join(f"| {row} |\n" for row in rows)

    def _what_is_measured(self) -> str:
        evaluation, windows = self.evaluation, self.windows
        overlap = " that overlap (each scored where the one before ended)" if windows.context_only else ""
        per_byte = self.bits_per_byte("aligned")
        ends = f" The ends have {per_byte[0]:.4f} and {per_byte[-1]:.4f} bits per byte." if per_byte else ""
        return (
            "## What is measured\n\n"
            "The barrier is the largest rise of the loss, in nats per token, above the straight line between the losses of "
            "the two ends, over the points of the grid: max over t of L((1 - t) A + t B') - [(1 - t) L(A) + t L(B')]. "
            "The naive path takes B as it is, the aligned one takes B with its experts and hidden units moved to where A has "
            "theirs. "
            f"These are {len(self.t)} points on one text: {evaluation['tokens_scored']} predicted tokens in "
            f"{evaluation['windows']} windows of at most {evaluation['context']} tokens{overlap}, "
            f"{'each opened by a BOS token' if evaluation['bos'] else 'without BOS'}, in {evaluation['dtype']}.{ends} "
            "A low barrier here says that the line between these two checkpoints is passable on this text; it does not prove "
            "that the models are connected in general.\n"
        )

    def _how_sure(self) -> str:
        drawn = self.bootstrap
        note = f" Mind: {drawn.note}." if drawn.note else ""
        if drawn.count < 2:
            return f"## How sure\n\nNo intervals.{note}\n"
        return (
            "## How sure\n\n"
            f"Intervals in brackets hold {100 * drawn.level:g} %: a paired bootstrap over {drawn.count} {drawn.unit}s "
            f"({drawn.replicates} resamples, seed {drawn.seed}), the same resample at all points of all paths, means weighted "
            "by token, percentiles. They tell how figures would vary with other text of the same kind, not with other models. "
            "The band around a curve is pointwise; since its points share their text, the curve is surer in shape than in "
            f"height.{note}\n"
        )

    def _layers_in_words(self) -> str:
        rows = "".join(
            f"| {figures.span(first, last)} | {curve.barrier:.4f}{_between(interval, '.4f')} | {curve.barrier_t:.3g} |\n"
            for first, last in self.layerwise or {}
            for curve, interval in [self.of_layers(first, last)]
        )
        return (
            "## Layer by layer\n\n![barrier of each layer](layerwise.png)\n\n"
            "The barrier where one layer, or the layers of a range together, go from A to aligned B and all else stays A.\n\n"
            f"| layers | barrier, nats | at t |\n|---|---|---|\n{rows}"
        )

    def _routing_in_words(self) -> str:
        paths = dict.fromkeys(record["path"] for record in self.routing or [])
        images = "".join(
            f"![routing, {path} path](routing-{path}.png)\n![load, {path} path](load-{path}.png)\n" for path in paths
        )
        return (
            f"## Routing along the path\n\n{images}\n"
            "Agreement is the share of the experts chosen for a token that A, or B in the coordinates of the path, would "
            "choose for it as well. Where both fall on the way, tokens meet experts that neither model would choose for them.\n"
        )

    def plot(self, path: Path) -> None:
        """Draws the loss along the paths, and what was measured besides, as PNG and SVG files.

        Args:
            path: of the first plot; its suffix does not matter. The others stand beside it: layerwise, and for each path
                routing-PATH (agreement) and load-PATH.
        """
        ends = f"{_short(self.a['source'])} to {_short(self.b['source'])}"
        lines = {}
        for name in [name for name in figures.STYLES if name in self.losses]:
            curve, interval = self.curve(name), self.barrier_interval(name)
            lines[name] = figures.Line(curve.t, curve.nll, self.nll_interval(name), curve.barrier, interval)
        figures.save(figures.curve(lines, ends, self.bootstrap.level), path)
        if self.layerwise:
            values = {}
            for first, last in self.layerwise:
                curve, interval = self.of_layers(first, last)
                values[first, last] = (curve.barrier, *(interval or (math.nan, math.nan)))
            figures.save(figures.layerwise(values, ends, self.aligned.barrier), path.with_name("layerwise.png"))
        for name in dict.fromkeys(record["path"] for record in self.routing or []):
            t, layers, to_a, to_b, load = self._routing_arrays(name)
            title = f"{ends}, {name} path"
            figures.save(figures.agreement(t, layers, to_a, to_b, title), path.with_name(f"routing-{name}.png"))
            shown = sorted({0, min(range(len(t)), key=lambda i: abs(t[i] - 0.5)), len(t) - 1})
            loads = {t[i]: load[i] for i in shown}
            figures.save(figures.load(loads, layers, title), path.with_name(f"load-{name}.png"))

    def _routing_arrays(self, path: str) -> tuple[list[float], list[int], Floats, Floats, Floats]:
        """t, layers, agreement with A and with B [point, layer], load [point, layer, expert] of one path; nan: no record."""
        records = [record for record in self.routing or [] if record["path"] == path]
        t = sorted({record["t"] for record in records})
        layers = sorted({record["layer"] for record in records})
        experts = max(len(record["load"]) for record in records)
        agreement = np.full((2, len(t), len(layers)), np.nan)
        load = np.full((len(t), len(layers), experts), np.nan)
        for record in records:
            at = t.index(record["t"]), layers.index(record["layer"])
            agreement[:, *at] = record["agreement_a"], record["agreement_b"]
            load[at][: len(record["load"])] = record["load"]
        return t, layers, agreement[0], agreement[1], load


def _between(interval: Interval | None, form: str) -> str:
    """An interval in brackets, behind a number."""
    return "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(source: str) -> str:
    """A Hub id as it is, a folder by its name."""
    return Path(source).resolve().name if Path(source).is_dir() else source
