"""What `merge` does once its inputs have been opened and checked."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, download_checkpoints
from hf_moe_lmc.checkpoints.token_ids import TokenIds
from hf_moe_lmc.publishing.card import Destination
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.repair.options import line_of
from hf_moe_lmc.runtime.documents import as_json
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.verbs.earlier_report import EarlierReport
from hf_moe_lmc.verbs.inputs import Pair, download
from hf_moe_lmc.verbs.job import Job
from hf_moe_lmc.verbs.merge_card import SYMMETRY, WrittenMerge, merge_card
from hf_moe_lmc.verbs.merge_points import MergePoints, within
from hf_moe_lmc.verbs.planning import Evaluation, Leaving, Work
from hf_moe_lmc.writing.formats import model_merge, plain_merge, write_beside
from hf_moe_lmc.writing.output import FolderWriter, TensorStream, check_room, open_writer
from hf_moe_lmc.writing.workspace import Workspace

# Nothing of transformers is imported for a plain merge.
if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.matching.options import WeightMatching
    from hf_moe_lmc.moe.action import Elements
    from hf_moe_lmc.path.evaluation import Merged
    from hf_moe_lmc.perplexity.report import BarrierReport
    from hf_moe_lmc.repair.widened import Widening
    from hf_moe_lmc.symmetry.group import ModelSymmetry
    from hf_moe_lmc.verbs.as_stored import Storing
    from hf_moe_lmc.verbs.measuring import Subject
    from hf_moe_lmc.verbs.repairing import Repaired, Repairing


@dataclass(frozen=True)
class PlainMerge(Job["Alignment | None"]):
    """Two checkpoints with the same tensors, as they are.

    Attributes:
        earlier: a report for the card.
    """

    a: Checkpoint
    b: Checkpoint
    ids: TokenIds
    points: MergePoints
    destination: Destination
    earlier: EarlierReport | None

    @property
    def work(self) -> Work:
        template = self.stream.template
        return Work(inputs=[self.a, self.b], template=template, folders=self.points.folders, facts=self.facts)

    @property
    def stream(self) -> TensorStream:
        return plain_merge(self.a, self.b, self.points.t, self.points.format)

    def facts(self) -> Mapping[str, Any]:
        keys = {"a": self.a.resume_key(), "b": self.b.resume_key()}
        return self.points.facts(self.a, self.b) | keys | (self.earlier.facts() if self.earlier else {})

    def run(self, workspace: Workspace | None) -> None:
        if not (self.a.is_downloaded and self.b.is_downloaded):
            from hf_moe_lmc.verbs.foretelling import foretell_known

            foretell_known(self.a, self.b)
        download_checkpoints(self.a, self.b)
        if self.earlier:
            self.earlier.check(self.a, self.b)
        inputs, points = [self.a, self.b], self.points
        with open_writer(workspace, self.facts(), inputs=inputs, allow_nonfinite=points.allow_nonfinite) as writer:
            if writer:
                stream = self.stream
                writer.write_tensors(stream, folders=points.folders)
                if self.earlier:
                    self.earlier.warn_of_another_path(None)
                for number, (folder, t) in enumerate(points.placed()):
                    write_beside(writer, stream, number, folder, speaker=points.speaker(self.b))
                    measured = self.earlier.put(writer, folder, t, None) if self.earlier else None
                    merge = WrittenMerge(
                        a=self.a,
                        b=self.b,
                        t=t,
                        ids=self.ids,
                        points=points,
                        destination=self.destination,
                        measured=measured,
                    )
                    writer.write_text(within(folder, "README.md"), merge_card(merge))


@dataclass(frozen=True)
class _Made:
    """What a merge is made with, as far as it is known.

    Attributes:
        alignment: None: nothing was matched, or is yet.
        known: B' is: nothing is left to match.
        repaired: by t; empty where no repair was asked for.
        report: of what was measured.
    """

    alignment: Alignment | None = None
    known: bool = False
    repaired: Mapping[float, Repaired] = field(default_factory=dict)
    report: BarrierReport | None = None


@dataclass(frozen=True)
class Merge(Job["Alignment | None"]):
    """Two models.

    Attributes:
        method: how B is matched to A; None: it is not, or was before.
        as_it_is: B is neither matched nor moved.
        file: where a given symmetry is from, for the card.
        subject: what is measured, before anything is written; None: nothing is.
        earlier: a report for the card.
        repairing: what the merges have in place of the points of the straight line; None: nothing.
        widening: the layout of merges with the experts of both; None: they have A's.
    """

    pair: Pair
    points: MergePoints
    method: WeightMatching | None
    as_it_is: bool
    destination: Destination
    file: str
    subject: Subject | None
    earlier: EarlierReport | None
    repairing: Repairing | None = None
    widening: Widening | None = None

    @property
    def inputs(self) -> list[Checkpoint]:
        return [self.pair.a.checkpoint, self.pair.b.checkpoint]

    @property
    def path(self) -> str:
        """Of the paths that are measured, the one that the merge is on."""
        return line_of(align=not self.as_it_is)

    @property
    def work(self) -> Work:
        return Work(
            inputs=self.inputs,
            template=self.template,
            folders=self.points.folders,
            models=[self.pair.a, self.pair.b],
            matched=self.method is not None,
            evaluated=self._evaluated,
            leaving=self._leaving,
            facts=None if self.points.best or self.is_calibrated else self.facts,
        )

    @property
    def _evaluated(self) -> Evaluation | None:
        """What measuring takes; None: nothing is measured."""
        if self.subject is None:
            return None
        paths = list(dict.fromkeys([self.path, "naive"]))
        stored = len(paths) if self._storing.rounds else 0
        leaving = 1 if self.repairing or self.widening else 0
        return self.subject.plan(paths, self._count * (stored + leaving))

    @property
    def _leaving(self) -> Leaving | None:
        """What it takes to leave the straight line; None: that is not left."""
        if self.widening:
            return Leaving(words=self.widening.sentence())
        return self.repairing.plan(self._count) if self.repairing else None

    @property
    def _count(self) -> int:
        """Merges that are written; where t is looked for, one."""
        return len(self.points.t) or 1

    @property
    def template(self) -> Checkpoint:
        """The layout of each output."""
        if self.widening:
            return self.widening.template
        return model_merge(self.pair.a, self.pair.b, self.pair.b.identity().layers, (), self.points.format).template

    @property
    def is_calibrated(self) -> bool:
        """Whether text decides about a repair, before anything is written."""
        return self.repairing is not None and self.repairing.calibration is not None

    @property
    def used(self) -> ModelSymmetry:
        """What B is taken by where nothing is matched."""
        return self.pair.symmetry or self.pair.b.identity()

    def facts(self) -> Mapping[str, Any]:
        from hf_moe_lmc.matching.alignment import matching_facts
        from hf_moe_lmc.symmetry.group import digest

        a, b = self.inputs
        found = self.points.facts(a, b) | (self.earlier.facts() if self.earlier else {})
        if self.subject:
            found |= {"measured": self.subject.facts()}
        if self.repairing:
            found |= self.repairing.facts()
        if self.widening:
            found |= {"widened": self.widening.facts()}
        if self.method:
            return found | matching_facts(self.pair.a, self.pair.b, self.method)
        return found | {"a": a.resume_key(), "b": b.resume_key(), "symmetry": digest(self.used)}

    def run(self, workspace: Workspace | None) -> Alignment | None:
        if self.pair.symmetry is None:
            from hf_moe_lmc.verbs.foretelling import foretell

            foretell(self.pair.a, self.pair.b)
        download(self.pair.a, self.pair.b, given=self.pair.symmetry)
        if self.earlier:
            self.earlier.check(*self.inputs)
        if self.widening:
            note(self.widening.sentence())
        if self.subject is None and not self.is_calibrated:
            return self._written(workspace, _Made())
        started = time.perf_counter()
        if self.subject:
            self.subject.check_processes()
        if workspace:
            check_room(workspace, self.template, self.points.folders)
        made = _Made(self._align(workspace) if self.method else None, known=True)
        if self.points.best:
            return self._best(made, workspace, started)
        made = replace(made, repaired=self._repaired(made, workspace, self.points.t))
        if self.subject:
            made = replace(made, report=self._measured(made, workspace, started))
        return self._written(workspace, made)

    def _best(self, made: _Made, workspace: Workspace | None, started: float) -> Alignment | None:
        """Finds t on the straight line; a repair is made at that t alone."""
        from hf_moe_lmc.verbs.merge_text import best_point

        report = self._on_paths(made, self._stored(made), workspace, started)
        t = (best_point(report, self.path),)
        found = replace(self, points=replace(self.points, t=t))
        made = replace(made, repaired=self._repaired(made, workspace, t))
        made = replace(made, report=found._with_merges(made, report, found._stored(made), workspace, started))
        return found._written(workspace, made)

    def _repaired(self, made: _Made, workspace: Workspace | None, t: Sequence[float]) -> dict[float, Repaired]:
        """The repair at each t; nothing where none was asked for."""
        if self.repairing is None:
            return {}
        return {at: self.repairing.at(self._symmetry(made), at, workspace) for at in t}

    def _symmetry(self, made: _Made) -> ModelSymmetry:
        return made.alignment.symmetry if made.alignment else self.used

    def _align(self, workspace: Workspace | None, **options: Any) -> Alignment:
        from hf_moe_lmc.matching.alignment import align_models

        assert self.method is not None
        found = align_models(
            self.pair.a,
            self.pair.b,
            self.method,
            allow_nonfinite=self.points.allow_nonfinite,
            workspace=workspace,
            **options,
        )
        return found if self.pair.ids.alike else replace(found, vocabulary=self.pair.ids.account())

    def _measured(self, made: _Made, workspace: Workspace | None, started: float) -> BarrierReport:
        """Both paths, or only that to B as it is, and the merges that are written."""
        stored = self._stored(made)
        return self._with_merges(made, self._on_paths(made, stored, workspace, started), stored, workspace, started)

    def _paths(self, made: _Made) -> dict[str, ModelSymmetry]:
        """What takes B to the end of each path that is measured."""
        return {self.path: self._symmetry(made), "naive": self.pair.b.identity()}

    def _stored(self, made: _Made) -> Merged:
        """The merges of the straight lines as they are written, where that is not what is computed."""
        return self._storing.points(self._paths(made), self.points.t)

    @cached_property
    def _storing(self) -> Storing:
        from hf_moe_lmc.verbs.as_stored import Storing

        assert self.subject is not None
        return Storing(self.pair, self.subject.evaluator, self.points.format)

    def _on_paths(self, made: _Made, stored: Merged, workspace: Workspace | None, started: float) -> BarrierReport:
        """What the paths measure, and merges of theirs as they are written."""
        from hf_moe_lmc.verbs.measuring import given_symmetry

        assert self.subject is not None
        matching = made.alignment.to_dict() if made.alignment else given_symmetry(self._symmetry(made), self.file or None)
        return self.subject.measure(self._paths(made), matching, workspace, started, stored)

    def _with_merges(
        self, made: _Made, report: BarrierReport, stored: Merged, workspace: Workspace | None, started: float
    ) -> BarrierReport:
        """With what the written merges measure: as they are stored, repaired or widened; and what was asked for besides."""
        from hf_moe_lmc.path.added import OtherMerges
        from hf_moe_lmc.verbs.as_stored import with_stored
        from hf_moe_lmc.verbs.repaired_path import with_repaired, with_widened
        from hf_moe_lmc.verbs.repairing import ENDS

        assert self.subject is not None
        subject, t, path, used = self.subject, self.points.t, self.path, self._symmetry(made)
        others = OtherMerges()
        missing = t if self.points.best else [at for at in t if at in ENDS]
        report = with_stored(report, subject.evaluator, self._paths(made), stored, missing, workspace)
        if self.widening:
            report, others = with_widened(subject, report, path, used, self.widening, t, workspace)
        elif made.repaired:
            report, others = with_repaired(subject, report, path, used, made.repaired, workspace, self._storing)
        others = replace(others, merged=stored | others.merged)
        return subject.with_additions(report, self._paths(made), t, others, workspace, started)

    def _written(self, workspace: Workspace | None, made: _Made) -> Alignment | None:
        """Writes everything; what is not known yet is matched meanwhile."""
        from hf_moe_lmc.writing.pipeline import pending, written_meanwhile

        allow, points = self.points.allow_nonfinite, self.points
        facts = {
            **self.facts(),
            **({"repaired": [one.facts() for one in made.repaired.values()]} if self.is_calibrated else {}),
        }
        with open_writer(workspace, facts, inputs=self.inputs, allow_nonfinite=allow) as writer:
            awaited = pending(self.pair.b.layers) if self.method and not made.known else None
            moved = awaited or self._symmetry(made).layers
            if not made.known:
                made = replace(made, repaired=self._repaired(made, workspace, points.t))
            runs = self._runs(moved, made)
            if awaited is not None:
                ((stream, folders),) = runs
                with written_meanwhile(writer, stream, awaited, folders=folders) as deliver:
                    made = replace(made, alignment=self._align(workspace, deliver=deliver))
            if writer:
                for stream, folders in runs if awaited is None else ():
                    writer.write_tensors(stream, folders=folders)
                if self.earlier:
                    self.earlier.warn_of_another_path(self._moved_by(made.alignment))
                streams = [(stream, number) for stream, folders in runs for number, _ in enumerate(folders)]
                for (stream, number), (folder, t) in zip(streams, points.placed(), strict=True):
                    write_beside(writer, stream, number, folder, speaker=points.speaker(self.pair.b.checkpoint))
                    self._write_files(writer, folder, t, made)
        return made.alignment

    def _runs(self, moved: Elements, made: _Made) -> list[tuple[TensorStream, Sequence[str]]]:
        """Streams with their folders: all points in one, unless each has fitted weights of its own."""
        a, b, points = self.pair.a, self.pair.b, self.points
        if self.widening:
            return [(self.widening.stream(moved, points.t), points.folders)]
        if not self.is_calibrated:
            merging = self.repairing.data_free if self.repairing else None
            return [(model_merge(a, b, moved, points.t, points.format, merging), points.folders)]
        return [
            (model_merge(a, b, moved, (t,), points.format, made.repaired[t].merging), (folder,))
            for folder, t in points.placed()
        ]

    def _moved_by(self, alignment: Alignment | None) -> ModelSymmetry | None:
        """What B is taken by; None: it is as it is."""
        return alignment.symmetry if alignment else self.pair.symmetry

    def _write_files(self, writer: FolderWriter, folder: str, t: float, made: _Made) -> None:
        """What says how a merge was made: the symmetry, the reports and the card."""
        from hf_moe_lmc.verbs.align import write_alignment

        a, b = self.inputs
        alignment, repaired = made.alignment, made.repaired.get(t)
        moved_by = self._moved_by(alignment)
        if alignment:
            write_alignment(writer, alignment, within(folder, "alignment/"))
        elif moved_by:
            moved_by.save(writer.path(within(folder, "alignment/symmetry.safetensors")))
        if repaired:
            writer.write_text(within(folder, "repair.json"), as_json(repaired.record))
        merge = WrittenMerge(
            a=a,
            b=b,
            t=t,
            ids=self.pair.ids,
            points=self.points,
            destination=self.destination,
            alignment=alignment,
            symmetry=self.pair.symmetry,
            symmetry_name=self.file or SYMMETRY,
            measured=self._for_card(writer, folder, t, made),
            repaired=repaired,
            widened=self.widening.sentence() if self.widening else None,
        )
        writer.write_text(within(folder, "README.md"), merge_card(merge))

    def _for_card(self, writer: FolderWriter, folder: str, t: float, made: _Made) -> Measured | None:
        """Writes what was measured of a merge, or copies what an earlier call has measured."""
        if made.report is None:
            return self.earlier.put(writer, folder, t, self._moved_by(made.alignment)) if self.earlier else None
        from hf_moe_lmc.perplexity.verdict import MergedAt
        from hf_moe_lmc.verbs.merge_text import write_report

        repaired = made.repaired.get(t)
        record = repaired.record if repaired else self.widening.record(t) if self.widening else None
        path = "repaired" if record and record["accepted"] else self.path
        report = replace(made.report, merge=MergedAt(t, path, self.points.best), repair=record)
        return write_report(writer, folder, report)
