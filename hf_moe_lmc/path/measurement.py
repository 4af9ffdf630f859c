"""A measurement along the paths between two models: points, refinement, single layers, routing, and the report of it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe_lmc.checkpoints.pair import origins
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.path.cost import Cost, EvaluationOptions
from hf_moe_lmc.path.endpoints import Point, stored
from hf_moe_lmc.path.evaluation import Evaluator, Merged
from hf_moe_lmc.path.options import ComputeOptions, GridOptions
from hf_moe_lmc.path.point_model import implementations
from hf_moe_lmc.path.routing import RoutingObserver
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.report import BarrierReport, LayerLosses, Span
from hf_moe_lmc.perplexity.verdict import MIDPOINT
from hf_moe_lmc.perplexity.windows import TOKENS_PER_BATCH, Windows
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.workspace import Workspace


@dataclass(frozen=True)
class _Found:
    """What evaluations have found, one after the other.

    Attributes:
        losses: of each window, float64 [window], nats.
        right: tokens of each window that are the first choice, float64 [window].
        routing: records as in report.json.
        facts: of the model that ran.
        problem: why there is no routing.
    """

    losses: dict[Point, Tensor]
    right: dict[Point, Tensor]
    cost: Cost
    routing: list[dict[str, Any]]
    facts: dict[str, Any]
    problem: str | None

    def __or__(self, later: _Found) -> _Found:
        """With points that were added; the routing at points that both have is that of the first."""
        known = {(row["path"], row["t"]) for row in self.routing}
        rows = [*self.routing, *(row for row in later.routing if (row["path"], row["t"]) not in known)]
        rows.sort(key=lambda row: (row["path"], row["t"], row["layer"], row["module"]))
        cost = replace(self.cost, passes=self.cost.passes + later.cost.passes)
        return _Found(later.losses | self.losses, later.right | self.right, cost, rows, self.facts, self.problem)


@dataclass(frozen=True)
class Measurement:
    """Losses and routing on the paths between two models; everything has been checked.

    Attributes:
        symmetries: of the paths, the one first that decides: `aligned`, unless B is taken as it is.
        spans: first and last of the decoder layers that are also interpolated without the others.
        merged: merges as an output stores them, on paths named by `stored`; between the ends they take the place of the
            points of the straight line.
    """

    evaluator: Evaluator
    symmetries: Mapping[str, ModelSymmetry]
    grid: GridOptions
    spans: Sequence[Span]
    progress: Workspace | None
    merged: Merged = field(default_factory=Merged)

    @property
    def windows(self) -> Windows:
        return self.evaluator.windows

    def run(self) -> tuple[_Found, tuple[float, ...]]:
        """All points, those that `refine` adds included, and the grid with these."""
        t, grid = self.grid.t, self.grid
        halfway = [self.on(path, MIDPOINT) for path in self.symmetries if grid.halfway and MIDPOINT not in t]
        found = self.evaluate([*self.points(t), *halfway, *(point for span in self.spans for point in self.alone(span))])
        for _ in range(grid.refine):
            new = _beside_the_maximum(self.curve(found, t))
            if not new:
                break
            t = tuple(sorted({*t, *new}))
            # the routing at a point is compared with that at the ends, which have to run once more
            added = self.points((0.0, *new, 1.0)) if grid.routing else self.points(new)
            found |= self.evaluate(added)
        return found, t

    def points(self, t: Sequence[float]) -> list[Point]:
        """Of all paths: A once, B on each, then what lies between, since observers compare with the ends."""
        ends = [self.on(path, at) for at in (0.0, 1.0) if at in t for path in self.symmetries]
        between = [self.on(path, at) for path in self.symmetries for at in t if 0 < at < 1]
        return list(dict.fromkeys([*ends, *between]))

    def on(self, path: str, t: float) -> Point:
        """The point at which a path is evaluated: A is on all of them, once."""
        if 0 < t < 1 and (stored(path), t) in self.merged.streams:
            return Point(stored(path), t)
        return Point(path if t > 0 else next(iter(self.symmetries)), t)

    def alone(self, span: Span) -> list[Point]:
        """The path on which some decoder layers go from A to aligned B, without A."""
        layers = frozenset(range(span[0], span[1] + 1))
        return [Point("aligned", at, layers) for at in self.grid.steps]

    def evaluate(self, points: Sequence[Point]) -> _Found:
        """Losses, and the routing where it is wanted, at some points."""
        processes, facts = process_group(), dict[str, Any]()
        watching = RoutingObserver(self.evaluator.a, points) if self.grid.routing else None
        scores, cost = self.evaluator.score(
            self.symmetries,
            points,
            inspect_model=lambda model: facts.update(implementations(model, self.evaluator.options.device)),
            observers=[watching] if watching else [],
            progress=self.progress,
            merged=self.merged,
        )
        losses, right = (dict(zip(points, values, strict=True)) for values in (scores.losses, scores.right))
        if watching is None:
            return _Found(losses, right, cost, [], facts, None)
        for number, tallies in enumerate(processes.exchange(watching.tallies)):
            if number != processes.rank:
                watching.add(tallies)
        return _Found(losses, right, cost, watching.rows(), facts, watching.problem)

    def curve(self, found: _Found, t: Sequence[float]) -> BarrierCurve:
        """The aligned path."""
        tokens = float(self.windows.scored.sum())
        return BarrierCurve(tuple(t), tuple(float(found.losses[self.on("aligned", at)].sum()) / tokens for at in t))

    def report(
        self, text: dict[str, Any], matching: dict[str, Any], started: float, own: Mapping[str, Mapping[str, Any]] | None = None
    ) -> BarrierReport:
        """Evaluates, and says what was found."""
        grid, evaluator = self.grid, self.evaluator
        found, t = self.run()
        losses = {path: torch.stack([found.losses[self.on(path, at)] for at in t]) for path in self.symmetries}
        right = {path: torch.stack([found.right[self.on(path, at)] for at in t]) for path in self.symmetries}
        halfway = {path: self.on(path, MIDPOINT) for path in self.symmetries if grid.halfway}
        facts = dict(found.facts)
        if grid.refine:
            facts["refined_t"] = [at for at in t if at not in grid.t]
        if found.problem:
            facts["routing_unavailable"] = found.problem
        numbers = {"dtype": str(evaluator.options.dtype).removeprefix("torch."), "batch_size": evaluator.options.batch_size}
        a, b = origins(evaluator.a.checkpoint, evaluator.b.checkpoint)
        return BarrierReport(
            a=a,
            b=b,
            evaluation={"text": text, **self.windows.describe(), **numbers, **facts, **vars(found.cost)},
            matching=matching,
            windows=self.windows,
            losses=losses,
            t=t,
            seconds=process_group().from_main(time.perf_counter() - started),
            layerwise={span: self.span_losses(span, found) for span in self.spans} if grid.steps else None,
            routing=[row for row in found.routing if row["t"] in t] if grid.routing and not found.problem else None,
            own=own,
            halfway={path: found.losses[point] for path, point in halfway.items()},
            right=right,
            halfway_right={path: found.right[point] for path, point in halfway.items()},
        )

    def span_losses(self, span: Span, found: _Found) -> LayerLosses:
        points = [Point("aligned", 0.0), *self.alone(span)]
        return LayerLosses(tuple(point.t for point in points), torch.stack([found.losses[point] for point in points]))


def _beside_the_maximum(curve: BarrierCurve) -> list[float]:
    """The middles of the two intervals beside the largest excess; none where that is at an end or not a number."""
    if not curve.barrier > 0:
        return []
    i = curve.t.index(curve.barrier_t)
    return [(curve.t[i - 1] + curve.t[i]) / 2, (curve.t[i] + curve.t[i + 1]) / 2]


def own_losses(model: MoEModel, windows: Windows, options: EvaluationOptions) -> dict[str, Any]:
    """What one model by itself has in report.json, under its own configuration and over its own vocabulary."""
    evaluator = Evaluator(model, model, windows, replace(options, masked=None))
    scores, _ = evaluator.score({"naive": model.identity()}, [Point("naive", 0.0)])
    scored = windows.scored
    return {
        "nll": float(scores.losses.sum() / scored.sum()),
        "accuracy": float(scores.right.sum() / scored.sum()),
        "window_nll": (scores.losses[0] / scored).tolist(),
        "window_right": scores.right[0].int().tolist(),
    }


def layer_spans(layers: str | None, model: MoEModel) -> list[Span]:
    """First and last of the decoder layers that are interpolated together, from text such as `each,0-3,8`.

    `each` stands for every MoE layer by itself, and so does None.

    Raises:
        InputError: no such layers, or no such text.
    """
    found: list[Span] = []
    for word in ("each" if layers is None else layers).split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if word.strip() == "each":
            found += [(layer, layer) for layer in model.layers if layer < model.num_layers]
        elif numbers is None:
            raise InputError(f"layers {layers!r}: expected numbers, ranges and `each`, such as 0-3,8 or each,0-3")
        else:
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if not first <= last < model.num_layers:
                raise InputError(
                    f"layers {word.strip()}: {model.checkpoint.name} has decoder layers 0 to {model.num_layers - 1}; a range "
                    "goes from the lower to the higher"
                )
            found.append((first, last))
    return sorted(set(found), key=lambda span: (span[0] < span[1], span))


def evaluation_options(
    model_class: type[PreTrainedModel], compute: ComputeOptions, context: int, masked: Tensor | None = None
) -> EvaluationOptions:
    """How points are evaluated in windows of `context` tokens."""
    return EvaluationOptions(
        model_class=model_class,
        batch_size=compute.batch_size or max(1, TOKENS_PER_BATCH // context),
        dtype=getattr(torch, compute.dtype),
        device=compute.device,
        activation_memory=compute.activation_memory,
        masked=masked,
    )


def check_device(device: str | None) -> None:
    """Raises InputError for a device that cannot be used here."""
    if device == "meta":
        raise InputError("device 'meta' holds no data; choose a real one")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used here: {error}") from error
