"""The verb `barrier`: the main job, the perplexity barrier between two checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_moe_lmc.errors import InputError, refuse_idle
from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.pair import function_settings
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.path.measurement import Measurement, check_device, evaluation_options, layer_spans, own_losses
from hf_moe_lmc.path.options import ComputeOptions, DType, GridOptions
from hf_moe_lmc.path.tokenizer import common_tokenizer, context_length
from hf_moe_lmc.perplexity.report import BarrierReport, Span
from hf_moe_lmc.perplexity.text import Text, TextOptions
from hf_moe_lmc.perplexity.windows import WindowOptions, Windows, cut_texts
from hf_moe_lmc.plots.options import PlotKind, PlotOptions
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import Inputs, Pair, download
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.options import OutputOptions, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.writing.output import open_writer
from hf_moe_lmc.writing.workspace import Workspace


@verb
def barrier(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    split: str | None = None,
    column: str | None = None,
    join: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    points: int | None = None,
    naive: bool | None = None,
    layerwise: int | None = None,
    layers: str | None = None,
    refine: int | None = None,
    routing: bool | None = None,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    order: OrderMethod | None = None,
    units: UnitMethod | None = None,
    exact: bool | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    activation_memory: int | None = None,
    plot: PlotKind | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    resume: bool | None = None,
    overwrite: bool | None = None,
) -> Request[BarrierReport]:
    """Measures the perplexity barrier between two checkpoints, naive and aligned.

    Several processes (torchrun) share the layers to match and the batches of windows; process 0 writes. `barrier.plan` takes
    the same arguments and returns the Plan: a dry run.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        output: a new or empty folder for report.json, report.md, barrier.png, barrier.svg and symmetry.safetensors.
        text: a UTF-8 file or several, each one document, where .json, .jsonl, .csv, .tsv, .parquet and .arrow files have a
            document in each row; or `dataset`, whose rows are documents. Several are reported one by one and as their mean,
            by the stems of the files or by names of yours: a mapping from names to files, or strs NAME=FILE. See
            `TextOptions`.
        dataset_config, dataset_revision, split: of the dataset; by default its split `test`.
        column: where the text of a row stands, by default `text`.
        join: put between rows, which are then one document, such as "\\n\\n"; None: each row is a document.
        context: tokens per window, by default 2048 or the model's maximum if that is less.
        stride: tokens of text between the starts of windows, which then overlap, and each is scored only where the one before
            ended; None: no overlap.
        max_tokens: tokens to read of each file or of the dataset; None reads everything. No more text is read than they need.
        points: grid points from t = 0 to t = 1, both included, by default 25.
        naive: evaluate the path to B as it is, too (the default).
        layerwise: inner points of the paths on which some layers alone leave A for their aligned place in B; by default none,
            or 5 where `layers` says which.
        layers: decoder layers for `layerwise`, such as "0-3,8": those of a range together, 8 alone; "each", the default,
            stands for every MoE layer alone.
        refine: how many times the intervals beside the maximum of the aligned curve are halved, by default 0; both paths get
            the new points. Each time reads both models again.
        routing: record at each point which experts the tokens take (the default); those that `refine` adds cost both ends
            again.
        symmetry: a saved or given symmetry instead of matching.
        order, units, exact: as for `align`.
        dtype: in which the models run: float32 (the default), bfloat16 or float16.
        device: where the layers run; by default a GPU if there is one.
        batch_size: windows per forward pass, by default about 4096 tokens' worth.
        activation_memory: bytes for the hidden states of all points and windows on their way; the smaller, the more often both
            models are read. By default half of the memory that is free.
        plot: "interactive" also writes barrier.html, one page with all plots to hover over and zoom into, which needs Plotly
            (`pip install 'hf_moe_lmc[interactive]'`); by default "static", pictures alone.
        push_to_hub: OWNER/NAME to publish the folder under, with report.md as its card where there is none; weights that are
            there do not matter.
        private: publish it as a private repository.
        resume: continue from what an earlier call with the same inputs and options had done when it was stopped (the
            default): the layers that it had matched, and what had gone through the whole model.
        overwrite: `output` may be what this package wrote before; it is replaced when the new one is whole.

    Raises:
        InputError: the inputs do not fit, before anything is written.
        ForeignError: transformers cannot build or run the model.

    Example:
        >>> report = lmc.barrier("model-a", "model-b", "barrier", text="held_out.txt")  # doctest: +SKIP
        >>> report.aligned.barrier  # nats per token  # doctest: +SKIP
        0.204
    """
    given = locals()
    asked = _Asked(
        source=filled(TextOptions, given).source(),
        windows=filled(WindowOptions, given),
        grid=filled(GridOptions, given),
        compute=filled(ComputeOptions, given),
        matching=filled(WeightMatching, given),
        plots=filled(PlotOptions, given),
    )
    if symmetry is not None:
        refuse_idle({"order": order, "units": units, "exact": exact or None}, "nothing is matched")
    check_device(device)
    file = None if symmetry is None or isinstance(symmetry, ModelSymmetry) else os.fspath(symmetry)

    def prepare(inputs: Inputs) -> Job[BarrierReport]:
        pair = inputs.pair(a, b, symmetry=symmetry)
        model_class = language_model_class(pair.a)
        spans = layer_spans(asked.grid.layers, pair.a) if asked.grid.steps else []
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
        evaluator = Evaluator(pair.a, pair.b, windows, evaluation_options(model_class, asked.compute, context, masked))
        return _Barrier(evaluator, asked, spans, pair, file)

    return Request(
        verb="barrier",
        output=output,
        inputs=(a, b),
        options=filled(OutputOptions, given),
        prepare=prepare,
        writes_weights=False,
        dtype=asked.compute.dtype,
    )


plan_barrier = barrier.plan


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a barrier is asked for, but for the models."""

    source: Text
    windows: WindowOptions
    grid: GridOptions
    compute: ComputeOptions
    matching: WeightMatching
    plots: PlotOptions


@dataclass(frozen=True)
class _Barrier(Job[BarrierReport]):
    """Two models and a text that fit.

    Attributes:
        spans: first and last of the decoder layers that are also interpolated without the others.
        pair: with what B is aligned with; None: it is still to be found.
        file: where that was read from.
    """

    evaluator: Evaluator
    asked: _Asked
    spans: Sequence[Span]
    pair: Pair
    file: str | None

    @property
    def paths(self) -> tuple[str, ...]:
        return ("aligned", "naive") if self.asked.grid.naive else ("aligned",)

    @property
    def work(self) -> Work:
        models, grid = [self.evaluator.a, self.evaluator.b], self.asked.grid
        points = 1 + len(self.paths) * (grid.points - 1) + len(self.spans) * len(grid.steps)
        return Work(
            inputs=[model.checkpoint for model in models],
            models=models,
            matched=self.pair.symmetry is None,
            evaluated=self.evaluator.cost(self.paths, points),
        )

    def run(self, workspace: Workspace | None) -> BarrierReport:
        a, b = self.evaluator.a, self.evaluator.b
        with open_writer(workspace) as writer:
            started = time.perf_counter()
            download(a, b, given=self.pair.symmetry)
            process_group().check_equal({"text": self.evaluator.windows.describe()["tokens_sha256"]})
            aligned, matching = self._aligned(workspace)
            symmetries = {"aligned": aligned, **({"naive": b.identity()} if self.asked.grid.naive else {})}
            measurement = Measurement(self.evaluator, symmetries, self.asked.grid, self.spans, workspace)
            report = measurement.report(self.asked.source.describe(), matching, started, self._own())
            _warn(report)
            if writer:
                aligned.save(writer.path("symmetry.safetensors"))
                writer.write_text("report.json", report.to_json())
                writer.write_text("report.md", report.to_markdown())
                report.plot(writer.path("barrier.png"), self.asked.plots.plot)
        return report

    def _aligned(self, workspace: Workspace | None) -> tuple[ModelSymmetry, dict[str, Any]]:
        """What B is aligned with, and what a report says of it."""
        given = self.pair.symmetry
        if given is not None:
            return given, {"symmetry": self.file and Path(self.file).name, **given.metadata}  # no path of this machine
        alignment = align_models(self.evaluator.a, self.evaluator.b, self.asked.matching, workspace=workspace)
        return alignment.symmetry, alignment.to_dict()

    def _own(self) -> dict[str, dict[str, Any]] | None:
        """The losses of the models by themselves, where their configuration or vocabulary is not that of the path."""
        other = [] if self.pair.ids.alike else ["vocabulary"]
        because = {"a": other, "b": [*function_settings(self.pair.a, self.pair.b), *other]}
        found = {
            side: {**own_losses(model, self.evaluator.windows, self.evaluator.options), "because": because[side]}
            for side, model in zip("ab", self.pair.alone, strict=True)
            if because[side]
        }
        return found or None


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


def _warn(report: BarrierReport) -> None:
    """Warns of what the reader of a report should know."""
    for problem in report.not_finite:
        warn(problem)
    if "routing_unavailable" in report.evaluation:
        warn(f"{report.a['source']}: the routing cannot be watched: {report.evaluation['routing_unavailable']}")
    for warning in report.warnings:
        warn(warning)
