"""The loss at the points of a path: which weights stand where, and when."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import foreign, text_reader
from hf_moe_lmc.path.cost import Cost, EvaluationOptions, compute_device, home_of, plan_of, rounds_of
from hf_moe_lmc.path.endpoints import Endpoints, Part, Point, conversions
from hf_moe_lmc.path.skeleton import Skeleton, warn_of_unused
from hf_moe_lmc.path.sweep import Lane, Sweep
from hf_moe_lmc.perplexity.scores import Scores, token_scores
from hf_moe_lmc.perplexity.windows import Windows, batches_of
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.runtime.progress import bar
from hf_moe_lmc.runtime.threads import Products, products_of, suited
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.streams import ModelStream
from hf_moe_lmc.writing.workspace import Workspace


@dataclass(frozen=True)
class Merged:
    """Merges with weights of their own, by path and t: they lie on no straight line, or are as an output stores them.

    Attributes:
        streams: their weights, in A's layout or in B's; they are read anew for each of them.
        facts: all that these depend on besides the two models, JSON.
    """

    streams: Mapping[tuple[str, float], ModelStream] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __or__(self, other: Merged) -> Merged:
        return Merged({**self.streams, **other.streams}, {**self.facts, **other.facts})


class Observer(Protocol):
    """Watches decoder layers while lanes run through them. In each layer, points come in the order of the list of points.

    Attributes:
        needed: numbers of the points that others are compared with: where a lane of another runs, theirs have to, too. A lane
            marked `again` has been watched by an earlier call and does not count once more.
    """

    needed: Sequence[int]

    def begin(self, layers: Sequence[nn.Module], running: Callable[[], Lane | None]) -> None:
        """Puts hooks on the decoder layers; `running` tells whose forward runs when one is called."""

    def end(self) -> None:
        """Takes them off again."""

    def seen(self, points: Sequence[int]) -> dict[str, Tensor]:
        """What the lanes of some points have shown since it was last asked, to be kept for `restore`."""

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Takes in what an earlier call has `seen`."""


class Evaluator:
    """Evaluates the loss at the points of the paths between two models on one text.

    Args:
        a, b: of one architecture.
        windows: what is evaluated on.

    Raises:
        ForeignError: transformers cannot build the model.
        CheckpointError: transformers finds no tensors for some of its parameters.
    """

    def __init__(self, a: MoEModel, b: MoEModel, windows: Windows, options: EvaluationOptions) -> None:
        self.a, self.b, self.windows, self.options = a, b, windows, options
        device = compute_device(options.device)
        self._skeleton = Skeleton(options.model_class, a.config, dtype=options.dtype, device=device)
        self._conversions = conversions(self._skeleton, a, b)
        warn_of_unused(a.checkpoint.name, options.model_class, self._conversions[0].unused)

    def on(self, windows: Windows, batch_size: int) -> Evaluator:
        """The same on another text; both share their model without weights, so use one at a time."""
        other = copy.copy(self)
        other.windows, other.options = windows, replace(self.options, batch_size=batch_size)
        return other

    def _ends(
        self, symmetries: Mapping[str, ModelSymmetry], merged: Mapping[tuple[str, float], ModelStream] | None = None
    ) -> Endpoints:
        return Endpoints(self.a, self.b, symmetries, self._skeleton, self._conversions, merged or {})

    def holds(self, dtypes: Collection[torch.dtype]) -> bool:
        """Whether weights of these dtypes can be what the model runs on, without rounding."""
        runs = {self._skeleton.dtype_of(name) for name in self._skeleton.state}
        return all(torch.promote_types(one, run) == one for one in dtypes for run in runs if one.is_floating_point)

    def _layers(self, ends: Endpoints) -> list[nn.Module]:
        return list(self._skeleton.module.get_submodule(ends.layers_path).children())

    def _products(self, batches: Sequence[list[int]]) -> list[Products]:
        """The matrix products of one forward pass."""
        tokens = max((sum(len(self.windows.rows[i]) for i in batch) for batch in batches), default=0)
        return products_of(self._skeleton.module, tokens, self.a.top_k)

    def cost(self, paths: Collection[str], points: int) -> Cost:
        """What so many points on these paths would take, with the memory that is free now."""
        ends = self._ends({path: self.b.identity() for path in paths})
        return plan_of(ends, points, self.windows, self.options, len(self._layers(ends)))

    def evaluate(self, symmetries: Mapping[str, ModelSymmetry], points: Sequence[Point], **how: Any) -> tuple[Tensor, Cost]:
        """The losses of `score` alone: float64 [point, window], nats."""
        scores, cost = self.score(symmetries, points, **how)
        return scores.losses, cost

    def score(
        self,
        symmetries: Mapping[str, ModelSymmetry],
        points: Sequence[Point],
        *,
        inspect_model: Callable[[PreTrainedModel], Any] = lambda model: None,
        observers: Sequence[Observer] = (),
        progress: Workspace | None = None,
        merged: Merged | None = None,
        told: str = "evaluating the path",
    ) -> tuple[Scores, Cost]:
        """Summed losses of each window at each point, and how many of its tokens are the model's first choice.

        Every decoder layer of A and of B is read once per pass, whatever the number of points; passes follow from
        `activation_memory`. Where the weights of both models fit into half of the memory that is free, all of them are in
        place at once (`resident`), which is the same procedure with one segment. On a GPU it is the GPU's memory that counts,
        and what is held for the points is held there if it fits.

        Several processes take whole batches in turn, each with passes of its own, and all end up with all losses: bit for
        bit those of one process, as no batch depends on another.

        Memory: the decoder layer of A, of B, and of every path's aligned B, the interpolated one, the weights outside the
        layers for each of these, while converting one group of tensors three times more, and the activations.

        Args:
            symmetries: by path, what takes B to the coordinates in which it is the end of that path.
            observers: watch the decoder layers while they run; in each process those that its own batches run through, in
                process 0 what earlier calls have seen, too.
            progress: takes the losses of each point that has gone through a pass, and what observers have seen there, and
                has those of an earlier call, in process 0. What had not come to the end of the model starts again: a paused
                forward cannot be stored. In mode `resident` points end one after the other, in mode `layers` all at the end
                of the pass.
            merged: merges with weights of their own, whose points lie on paths that no symmetry has.
            told: what the progress bar calls the work.
        """
        merged = merged or Merged()
        check_points([point for point in points if (point.path, point.t) not in merged.streams], symmetries)
        ends = self._ends(symmetries, merged.streams)
        layers = self._layers(ends)
        plan = plan_of(ends, len(points), self.windows, self.options, len(layers))
        ends.home = home_of(self._skeleton.device, plan)
        batches = batches_of(self.windows.rows, self.options.batch_size)
        job = _Job(ends, points, self.windows, batches, stages(ends, plan.mode), self.options.masked)
        facts = {**_facts(job, self.options, observers), **({"merged": merged.facts} if merged.streams else {})}
        kept = progress.results("scores", facts) if progress else None
        results = _Results.begin(job, observers, kept)
        processes = process_group()
        chunks = rounds_of(processes.share(results.left), plan)
        total = sum(len(chunk) for chunk in chunks) * len(results.todo) * len(job.stages)
        running: list[Sweep] = []
        for observer in observers:
            observer.begin(layers, lambda: running[-1].running if running else None)
        inspect_model(self._skeleton.module)
        try:
            with (
                torch.inference_mode(),
                suited(self._products(batches)),
                bar(total=total, desc=told, unit="step", quiet=not processes.is_main) as shown,
            ):
                for number in range(max(processes.exchange(len(chunks)))):
                    with Sweep(layers if plan.mode == "layers" else [], job.forward) as sweep:
                        running.append(sweep)
                        lanes = sweep.start(results.todo, chunks[number] if number < len(chunks) else [])
                        results.mark(lanes)
                        _run(job, results.todo, sweep, lanes, shown.update, results.take)
        finally:
            for observer in observers:
                observer.end()
        passes = max(processes.exchange(plan.passes))
        return Scores.of(results.scores), replace(plan, passes=passes, mode=processes.from_main(plan.mode))


@dataclass(frozen=True)
class _Job:
    """What is to be evaluated.

    Attributes:
        batches: numbers of the windows of each.
        stages: parts whose weights are in place together, one stage after the other; what follows the last layer runs
            with it.
    """

    ends: Endpoints
    points: Sequence[Point]
    windows: Windows
    batches: list[list[int]]
    stages: list[tuple[Part, ...]]
    masked: Tensor | None

    def forward(self, batch: int) -> Tensor:
        """What the windows of a batch score with the weights that stand in the model: float64 [window, 2], see `Scores`."""
        rows = self.batches[batch]
        ids = torch.stack([self.windows.rows[i] for i in rows])
        logits = predictions(self.ends.skeleton, ids, self.masked)
        found = token_scores(logits, ids[:, 1:])
        return torch.stack([self.windows.sums(rows, values) for values in found], dim=1).cpu()


def predictions(skeleton: Skeleton, ids: Tensor, masked: Tensor | None = None) -> Tensor:
    """Logits of all tokens but the first, from the weights that stand in a model: [window, length - 1, vocabulary].

    Args:
        ids: int64 [window, length].
        masked: token ids whose logits are -inf, bool [vocabulary]; None: none are.
    """
    with foreign(type(skeleton.module), "cannot run on token ids alone"):
        logits: Tensor = text_reader(skeleton.module)(input_ids=ids.to(skeleton.device), use_cache=False).logits[:, :-1]
    return logits if masked is None else logits.masked_fill(masked.to(logits.device), -math.inf)


def stages(ends: Endpoints, mode: str) -> list[tuple[Part, ...]]:
    """Parts of a model whose weights are in place together, one stage after the other."""
    of_layers, beside = ends.parts()
    if mode == "resident":
        return [(beside, *of_layers)]
    return [(beside,), *((part,) for part in of_layers[:-1]), (of_layers[-1], beside)]


@dataclass
class _Results:
    """Scores as they come in, and what is kept of them and of what observers have seen.

    Attributes:
        scores: float64 [point, window, 2], see `Scores`.
        done: by an earlier call, bool [point, batch].
        todo, left: numbers of the points and of the batches that have lanes.
        keeping: whether process 0 keeps what comes in; `kept` is there.
    """

    scores: Tensor
    batches: list[list[int]]
    observers: Sequence[Observer]
    kept: ResultFolder | None
    keeping: bool
    done: Tensor
    todo: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)

    @classmethod
    def begin(cls, job: _Job, observers: Sequence[Observer], kept: ResultFolder | None) -> _Results:
        """With what an earlier call has left, in all processes."""
        processes = process_group()
        scores = torch.empty(len(job.points), len(job.windows.rows), 2, dtype=torch.float64)
        done = torch.zeros(len(job.points), len(job.batches), dtype=torch.bool)
        found = cls(scores, job.batches, observers, kept, processes.from_main(kept is not None), done)
        found._restore()
        found.done = processes.from_main(found.done)
        if bool(found.done.any()):
            scores.copy_(processes.from_main(scores))
        todo, found.left = ((~found.done).any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
        needed = {point for observer in observers for point in observer.needed} if bool(found.done.any()) and todo else ()
        found.todo = sorted({*todo, *needed})
        return found

    def _restore(self) -> None:
        for name in sorted(self.kept.names()) if self.kept else []:
            assert self.kept is not None
            stored = self.kept.read(name)
            seen = {key: stored.pop(key) for key in list(stored) if "/" in key}
            for point, batch in _fill_in(self.scores, self.batches, stored):
                self.done[point, batch] = True
            for number, observer in enumerate(self.observers):
                ranks = {key.split("/")[1] for key in seen if key.startswith(f"{number}/")}
                for start in (f"{number}/{rank}/" for rank in sorted(ranks)):
                    observer.restore({key.removeprefix(start): seen[key] for key in seen if key.startswith(start)})
        if bool(self.done.any()):
            count, of = int(self.done.sum()), self.done.numel()
            note(f"continuing: {count} of {of} batches at points were evaluated by an earlier call")

    def mark(self, lanes: Sequence[Lane]) -> None:
        """Tells lanes that an earlier call has taken to the end, and that run for the sake of others, from those that count."""
        for lane in lanes:
            lane.again = bool(self.done[lane.point, lane.batch])

    def take(self, lanes: Sequence[Lane]) -> None:
        """A round of all processes, each with the lanes of the same points that have come to their end."""
        processes = process_group()
        mine = {f"{lane.point}-{lane.batch}": lane.result for lane in lanes if not lane.again}
        points = sorted({lane.point for lane in lanes})
        seen = {
            f"{number}/{processes.rank}/{key}": value
            for number, observer in enumerate(self.observers if self.keeping else ())
            for key, value in observer.seen(points).items()
        }
        scores: dict[str, Tensor] = {}
        everything: dict[str, Tensor] = {}
        for of_one, seen_by_one in processes.exchange((mine, seen)):
            scores |= of_one
            everything |= seen_by_one
        _fill_in(self.scores, self.batches, scores)
        if self.kept and scores:
            self.kept.write(next(iter(scores)), {**scores, **everything})


def _facts(job: _Job, options: EvaluationOptions, observers: Sequence[Observer]) -> dict[str, Any]:
    """All that losses depend on, and what observers see."""
    ends = job.ends
    return {
        "a": ends.a.checkpoint.resume_key(),
        "b": ends.b.checkpoint.resume_key(),
        "symmetries": {path: digest(symmetry) for path, symmetry in ends.symmetries.items()},
        "points": [[point.path, point.t, point.layers and sorted(point.layers)] for point in job.points],
        "windows": job.windows.describe(),
        "batch_size": options.batch_size,
        "dtype": str(options.dtype),
        "device": ends.skeleton.device.type,
        "observers": [type(observer).__name__ for observer in observers],
        **{f"layout_{side}": digest for side, digest in ends.layouts().items()},
    }


def _fill_in(scores: Tensor, batches: Sequence[list[int]], found: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Puts scores [window of the batch, 2] in their places; keys are POINT-BATCH."""
    places = [(int(point), int(batch)) for point, batch in (key.split("-") for key in found)]
    for (point, batch), values in zip(places, found.values(), strict=True):
        scores[point, batches[batch]] = values
    return places


def _run(
    job: _Job,
    todo: Sequence[int],
    sweep: Sweep,
    lanes: Sequence[Lane],
    progress: Callable[[int], Any],
    finished: Callable[[Sequence[Lane]], None],
) -> None:
    """Takes all lanes from the first stage to the end of the model.

    Args:
        todo: numbers of the points that have lanes.
        finished: called with the lanes that have come to the end, for every group of points that ends together, also
            where this process has no lanes in this pass.
    """
    of_point: dict[int, list[Lane]] = {}
    for lane in lanes:
        of_point.setdefault(lane.point, []).append(lane)
    if not lanes:
        for members in _same_weights(job.points, job.stages[-1]).values():
            if any(point in todo for point in members):
                finished([])
        return
    ends = job.ends
    for number, parts in enumerate(job.stages):
        last = number == len(job.stages) - 1
        if any((point.path, point.t) not in ends.merged for point in job.points):
            ends.load([name for part in parts for name in part.names])
        for (path, at), same in _same_weights(job.points, parts).items():
            running = [lane for point in same for lane in of_point.get(point, [])]
            if not running:
                continue
            for part, t in zip(parts, at, strict=True):
                # a paused forward may hold on to what belongs to no layer, but it has left the layers behind it
                ends.place(part.names, path, t, reuse=part.layer is not None or len(job.stages) == 1)
            for lane in running:
                sweep.advance(lane, None if last else number)
                progress(1)
            if last:
                finished(running)
        for part in parts:
            ends.skeleton.clear(part.names)
            if part.layer is not None or last:  # what belongs to no layer comes again after them
                ends.drop(part.names)


def _same_weights(points: Sequence[Point], parts: Sequence[Part]) -> dict[tuple[str, tuple[float, ...]], list[int]]:
    """Points that share their weights in a stage, by the path and t in each part."""
    found: dict[tuple[str, tuple[float, ...]], list[int]] = {}
    for i, point in enumerate(points):
        at = tuple(point.at(part.layer) for part in parts)
        found.setdefault((point.path if any(at) else points[0].path, at), []).append(i)  # A is on every path
    return found


def check_points(points: Sequence[Point], symmetries: Mapping[str, ModelSymmetry]) -> None:
    """Raises InputError unless every point lies on a known path."""
    if unknown := [point.path for point in points if point.path not in symmetries]:
        raise InputError(f"unknown path {unknown[0]!r}; known: {', '.join(symmetries)}")
