"""The verb `barrier`: the main job, the perplexity barrier between two checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_moe_lmc.errors import refuse_idle
from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.path.added import OtherMerges
from hf_moe_lmc.path.measurement import check_device
from hf_moe_lmc.path.options import DType
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.perplexity.text import GivenText
from hf_moe_lmc.plots.options import PlotKind, PlotOptions
from hf_moe_lmc.repair.options import RepairName, repair_options
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.foretelling import foretell
from hf_moe_lmc.verbs.inputs import Inputs, download
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.measuring import Asked, Subject, given_symmetry
from hf_moe_lmc.verbs.options import OutputOptions, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.verbs.repaired_path import CALIBRATED, repaired_t, with_repaired
from hf_moe_lmc.verbs.repairing import Repairing
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
    ensemble: bool | None = None,
    cloze: int | None = None,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    repair: RepairName | None = None,
    calibration: GivenText | None = None,
    calibration_a: GivenText | None = None,
    calibration_b: GivenText | None = None,
    calibration_tokens: int | None = None,
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
        ensemble: measure the ensemble of A and B as well, the mean of their logits and that of their probabilities, with equal
            weights, and with the weights 1 - t and t where the path has its least loss. By default it is not.
        cloze: questions of each text, at most, of a cloze task made from it; by default none. See `perplexity.cloze`.
        symmetry: a saved or given symmetry instead of matching.
        repair, calibration, calibration_a, calibration_b, calibration_tokens: also measure merges repaired as by `merge`, each
            for its own t, as a path `repaired` of their own. A repair without text is measured at every t of the grid. One
            with text is fitted and measured at t = 0.25, 0.5, 0.75 and that of the least aligned loss: each takes the time of
            a `merge`.
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
    asked, matching, plots = Asked.of(given), filled(WeightMatching, given), filled(PlotOptions, given)
    if symmetry is not None:
        refuse_idle({"order": order, "units": units, "exact": exact or None}, "nothing is matched")
    repairing = repair_options(given)
    check_device(device)
    file = None if symmetry is None or isinstance(symmetry, ModelSymmetry) else os.fspath(symmetry)

    def prepare(inputs: Inputs) -> Job[BarrierReport]:
        pair = inputs.pair(a, b, symmetry=symmetry)
        subject = Subject.of(pair, asked)
        repaired = Repairing.of(pair, repairing, given) if repairing else None
        if repaired:
            repaired.check_apart(subject.evaluator.windows)
        return _Barrier(subject, matching, file, plots, repaired)

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


@dataclass(frozen=True)
class _Barrier(Job[BarrierReport]):
    """Two models and a text that fit.

    Attributes:
        method: how B is matched to A, unless a symmetry was given.
        file: where that was read from.
        repairing: what merges have in place of the points of the straight line; None: nothing.
    """

    subject: Subject
    method: WeightMatching
    file: str | None
    plots: PlotOptions
    repairing: Repairing | None

    @property
    def paths(self) -> tuple[str, ...]:
        return ("aligned", "naive") if self.subject.asked.grid.naive else ("aligned",)

    @property
    def work(self) -> Work:
        pair = self.subject.pair
        return Work(
            inputs=[pair.a.checkpoint, pair.b.checkpoint],
            models=[pair.a, pair.b],
            matched=pair.symmetry is None,
            evaluated=self.subject.plan(self.paths),
            leaving=self.repairing.plan(len(CALIBRATED) + 1) if self.repairing else None,
        )

    def run(self, workspace: Workspace | None) -> BarrierReport:
        pair = self.subject.pair
        with open_writer(workspace) as writer:
            started = time.perf_counter()
            foretell(pair.a, pair.b)
            download(pair.a, pair.b, given=pair.symmetry)
            self.subject.check_processes()
            aligned, matching = self._aligned(workspace)
            symmetries = {"aligned": aligned, "naive": pair.b.identity()}
            on_paths = {path: symmetries[path] for path in self.paths}
            report, others = self.subject.measure(on_paths, matching, workspace, started), OtherMerges()
            if self.repairing:
                t = repaired_t(self.repairing, report, "aligned")
                repaired = {at: self.repairing.at(aligned, at, workspace) for at in t}
                report, others = with_repaired(self.subject, report, "aligned", aligned, repaired, workspace)
            named = {report.references.t, report.verdict.t}
            report = self.subject.with_additions(report, on_paths, named, others, workspace, started)
            if writer:
                aligned.save(writer.path("symmetry.safetensors"))
                writer.write_text("report.json", report.to_json())
                writer.write_text("report.md", report.to_markdown())
                report.plot(writer.path("barrier.png"), self.plots.plot)
        return report

    def _aligned(self, workspace: Workspace | None) -> tuple[ModelSymmetry, dict[str, Any]]:
        """What B is aligned with, and what a report says of it."""
        pair = self.subject.pair
        if pair.symmetry is not None:
            return pair.symmetry, given_symmetry(pair.symmetry, self.file)
        alignment = align_models(pair.a, pair.b, self.method, workspace=workspace)
        return alignment.symmetry, alignment.to_dict()
