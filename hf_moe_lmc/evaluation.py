"""The loss at the points of a path: which weights stand where, when, and what that costs."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_moe_lmc.distribution import team
from hf_moe_lmc.errors import InputError, listing
from hf_moe_lmc.interpolation import interpolate_into
from hf_moe_lmc.model import MoEModel
from hf_moe_lmc.perplexity import Windows, batches_of, token_losses
from hf_moe_lmc.resume import digest
from hf_moe_lmc.skeleton import Conversion, Group, Skeleton
from hf_moe_lmc.spans import Copied
from hf_moe_lmc.streams import ModelStream, rewritten, whole
from hf_moe_lmc.sweep import Lane, Sweep
from hf_moe_lmc.symmetry import ModelSymmetry
from hf_moe_lmc.workplace import Kept, Workplace

LANES = 4096  # at most at once
IN_FLIGHT = 6  # hidden states that a paused forward holds, about
SHARE = 0.5  # of the available memory, for all weights at once or for the activations


@dataclass(frozen=True)
class Point:
    """A model between A and B: theta = (1 - t) A + t (g B), in all of it or in some decoder layers only.

    Attributes:
        path: name of g among the symmetries.
        layers: numbers of the decoder layers that leave A; None: everything does.
    """

    path: str
    t: float
    layers: frozenset[int] | None = None

    def at(self, layer: int | None) -> float:
        """t in a decoder layer, or with None in what belongs to none."""
        return self.t if self.layers is None or layer in self.layers else 0.0


@dataclass(frozen=True)
class Part:
    """Parameters of one decoder layer, or with `layer` None of what belongs to none."""

    layer: int | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What an evaluation took.

    Attributes:
        mode: `resident` (all weights of both models in memory at once) or `layers` (those of one decoder layer).
        passes: how often both models were read.
        bytes_of_both: one pass.
        weights, activations: bytes planned for.
    """

    mode: str
    passes: int
    bytes_of_both: int
    weights: int
    activations: int


class Observer(Protocol):
    """Watches decoder layers while lanes run through them. In each layer, points come in the order of the list of points."""

    def begin(self, layers: Sequence[nn.Module], running: Callable[[], Lane | None]) -> None:
        """Puts hooks on the decoder layers; `running` tells whose forward runs when one is called (point and batch)."""

    def end(self) -> None:
        """Takes them off again."""


@dataclass
class Endpoints:
    """Weights of both models in the names of the transformers model, read as they are asked for."""

    a: MoEModel
    b: MoEModel
    symmetries: Mapping[str, ModelSymmetry]
    skeleton: Skeleton
    held: dict[tuple[str | None, str], Tensor] = field(default_factory=dict)

    @cached_property
    def conversion_a(self) -> Conversion:
        return _conversion(self.skeleton, self.a)

    @cached_property
    def conversion_b(self) -> Conversion:
        return _conversion(self.skeleton, self.b)

    @cached_property
    def streams(self) -> dict[str, ModelStream]:
        return {path: rewritten(self.b, symmetry) for path, symmetry in self.symmetries.items()}

    def load(self, wanted: Sequence[str]) -> None:
        """Reads parameters of A and of every path's B, unless they are held; what no symmetry touches is held once."""
        names = [name for name in wanted if (None, name) not in self.held]
        plain = ModelStream(self.a, dict(self.a.layers), Copied(self.a.checkpoint))
        for group in _groups(self.conversion_a, names):
            self._hold(None, self.conversion_a.convert(group, partial(whole, plain)))
        for group in _groups(self.conversion_b, names):
            touched = any(key in self.b.layer_of for key in group.keys)
            for i, (path, stream) in enumerate(self.streams.items()):
                if touched or i == 0:
                    values = self.conversion_b.convert(group, partial(whole, stream))
                self._hold(path, values)

    def _hold(self, path: str | None, values: Mapping[str, Tensor]) -> None:
        self.held.update(((path, name), value) for name, value in values.items())

    def drop(self, names: Sequence[str]) -> None:
        for path in (None, *self.symmetries):
            for name in names:
                self.held.pop((path, name), None)

    def place(self, names: Sequence[str], path: str, t: float) -> None:
        """Puts the weights of a point into the model, cast once to the dtype that it keeps them in."""
        for name in names:
            a, b = self.held[None, name], self.held[path, name]
            # kernels choose by layout: that which A's checkpoint would be loaded with
            value = torch.empty_strided(a.shape, a.stride(), dtype=self.skeleton.dtype_of(name), device=self.skeleton.device)
            interpolate_into(value, a, b, t)
            self.skeleton.place({name: value})


def _conversion(skeleton: Skeleton, model: MoEModel) -> Conversion:
    shapes = {name: info.shape for name, info in model.checkpoint.tensors.items() if not model.is_extra(name)}
    return Conversion(skeleton, model.checkpoint.name, shapes)


def _groups(conversion: Conversion, names: Sequence[str]) -> list[Group]:
    return list(dict.fromkeys(conversion.group_of[name] for name in names if name in conversion.group_of))


def evaluate(
    a: MoEModel,
    b: MoEModel,
    symmetries: Mapping[str, ModelSymmetry],
    points: Sequence[Point],
    windows: Windows,
    *,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    batch_size: int,
    activation_memory: int | None = None,
    resident: bool | None = None,
    inspect_model: Callable[[PreTrainedModel], Any] = lambda model: None,
    observers: Sequence[Observer] = (),
    progress: Workplace | None = None,
) -> tuple[Tensor, Cost]:
    """Summed losses of each window at each point: float64 [point, window], nats.

    Every decoder layer of A and of B is read once per pass, whatever the number of points; passes follow from
    `activation_memory`. Where the weights of both models fit into half of the memory that is free, all of them are in
    place at once (`resident`), which is the same procedure with one segment.

    Several processes take whole batches in turn, each with passes of its own, and all end up with all losses: bit for bit
    those of one process, as no batch depends on another.

    Memory: the decoder layer of A, of B, and of every path's aligned B, the interpolated one, the weights outside the
    layers for each of these, while converting one group of tensors three times more, and the activations.

    Args:
        activation_memory: bytes for the hidden states of all windows and points that are on their way.
        resident: whether to hold all weights; None: decided from the memory that is free.
        observers: watch the decoder layers while they run; in each process those that its own batches run through.
        progress: takes the losses of each point that has gone through a pass, and has those of an earlier call, in process
            0. What had not come to the end of the model starts again: a paused forward cannot be stored. In mode `resident`
            points end one after the other, in mode `layers` all at the end of the pass. Not used with observers, who have to
            see all batches.
    """
    check_points(points, symmetries)
    where = compute_device(device)
    skeleton = Skeleton(model_class, a.config, dtype=dtype, device=where)
    ends = Endpoints(a, b, symmetries, skeleton)
    _warn_of_unused(a, skeleton, ends.conversion_a)
    layers_at = _layers_path(a, ends.conversion_a)
    layers = list(skeleton.module.get_submodule(layers_at).children())
    segments, outside = _segments(skeleton, layers_at, len(layers))
    batches = batches_of(windows.rows, batch_size)
    plan = _plan(a, b, len(symmetries), points, windows, segments, outside, activation_memory, resident, dtype)
    beside = Part(None, outside)
    of_layers = [Part(layer, names) for layer, names in enumerate(segments)]
    if plan.mode == "resident":
        stages = [(beside, *of_layers)]
    else:  # what follows the last layer runs with it
        stages = [(beside,), *((part,) for part in of_layers[:-1]), (of_layers[-1], beside)]
    running: list[Sweep] = []
    for observer in observers:
        observer.begin(layers, lambda: running[-1].running if running else None)
    inspect_model(skeleton.module)
    losses = torch.empty(len(points), len(windows.rows), dtype=torch.float64)

    def forward(batch: int) -> Tensor:
        ids = torch.stack([windows.rows[i] for i in batches[batch]]).to(where)
        logits = skeleton.module(input_ids=ids, use_cache=False).logits[:, :-1]
        return windows.sums(batches[batch], token_losses(logits, ids[:, 1:])).cpu()

    mates = team()
    kept = None
    if progress and not observers:
        facts = _facts(a, b, symmetries, points, windows, batch_size, dtype, where)
        kept = progress.kept("losses", facts)
    todo, left = _earlier_losses(kept, batches, losses)
    chunks = _chunks(mates.share(left), plan.passes)

    def finished(lanes: Sequence[Lane]) -> None:
        """A round of all processes, each with the lanes of the same points that have come to their end."""
        mine = {f"{lane.point}-{lane.batch}": lane.result for lane in lanes}
        everyones = {key: values for of_one in mates.exchange(mine) for key, values in of_one.items()}
        _fill_in(losses, batches, everyones)
        if kept and everyones:
            kept.write(next(iter(everyones)), everyones)

    total = sum(len(chunk) for chunk in chunks) * len(todo) * len(stages)
    bar = tqdm(total=total, desc="evaluating the path", unit="step", disable=not mates.is_main)
    try:
        with torch.inference_mode(), bar:
            for number in range(max(mates.exchange(len(chunks)))):
                with Sweep(layers if plan.mode == "layers" else [], forward) as sweep:
                    running.append(sweep)
                    lanes = sweep.start(todo, chunks[number] if number < len(chunks) else [])
                    _run(ends, points, todo, stages, sweep, lanes, bar.update, finished)
    finally:
        for observer in observers:
            observer.end()
    passes = max(mates.exchange(plan.passes))
    return losses, replace(plan, passes=passes, mode=mates.from_main(plan.mode))


def _facts(
    a: MoEModel,
    b: MoEModel,
    symmetries: Mapping[str, ModelSymmetry],
    points: Sequence[Point],
    windows: Windows,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Any]:
    """All that losses depend on."""
    return {
        "a": a.checkpoint.fingerprint(),
        "b": b.checkpoint.fingerprint(),
        "symmetries": {path: digest(symmetry) for path, symmetry in symmetries.items()},
        "points": [[point.path, point.t, point.layers and sorted(point.layers)] for point in points],
        "windows": windows.describe(),
        "batch_size": batch_size,
        "dtype": str(dtype),
        "device": device.type,
    }


def _earlier_losses(kept: Kept | None, batches: Sequence[list[int]], losses: Tensor) -> tuple[list[int], list[int]]:
    """Fills in what an earlier call has evaluated; numbers of the points and of the batches that are left, in all processes."""
    done = torch.zeros(len(losses), len(batches), dtype=torch.bool)
    for name in sorted(kept.names()) if kept else []:
        assert kept is not None
        for point, batch in _fill_in(losses, batches, kept.read(name)):
            done[point, batch] = True
    if bool(done.any()):
        warnings.warn(
            f"continuing: {int(done.sum())} of {done.numel()} batches at points were evaluated by an earlier call", stacklevel=3
        )
    mates = team()
    done = mates.from_main(done)
    if bool(done.any()):
        losses.copy_(mates.from_main(losses))
    points, left = ((~done).any(dim=dim).nonzero().flatten().tolist() for dim in (1, 0))
    return points, left


def _fill_in(losses: Tensor, batches: Sequence[list[int]], found: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """Puts summed losses [window of the batch] in their places; keys are POINT-BATCH."""
    places = [(int(point), int(batch)) for point, batch in (key.split("-") for key in found)]
    for (point, batch), values in zip(places, found.values(), strict=True):
        losses[point, batches[batch]] = values
    return places


def _chunks(batches: Sequence[int], passes: int) -> list[Sequence[int]]:
    """The batches of each pass."""
    size = math.ceil(len(batches) / passes) or 1
    return [batches[first : first + size] for first in range(0, len(batches), size)]


def compute_device(device: str | None) -> torch.device:
    """The device that was asked for, or a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _run(
    ends: Endpoints,
    points: Sequence[Point],
    todo: Sequence[int],
    stages: Sequence[tuple[Part, ...]],
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
        for members in _same_weights(points, stages[-1]).values():
            if any(point in todo for point in members):
                finished([])
        return
    for number, parts in enumerate(stages):
        last = number == len(stages) - 1
        ends.load([name for part in parts for name in part.names])
        for (path, at), same in _same_weights(points, parts).items():
            running = [lane for point in same for lane in of_point.get(point, [])]
            if not running:
                continue
            for part, t in zip(parts, at, strict=True):
                ends.place(part.names, path, t)
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


def _layers_path(model: MoEModel, conversion: Conversion) -> str:
    """The module list of the decoder layers: where the parameters of an MoE block stand."""
    claimed = model.layer_of.keys()
    target = next(name for name, group in conversion.group_of.items() if group.keys[0] in claimed)
    match = re.match(r"(.*?)\.\d+\.", target)
    assert match is not None
    return match[1]


def _segments(skeleton: Skeleton, layers_at: str, count: int) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Parameters of each decoder layer, and those outside of them that a text needs."""
    names = [name for name in skeleton.state if name not in skeleton.tied]
    segments = [tuple(name for name in names if name.startswith(f"{layers_at}.{i}.")) for i in range(count)]
    other_towers = [
        f"{path}."
        for path, module in skeleton.module.named_modules()
        if isinstance(module, PreTrainedModel) and path and not f"{layers_at}.".startswith(f"{path}.")
    ]
    outside = [name for name in names if not name.startswith((f"{layers_at}.", *other_towers))]
    return segments, tuple(outside)


def _plan(
    a: MoEModel,
    b: MoEModel,
    paths: int,
    points: Sequence[Point],
    windows: Windows,
    segments: Sequence[tuple[str, ...]],
    outside: tuple[str, ...],
    activation_memory: int | None,
    resident: bool | None,
    dtype: torch.dtype,
) -> Cost:
    """Decides how much is in memory at once."""
    mates = team()
    free = available_memory() // mates.local_count
    of_both = a.checkpoint.nbytes + b.checkpoint.nbytes
    everything = of_both + (paths - 1) * b.checkpoint.nbytes + a.checkpoint.nbytes
    if resident is None:
        resident = everything < SHARE * free
    text = a.text_config
    per_token = IN_FLIGHT * int(text.hidden_size) * dtype.itemsize
    needed = math.ceil(len(points) * sum(len(row) for row in windows.rows) * per_token / mates.count)
    budget = activation_memory or int(SHARE * free)
    if resident:
        return Cost("resident", 1, of_both, everything, per_token * max(len(row) for row in windows.rows))
    lanes = math.ceil(len(points) * len(windows.rows) / mates.count)
    passes = max(math.ceil(needed / budget), math.ceil(lanes / LANES), 1)
    weights = everything // max(len(segments), 1)
    return Cost("layers", min(passes, len(windows.rows)), of_both, weights, needed // passes)


def available_memory() -> int:
    """Bytes of memory that are free or can be made so."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 8 << 30


def _warn_of_unused(model: MoEModel, skeleton: Skeleton, conversion: Conversion) -> None:
    ignored = [*(getattr(skeleton.module, "_keys_to_ignore_on_load_unexpected", None) or [])]
    unused = [name for name in conversion.unused if not any(re.search(pattern, name) for pattern in ignored)]
    if unused:
        kind = type(skeleton.module).__name__
        warnings.warn(f"{model.checkpoint.name}: {kind} does not use these tensors:\n{listing(sorted(unused))}", stacklevel=4)


def check_points(points: Sequence[Point], symmetries: Mapping[str, ModelSymmetry]) -> None:
    """Raises InputError unless every point lies on a known path."""
    if unknown := [point.path for point in points if point.path not in symmetries]:
        raise InputError(f"unknown path {unknown[0]!r}; known: {', '.join(symmetries)}")
