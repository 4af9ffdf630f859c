"""What a barrier measurement leaves behind: the value, and its JSON.

`report.schema.json` beside this module describes every key of report.json; docs/report.md shows it as tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.perplexity import drawing, rendering, wording
from hf_moe_lmc.perplexity.bootstrap import Bootstrap, Interval, half_width
from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.cloze import Cloze
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.least import LeastLoss
from hf_moe_lmc.perplexity.references import REPAIRED, Beside, References, Shares, references
from hf_moe_lmc.perplexity.results import PathResult, Span, Summary
from hf_moe_lmc.perplexity.scores import Scores
from hf_moe_lmc.perplexity.verdict import MIDPOINT, ROUNDING, MergedAt, Verdict, merge_verdict, path_verdict
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.plots.options import PlotKind, PlotOptions
from hf_moe_lmc.runtime.documents import as_json

REPORT_VERSION = 1
TOLERANCE, NARROW_TOLERANCE = 1e-4, 5e-3  # nats per token, in float32 and in narrower dtypes
TEXTS_NAMED = 4  # in a subtitle; more are counted
COMMIT = 7  # characters of a commit that are shown
VOID = "not to be relied on: the two paths do not end in one model"
PACKAGES = ("hf_moe_lmc", "torch", "transformers", "safetensors", "accelerate")


@dataclass(frozen=True)
class LayerLosses:
    """The path on which some layers alone are interpolated.

    Attributes:
        t: its points, ascending from 0 to 1.
        losses: float64 [point, window], nats summed over each window.
    """

    t: tuple[float, ...]
    losses: Tensor


@dataclass(frozen=True)
class Added:
    """What was measured at one t besides the losses and right tokens along the paths.

    Attributes:
        ensembles: of both parents, with the weight t of B, by KINDS: losses and right tokens as of one point. Empty: not
            measured.
        cloze: questions that each model answers right, by the names of MODELS, float64 [question]. Empty: not asked.
        cloze_ensembles: the same of the ensembles, by KINDS.
        stored: merges as an output stores them, by the names of MERGES: one point each. Where there is none, the point of the
            path is what is stored, or nothing is.
    """

    ensembles: Mapping[str, Scores] = field(default_factory=dict)
    cloze: Mapping[str, Tensor] = field(default_factory=dict)
    cloze_ensembles: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class BarrierReport:
    """The perplexity barrier between two models on the naive and on the aligned path (paper, Eq. 1).

    A repaired merge is one more entry `repaired` of `losses`, `right` and `halfway`, at the same t: references, tables,
    plots and the verdict then have it. Its points lie on no straight line, so that its barrier is not that of Eq. 1.

    Attributes:
        a, b: origin of the two checkpoints.
        evaluation, matching: as in report.json.
        windows: what was evaluated on.
        losses: by path name, float64 [point, window], nats summed over each window.
        t: the grid, ascending from 0 to 1.
        seconds: of the whole measurement.
        layerwise: by first and last layer, the path on which these alone go from A to aligned B; None: not measured.
        routing: as in report.json; None: not recorded.
        own: by side (`a`, `b`), the losses under that model's own configuration and vocabulary, and why that is another one, as
            in report.json; None: it is not.
        halfway: by path name, float64 [window], the losses at t = 0.5, on the grid or not; by default those of the grid.
        merge: the merge that the references and the verdict are about, at a point of the grid; None: no merge was made.
        right: by path name, float64 [point, window], scored tokens that are the first choice; empty: not counted.
        halfway_right: as `halfway`.
        added: what was measured besides, by t.
        questions: of the cloze task; None: not asked.
        decides: the path that the verdict of a report without `merge` is about, that a merge would be written from; by
            default `repaired` where that was measured. Where a repair was refused, name `aligned`.
        repaired_t: where the path `repaired` was measured, ends included; None: at the t of the others.
        repair: as in report.json; None: none was asked for.

    Example:
        >>> import torch
        >>> windows = Windows((torch.arange(5),), (0,), context=5, bos=False, tokens_read=5)  # 4 predicted tokens
        >>> losses = {"aligned": [[4.0], [6.0], [4.0]], "naive": [[4.0], [12.0], [4.0]]}
        >>> report = BarrierReport(
        ...     a={"source": "org/a"}, b={"source": "org/b"}, evaluation={"dtype": "float32"}, matching={}, windows=windows,
        ...     losses={path: torch.tensor(sums, dtype=torch.float64) for path, sums in losses.items()},
        ...     t=(0.0, 0.5, 1.0), seconds=1.0,
        ... )
        >>> report.naive.barrier, report.aligned.barrier, report.percent_of_naive
        (2.0, 0.5, 25.0)
        >>> report.verdict.t, report.verdict.sentences[-1]
        (0.5, 'Barrier in nats per token: naive 2.000 at t = 0.5; aligned 0.500 at t = 0.5.')
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
    own: Mapping[str, Mapping[str, Any]] | None = None
    halfway: Mapping[str, Tensor] = field(default_factory=dict)
    merge: MergedAt | None = None
    right: Mapping[str, Tensor] = field(default_factory=dict)
    halfway_right: Mapping[str, Tensor] = field(default_factory=dict)
    added: Mapping[float, Added] = field(default_factory=dict)
    questions: Cloze | None = None
    decides: str | None = None
    repaired_t: tuple[float, ...] | None = None
    repair: Mapping[str, Any] | None = None

    def grid(self, path: str) -> tuple[float, ...]:
        """The t at which a path was measured."""
        return self.t if path != REPAIRED or self.repaired_t is None else self.repaired_t

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """The same resamples for all points of all paths."""
        return Bootstrap(self.windows.documents, tuple(self.windows.scored.int().tolist()))

    @cached_property
    def paths(self) -> dict[str, PathResult]:
        """Curve and intervals of each path, by its name."""
        return {
            name: PathResult(self.grid(name), losses, self.windows, self.bootstrap, self.right.get(name))
            for name, losses in self.losses.items()
        }

    @cached_property
    def layers(self) -> dict[Span, PathResult]:
        """Curve and intervals of the paths on which some layers alone are interpolated, by first and last layer."""
        measured = self.layerwise or {}
        return {span: PathResult(alone.t, alone.losses, self.windows, self.bootstrap) for span, alone in measured.items()}

    @cached_property
    def summary(self) -> Summary:
        """Comparison of the two paths."""
        narrow = self.evaluation.get("dtype") != "float32"
        if "aligned" not in self.paths:
            return Summary()
        return Summary.of(self.paths["aligned"], self.paths.get("naive"), narrow=narrow)

    @cached_property
    def verdict(self) -> Verdict:
        """Which t, and whether the merge there is better than its parents."""
        about: dict[str, Any] = {
            "floor": max(ROUNDING, self.relabelling_floor or 0.0),
            "remarks": [*self.not_finite, *self.warnings],
            "left": self.left,
        }
        merge = self.merge
        if merge is None:
            return self._of_paths(self.decides or (REPAIRED if REPAIRED in self.losses else "aligned"), about)
        if merge.chosen:
            line = self.searched
            found = self._of_paths(line, about)
            here = references(self._at(merge.t, line), self.windows, t=merge.t, beside=self._beside(merge.t, line))
            here = replace(here, means=found.compared.means)
            on_line = found.t == merge.t and line == merge.path
            return replace(found, references=here, compared=here, merge=merge.path, searched=None if on_line else line)
        models, beside = self._at(merge.t, merge.path), self._beside(merge.t, merge.path)
        return merge_verdict(models, self.windows, t=merge.t, merge=merge.path, beside=beside, **about)

    @property
    def searched(self) -> str:
        """The straight line on which the t of a merge is looked for."""
        return "aligned" if "aligned" in self.losses else "naive"

    @property
    def left(self) -> str:
        """What merges that have left the straight line are called: `repaired` or `widened`."""
        return "widened" if self.repair is not None and self.repair.get("asked") == "widen" else REPAIRED

    @property
    def _parents(self) -> dict[str, Tensor]:
        """Losses of the models by themselves where they are not the ends of the paths: float64 [window]."""
        return {
            side: torch.tensor(own["window_nll"], dtype=torch.float64) * self.windows.scored
            for side, own in (self.own or {}).items()
        }

    def _at(self, t: float, path: str) -> dict[str, Tensor]:
        """Losses of the parents, and of the merges at one t: float64 [window]."""
        stored = {name: of.losses[0] for name, of in self.added.get(t, Added()).stored.items()}
        return {**_ends(self.losses, path), **self._parents, **self._points(self.losses, t), **stored}

    def _points(self, values: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
        """One point of each path that was measured there: [window]."""
        return {path: of_path[self.grid(path).index(t)] for path, of_path in values.items() if t in self.grid(path)}

    def _halfway(self) -> dict[str, Tensor]:
        return dict(self.halfway) or self._points(self.losses, MIDPOINT)

    def _beside(self, t: float, path: str) -> Beside:
        """Ensembles and right answers at a t: of the grid, or halfway."""
        added, shares = self.added.get(t, Added()), {}
        if self.right:
            own = {side: torch.tensor(of["window_right"]).double() for side, of in (self.own or {}).items()}
            here = self.halfway_right if t == MIDPOINT and self.halfway_right else self._points(self.right, t)
            stored = {name: of.right[0] for name, of in added.stored.items()}
            models = {**_ends(self.right, path), **own, **here, **stored}
            shares["accuracy"] = Shares(models, {kind: of.right[0] for kind, of in added.ensembles.items()}, self.means)
        if added.cloze:
            assert self.questions is not None
            shares["cloze"] = Shares(added.cloze, added.cloze_ensembles, TextMeans(self.questions.windows))
        return Beside({kind: of.losses[0] for kind, of in added.ensembles.items()}, shares)

    @cached_property
    def means(self) -> TextMeans:
        """Of the texts."""
        return TextMeans(self.windows)

    def _of_paths(self, merge: str, about: Mapping[str, Any]) -> Verdict:
        least = LeastLoss(self.grid(merge), self.losses[merge], self.means).chosen
        named = {MIDPOINT} | ({least} if least is not None else set())
        return path_verdict(
            self.losses,
            self.t,
            self.windows,
            halfway=self._halfway(),
            parents=self._parents,
            merge=merge,
            beside={t: self._beside(t, merge) for t in named},
            repaired_t=self.repaired_t,
            **about,
        )

    @property
    def references(self) -> References:
        """Losses of both parents and of the merges halfway between them, or at the t of the merge that was made."""
        return self.verdict.references

    @property
    def names(self) -> tuple[str, str]:
        """Of both models; two revisions of one Hub repository have their commits."""
        a, b = self.a["source"], self.b["source"]
        if a != b or self.a.get("commit") == self.b.get("commit"):
            return a, b
        return f"{a}@{self.a['commit'][:COMMIT]}", f"{b}@{self.b['commit'][:COMMIT]}"

    @property
    def subtitle(self) -> str:
        """What was evaluated on, in a line for plots: texts, size, dtype."""
        names, count = self.verdict.compared.means.names, len(set(self.windows.documents))
        texts = ", ".join(names) if len(names) <= TEXTS_NAMED else f"{len(names)} texts"
        documents = f"{count:,} document{'s' if count > 1 else ''}"
        return f"{texts}; {int(self.windows.scored.sum()):,} tokens, {documents}; {self.evaluation['dtype']}"

    @property
    def not_finite(self) -> list[str]:
        """Where losses are not finite, in words."""
        advice = "" if self.evaluation["dtype"] == "float32" else "; try --dtype float32"
        found = []
        for name, values in self.losses.items():
            bad = [f"{self.grid(name)[i]:.3g}" for i in (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()]
            if bad:
                found.append(f"{name} path: the loss is not finite at t = {', '.join(bad)}{advice}")
        return found

    def curve(self, path: str) -> BarrierCurve:
        return self.paths[path].curve

    @property
    def aligned(self) -> BarrierCurve:
        return self.curve("aligned")

    @property
    def naive(self) -> BarrierCurve | None:
        return self.curve("naive") if "naive" in self.paths else None

    @property
    def percent_of_naive(self) -> float | None:
        """See `Summary.aligned_percent_of_naive`."""
        return self.summary.aligned_percent_of_naive

    @property
    def endpoint_change(self) -> float | None:
        """See `Summary`; nats per token."""
        return self.summary.endpoint_change

    @property
    def relabelling_floor(self) -> float | None:
        """See `Summary`; nats per token."""
        return self.summary.relabelling_floor

    @property
    def difference(self) -> float | None:
        """See `Summary`; nats per token."""
        return self.summary.difference

    @property
    def difference_interval(self) -> Interval | None:
        """See `Summary`; nats per token."""
        return self.summary.difference_interval

    @cached_property
    def disagreement(self) -> str | None:
        """What to say where the two ends at t = 1, which are one model, differ in their loss; None: they do not."""
        change = self.endpoint_change
        if change is None or not abs(change) > (TOLERANCE if self.relabelling_floor is None else NARROW_TOLERANCE):
            return None
        if self.relabelling_floor is not None:
            ends = [self.losses[name][-1:].numpy() for name in ("aligned", "naive")]
            aligned_end, naive_end = (self.bootstrap.means(end) for end in ends)
            interval = self.bootstrap.interval((aligned_end - naive_end)[:, 0])
            if interval is not None and interval[0] <= 0 <= interval[1]:
                return None
        return (
            f"the two paths end in one model, but its losses differ by {change:+.2e} nats per token: the alignment changed "
            "what B computes, so do not rely on this report" + ("" if self.merge is None else ", nor on the merge")
        )

    @property
    def warnings(self) -> list[str]:
        """A disagreement of the ends, and maxima that the grid may have missed, in words."""
        reasons = {name: path.curve.unresolved(half_width(path.barrier_interval)) for name, path in self.paths.items()}
        found = [] if self.disagreement is None else [self.disagreement]
        if self.merge is not None and not self.merge.chosen:  # there is no curve: t was given
            return found
        return found + [
            f"{name} path: the barrier may be higher than measured: {reason}; `barrier --refine` adds points there"
            for name, reason in reasons.items()
            if reason and name != REPAIRED
        ]

    def to_dict(self) -> dict[str, Any]:
        """The content of report.json; numbers that are not finite as they are."""
        layerwise = [path.to_layers_dict(span) for span, path in self.layers.items()]
        return {
            "version": REPORT_VERSION,
            "verdict": self.verdict.to_dict(),
            "disagreement": self.disagreement,
            "references": self.references.to_dict(),
            **({} if self.merge is None else {"merge": asdict(self.merge)}),
            **({} if self.repair is None else {"repair": dict(self.repair)}),
            "a": self.a,
            "b": self.b,
            "evaluation": self.evaluation,
            "matching": self.matching,
            "windows": {
                "tokens": self.windows.scored.int().tolist(),
                "document": list(self.windows.documents),
                "text": list(self.windows.text_of),
            },
            "paths": {name: path.to_dict() for name, path in self.paths.items()},
            **({} if self.layerwise is None else {"layerwise": layerwise}),
            **({} if self.routing is None else {"routing": [dict(record) for record in self.routing]}),
            **({} if self.own is None else {"own": {side: dict(values) for side, values in self.own.items()}}),
            **({} if self.questions is None else {"cloze": self.questions.describe()}),
            **({"ensembles": self._ensembles()} if any(added.ensembles for added in self.added.values()) else {}),
            "summary": self.summary.to_dict(),
            "statistics": self.bootstrap.describe(),
            "warnings": self.warnings,
            "versions": {name: version(name) for name in PACKAGES},
            "seconds": self.seconds,
        }

    def _ensembles(self) -> list[dict[str, Any]]:
        """The `ensembles` of report.json: one entry for each t and kind."""
        scored = self.windows.scored
        return [
            {
                "t": t,
                "of": kind,
                "nll": float(of.losses[0].sum() / scored.sum()),
                "accuracy": float(of.right[0].sum() / scored.sum()),
                "window_nll": (of.losses[0] / scored).tolist(),
            }
            for t, added in sorted(self.added.items())
            if self.merge is None or self.merge.t == t
            for kind, of in added.ensembles.items()
        ]

    def to_json(self) -> str:
        """report.json: null stands for a number that is not finite."""
        return as_json(self.to_dict())

    def of_layers(self, first: int, last: int | None = None) -> tuple[BarrierCurve, Interval | None]:
        """Curve of the path on which some layers alone are interpolated, and the interval of its barrier.

        Raises:
            KeyError: that was not measured.
        """
        found = self.layers[first, first if last is None else last]
        return found.curve, found.barrier_interval

    def barrier_interval(self, path: str) -> Interval | None:
        """Of the barrier of one path, nats per token."""
        return self.paths[path].barrier_interval

    def area_interval(self, path: str) -> Interval | None:
        """Of the area of one path."""
        return self.paths[path].area_interval

    def nll_interval(self, path: str) -> list[Interval | None]:
        """Of the loss at each point of one path, nats per token."""
        return self.paths[path].nll_interval

    def bits_per_byte(self, path: str) -> list[float] | None:
        """Of the scored text at each point of one path; None where its bytes are not known."""
        return self.paths[path].bits_per_byte

    def table(self) -> str:
        """The verdict, then losses by text, along the paths and of single layers, for a terminal."""
        parts = [
            rendering.verdict(self.verdict, self.disagreement),
            [f"{said}." for said in self._repair_said],
            rendering.by_text(self.verdict.compared, self.left),
            rendering.table(self.paths, self.summary, several=self.references.several, left=self.left),
            rendering.own_losses(self.own or {}),
            rendering.layer_rows(self.layers) if self.layers else [],
        ]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    def sentence(self, path: str) -> str:
        """The barrier of one path, for a terminal."""
        return rendering.sentence(path, self.paths[path], self.summary, self.left)

    @property
    def _repair_said(self) -> list[str]:
        """What was done to leave the straight line, a sentence for each t."""
        if self.repair is None:
            return []
        if self.left != REPAIRED:
            return [self.repair["sentence"]]
        points = self.repair.get("points") or [self.repair]
        if len({one["sentence"] for one in points}) == 1:
            return [f"repair: {self.repair['sentence']}"]
        return [f"repair at t = {one['t']:.3g}: {one['sentence']}" for one in points]

    def to_markdown(self) -> str:
        """The content of report.md, which shows the files that `plot` writes."""
        return rendering.markdown(
            self.names,
            self.paths,
            self.summary,
            verdict=self.verdict,
            evaluation=self.evaluation,
            layers=None if self.layerwise is None else self.layers,
            routing=self.routing or (),
            disagreement=self.disagreement,
            own=self.own or {},
            merged_at=self.merge,
            repair=self._repair_said,
        )

    def plot(self, path: Path, kind: PlotKind = "static") -> None:
        """Writes plots as PNG and SVG files.

        Args:
            path: of the loss along the paths; its suffix does not matter. Others are written beside it: `layerwise`, and for
                each path `routing-PATH` (agreement) and `load-PATH`.
            kind: `interactive` writes a page with all of them as well, with the suffix .html; it needs Plotly.
        """
        PlotOptions(plot=kind)
        drawing.plots(
            self.names,
            self.paths,
            self.verdict.compared.means,
            layers=self.layers,
            routing=self.routing or (),
            measured=self.subtitle,
            finding=wording.capital(VOID if self.disagreement else self.verdict.title),
            left=self.left,
        ).write(path, kind)


def _ends(values: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """A, and B as it is where that was measured: [window], from [point, window] by path."""
    return {"a": values[path][0], "b": values.get("naive", values[path])[-1]}
