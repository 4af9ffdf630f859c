"""The merges of two models as an output stores them, so that what is measured is what is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.endpoints import Point, stored
from hf_moe_lmc.path.evaluation import Evaluator, Merged
from hf_moe_lmc.perplexity.report import Added, BarrierReport
from hf_moe_lmc.perplexity.scores import Scores
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.verbs.inputs import Pair
from hf_moe_lmc.writing.formats import OutputFormat, format_facts, model_merge, written_merge
from hf_moe_lmc.writing.spans import Copied
from hf_moe_lmc.writing.streams import STRAIGHT, Merging, ModelStream, interpolated
from hf_moe_lmc.writing.workspace import Workspace


@dataclass(frozen=True)
class Storing:
    """How an output stores the merges of two models.

    Attributes:
        evaluator: what they run in.
        format: of the output; None: nothing is written.
    """

    pair: Pair
    evaluator: Evaluator
    format: OutputFormat | None

    @cached_property
    def rounds(self) -> bool:
        """Whether weights are stored more coarsely than the models run: quantized, or in a narrower dtype."""
        if self.format is None:
            return False
        template = model_merge(self.pair.a, self.pair.b, self.pair.b.identity().layers, (), self.format).template
        layout = (self.pair.b if self.format == "b" else self.pair.a).checkpoint
        if self.format != "bf16" and storage_of(layout) is not None:
            return True
        return not self.evaluator.holds({info.dtype for info in template.tensors.values()})

    def merge(self, symmetry: ModelSymmetry, t: float, merging: Merging | None = None) -> ModelStream:
        """A merge as it is stored; where that changes nothing, as it is computed.

        Args:
            merging: how it is made; None: on the straight line.
        """
        a, b = self.pair.a, self.pair.b
        if self.format is None or not self.rounds:
            return interpolated(a, b, symmetry.layers, t, merging=merging or STRAIGHT)
        model: MoEModel = written_merge(a, b, symmetry.layers, t, self.format, merging)
        return ModelStream(model, dict(model.layers), Copied(model.checkpoint))

    def facts(self) -> dict[str, Any]:
        """What losses depend on besides the merges."""
        return {"stored": format_facts(self.format, "a")} if self.format is not None and self.rounds else {}

    def points(self, symmetries: Mapping[str, ModelSymmetry], t: Sequence[float]) -> Merged:
        """The merges of straight lines as they are stored; none where storing them changes nothing."""
        if not self.rounds:
            return Merged()
        streams = {(stored(path), at): self.merge(symmetry, at) for path, symmetry in symmetries.items() for at in t}
        moved = {path: digest(symmetry) for path, symmetry in symmetries.items()}
        return Merged(streams, {**self.facts(), "stored_paths": moved})


def with_stored(
    report: BarrierReport,
    evaluator: Evaluator,
    symmetries: Mapping[str, ModelSymmetry],
    merged: Merged,
    t: Sequence[float],
    workspace: Workspace | None,
) -> BarrierReport:
    """A report with what the merges at some t measure as they are stored, where its paths do not have them."""
    points = [Point(path, at) for path, at in merged.streams if at in t]
    if not points:
        return report
    scores, cost = evaluator.score(symmetries, points, merged=merged, progress=workspace, told="evaluating merges as stored")
    names = {stored(path): path for path in symmetries}
    added = dict(report.added)
    for i, point in enumerate(points):
        before, one = added.get(point.t, Added()), Scores(scores.losses[i : i + 1], scores.right[i : i + 1])
        added[point.t] = replace(before, stored={**before.stored, names[point.path]: one})
    evaluation = {**report.evaluation, "passes": report.evaluation["passes"] + cost.passes}
    return replace(report, added=added, evaluation=evaluation)
