"""Two models measured on a text: what `barrier` does, and `merge` where it is given one."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.pair import function_settings
from hf_moe_lmc.path.added import Additions, OtherMerges
from hf_moe_lmc.path.ensemble import Ensemble
from hf_moe_lmc.path.evaluation import Evaluator, Merged
from hf_moe_lmc.path.measurement import Measurement, evaluation_options, layer_spans, own_losses
from hf_moe_lmc.path.options import AdditionOptions, ComputeOptions, GridOptions
from hf_moe_lmc.path.tokenizer import common_tokenizer, context_length
from hf_moe_lmc.perplexity.cloze import cloze_of
from hf_moe_lmc.perplexity.report import BarrierReport, Span
from hf_moe_lmc.perplexity.text import Text, TextOptions
from hf_moe_lmc.perplexity.verdict import MIDPOINT
from hf_moe_lmc.perplexity.windows import WindowOptions, Windows, cut_texts
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import Pair
from hf_moe_lmc.verbs.options import filled
from hf_moe_lmc.verbs.planning import Evaluation
from hf_moe_lmc.writing.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be measured, whatever the models."""

    source: Text
    windows: WindowOptions
    grid: GridOptions
    compute: ComputeOptions
    additions: AdditionOptions

    @classmethod
    def of(cls, given: Mapping[str, Any], **grid: Any) -> Asked:
        """From the options of a verb that were given; `grid` goes before those.

        Raises:
            InputError: no text, options without effect, or values out of range.
        """
        return cls(
            source=filled(TextOptions, given).source(),
            windows=filled(WindowOptions, given),
            grid=filled(GridOptions, {**given, **grid}),
            compute=filled(ComputeOptions, given),
            additions=filled(AdditionOptions, given),
        )


@dataclass(frozen=True)
class Subject:
    """Two models and a text that fit.

    Attributes:
        spans: first and last of the decoder layers that are also interpolated without the others.
        additions: what is measured besides.
    """

    pair: Pair
    asked: Asked
    evaluator: Evaluator
    spans: tuple[Span, ...]
    additions: Additions

    @classmethod
    def of(cls, pair: Pair, asked: Asked) -> Subject:
        """Reads the text, as far as it is needed, and checks it against both models.

        Raises:
            InputError: the models or the text do not fit.
            ForeignError: transformers cannot build the model.
        """
        model_class = language_model_class(pair.a)
        spans = tuple(layer_spans(asked.grid.layers, pair.a)) if asked.grid.steps else ()
        context = context_length(pair.a, asked.windows.context)
        windows = cut_texts(
            asked.source.texts(),
            common_tokenizer(pair.a, pair.b),
            context=context,
            max_tokens=asked.windows.max_tokens,
            stride=asked.windows.stride,
            names=asked.source.names,
        )
        check_ids(windows, pair)
        masked = None if pair.ids.alike else ~torch.from_numpy(pair.ids.common)
        options = evaluation_options(model_class, asked.compute, context, masked)
        cloze = cloze_of(windows, asked.additions.cloze) if asked.additions.cloze else None
        evaluator, because = Evaluator(pair.a, pair.b, windows, options), _because(pair)
        common = None if masked is None else ~masked
        ensemble = Ensemble(*pair.alone, windows, options, common) if asked.additions.ensemble else None
        alone = {side: model for side, model in zip("ab", pair.alone, strict=True) if because[side]}
        return cls(pair, asked, evaluator, spans, Additions(evaluator, alone, ensemble, cloze))

    def plan(self, paths: Sequence[str], merges: int = 0) -> Evaluation:
        """What a measurement on some paths takes.

        Args:
            merges: that are read anew from both models, besides.
        """
        grid = self.asked.grid
        halfway = grid.halfway and MIDPOINT not in grid.t
        points = 1 + len(paths) * (len(grid.t) - 1 + halfway) + len(self.spans) * len(grid.steps)
        cost, alone = self.evaluator.cost(paths, points), self.additions.alone.values()
        besides = self.additions.nbytes + merges * cost.bytes_of_both
        return Evaluation(
            cost=cost,
            points=points,
            tokens=int(self.evaluator.windows.scored.sum()),
            refinements=grid.refine,
            own_bytes=sum(2 * model.checkpoint.nbytes for model in alone) + besides,
        )

    def check_processes(self) -> None:
        """Raises MismatchError where the processes do not see the same text."""
        process_group().check_equal({"text": self.evaluator.windows.describe()["tokens_sha256"]})

    def facts(self) -> dict[str, Any]:
        """What the losses depend on besides the models."""
        options = self.evaluator.options
        return {
            "windows": self.evaluator.windows.describe(),
            "t": self.asked.grid.t,
            "dtype": str(options.dtype),
            "batch_size": options.batch_size,
            **vars(self.asked.additions),
        }

    def measure(
        self,
        symmetries: Mapping[str, ModelSymmetry],
        matching: dict[str, Any],
        workspace: Workspace | None,
        started: float,
        merged: Merged | None = None,
    ) -> BarrierReport:
        """Losses on the paths to B in the coordinates of some symmetries; warns of what the reader of the report should know.

        Args:
            matching: what the report says of how B was aligned.
            started: when the work began, by `time.perf_counter`.
            merged: merges as an output stores them.
        """
        measurement = Measurement(self.evaluator, symmetries, self.asked.grid, self.spans, workspace, merged or Merged())
        report = measurement.report(self.asked.source.describe(), matching, started, self._own())
        _warn(report, along=self.asked.grid.halfway)
        return report

    def with_additions(
        self,
        report: BarrierReport,
        symmetries: Mapping[str, ModelSymmetry],
        t: Collection[float],
        others: OtherMerges,
        workspace: Workspace | None,
        started: float,
    ) -> BarrierReport:
        """Ensemble and cloze task at some t, where they were asked for; then the report is whole.

        Args:
            symmetries: of the paths, the one first that repairs are made of.
            others: merges that are no points of these paths.
            started: when the work began, by `time.perf_counter`.
        """
        if self.additions.ensemble or self.additions.cloze:
            found = self.additions.measure(symmetries, sorted(t), others, workspace)
            added = {
                at: replace(one, stored=report.added[at].stored) if at in report.added else one for at, one in found.items()
            }
            report = replace(report, added={**report.added, **added}, questions=self.additions.cloze)
        return replace(report, seconds=process_group().from_main(time.perf_counter() - started))

    def _own(self) -> dict[str, dict[str, Any]] | None:
        """The losses of the models by themselves, where their configuration or vocabulary is not that of the path."""
        because = _because(self.pair)
        found = {
            side: {**own_losses(model, self.evaluator.windows, self.evaluator.options), "because": because[side]}
            for side, model in self.additions.alone.items()
        }
        return found or None


def _because(pair: Pair) -> dict[str, list[str]]:
    """By side, what of a model by itself is another on the path."""
    other = [] if pair.ids.alike else ["vocabulary"]
    return {"a": other, "b": [*function_settings(pair.a, pair.b), *other]}


def check_ids(windows: Windows, pair: Pair) -> None:
    """Raises InputError where a text uses token ids that one of two models does not have."""
    used = torch.cat(windows.rows).unique().numpy()
    for side, model, has in (("A", pair.a, pair.ids.has_a), ("B", pair.b, pair.ids.has_b)):
        missing = [int(number) for number in used if number >= len(has) or not has[number]]
        if missing:
            raise InputError(
                f"the text uses token ids that {side} ({model.checkpoint.name}) has no token for: "
                f"{', '.join(map(str, missing[:5]))}; take a text without them, or models with one tokenizer"
            )


def _warn(report: BarrierReport, *, along: bool) -> None:
    """Warns of what the reader of a report should know.

    Args:
        along: a path was measured; otherwise its ends and the t that were given, between which nothing is missed.
    """
    for problem in report.not_finite:
        warn(problem)
    if "routing_unavailable" in report.evaluation:
        warn(f"{report.a['source']}: the routing cannot be watched: {report.evaluation['routing_unavailable']}")
    for warning in report.warnings if along else [report.disagreement] if report.disagreement else []:
        warn(warning)


def given_symmetry(symmetry: ModelSymmetry, file: str | None) -> dict[str, Any]:
    """The `matching` of report.json where nothing was matched.

    Args:
        file: where the symmetry was read from.
    """
    return {"symmetry": file and Path(file).name, **symmetry.metadata}  # no path of this machine
