"""What is measured besides the losses along the paths: the ensemble of both parents, and a cloze task."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.path.endpoints import Point, stored
from hf_moe_lmc.path.ensemble import Ensemble
from hf_moe_lmc.path.evaluation import Evaluator, Merged
from hf_moe_lmc.perplexity.cloze import Cloze
from hf_moe_lmc.perplexity.references import REPAIRED
from hf_moe_lmc.perplexity.report import Added
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.workspace import Workspace

ASKING = "asking the cloze task"  # of a progress bar


@dataclass(frozen=True)
class OtherMerges:
    """Merges that are no points of the straight lines.

    Attributes:
        merged: as an output stores them, on paths named by `stored`; and repaired ones on the path REPAIRED.
        models: by t, merges of another size, which are called REPAIRED, too.
        refused: the t at which the repaired merge is that of the first path.
    """

    merged: Merged = field(default_factory=Merged)
    models: Mapping[float, MoEModel] = field(default_factory=dict)
    refused: Collection[float] = ()

    def on(self, path: str, t: float, symmetries: Collection[str]) -> Point:
        """Where the merge of a path is evaluated."""
        name = stored(path)
        return Point(name if (name, t) in self.merged.streams else path if t > 0 else next(iter(symmetries)), t)


@dataclass(frozen=True)
class Additions:
    """What is to be measured at some t of the paths; everything has been checked.

    Attributes:
        evaluator: of the points of the paths.
        alone: by side (`a`, `b`), a model that by itself is another than on the path.
        ensemble: of both parents; None: not asked for.
        cloze: None: not asked for.
    """

    evaluator: Evaluator
    alone: Mapping[str, MoEModel]
    ensemble: Ensemble | None
    cloze: Cloze | None

    @property
    def nbytes(self) -> int:
        """That are read."""
        found = 0
        if self.ensemble:
            found += self.ensemble.nbytes * (1 + (self.cloze is not None))
        if self.cloze:
            path, alone = self.evaluator, self.alone.values()
            found += path.a.checkpoint.stored.nbytes + path.b.checkpoint.stored.nbytes
            found += sum(2 * model.checkpoint.nbytes for model in alone)
        return found

    def measure(
        self,
        symmetries: Mapping[str, ModelSymmetry],
        t: Sequence[float],
        others: OtherMerges,
        workspace: Workspace | None,
    ) -> dict[float, Added]:
        """By t, in one more pass over both models for each of ensemble and cloze, whatever the number of t."""
        found = {at: Added() for at in t}
        if self.ensemble:
            for at, scores in self.ensemble.score(t, workspace).items():
                found[at] = replace(found[at], ensembles=scores)
        if self.cloze:
            for at, right in self._answers(self.cloze, symmetries, t, others, workspace).items():
                found[at] = replace(found[at], cloze=right)
            if self.ensemble:
                asked = self.ensemble.on(self.cloze.rows, self._at_once(self.cloze))
                for at, scores in asked.score(t, workspace).items():
                    right = {kind: self.cloze.right(of.losses[0]) for kind, of in scores.items()}
                    found[at] = replace(found[at], cloze_ensembles=right)
        return found

    def _at_once(self, cloze: Cloze) -> int:
        """Windows in one forward pass: as many tokens as elsewhere."""
        tokens = self.evaluator.options.batch_size * self.evaluator.windows.context
        return max(1, tokens // max(len(row) for row in cloze.rows.rows))

    def _answers(
        self,
        cloze: Cloze,
        symmetries: Mapping[str, ModelSymmetry],
        t: Sequence[float],
        others: OtherMerges,
        workspace: Workspace | None,
    ) -> dict[float, dict[str, Tensor]]:
        """Questions that parents and merges answer right, by t and model: float64 [question]."""
        evaluator, merged = self.evaluator.on(cloze.rows, self._at_once(cloze)), others.merged
        names = list(symmetries)
        ends = {"a": Point(names[0], 0.0), "b": Point("naive" if "naive" in symmetries else names[0], 1.0)}
        merges = {at: {name: others.on(name, at, names) for name in names} for at in t}
        for at in t:
            if (REPAIRED, at) in merged.streams:
                merges[at][REPAIRED] = Point(REPAIRED, at)
            elif at in others.refused:
                merges[at][REPAIRED] = merges[at][names[0]]
        points = list(dict.fromkeys([*ends.values(), *(point for of_t in merges.values() for point in of_t.values())]))
        losses, _ = evaluator.evaluate(symmetries, points, progress=workspace, merged=merged, told=ASKING)
        right = dict(zip(points, cloze.right(losses), strict=True))
        parents = {side: right[point] for side, point in ends.items()}
        for side, model in self.alone.items():
            parents[side] = self._answers_of(cloze, model, replace(evaluator.options, masked=None))
        found = {at: {**parents, **{name: right[point] for name, point in of_t.items()}} for at, of_t in merges.items()}
        for at, model in others.models.items():
            found[at][REPAIRED] = self._answers_of(cloze, model, evaluator.options, workspace)
        return found

    def _answers_of(
        self, cloze: Cloze, model: MoEModel, options: EvaluationOptions, workspace: Workspace | None = None
    ) -> Tensor:
        """Questions that a model by itself answers right: float64 [question]."""
        alone = Evaluator(model, model, cloze.rows, options)
        losses, _ = alone.evaluate({"naive": model.identity()}, [Point("naive", 0.0)], progress=workspace, told=ASKING)
        return cloze.right(losses)[0]
