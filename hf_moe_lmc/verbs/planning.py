"""The plan of a verb, which a dry run shows: everything has been checked, nothing fetched or written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import Shard
from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.runtime.progress import size_of
from hf_moe_lmc.runtime.tables import aligned
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.writing.output import WHOLE, lack_of_space, shards_left
from hf_moe_lmc.writing.shard_file import worker_count
from hf_moe_lmc.writing.spans import SPAN
from hf_moe_lmc.writing.workspace import kept_files

if TYPE_CHECKING:
    from hf_moe_lmc.moe.layer import MoELayer
    from hf_moe_lmc.moe.model import MoEModel
    from hf_moe_lmc.path.cost import Cost

PROBE = 32 << 20  # bytes read and written to see how fast that goes here
PRODUCT = 1024  # rows of the matrix product that is timed


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A measurement on a text.

    Attributes:
        cost: of all points of the grid.
        points: of the grid on all paths, and of the paths of single layers.
        tokens: that are scored at each of them.
        refinements: how often points may be added, for which both models are read again.
        own_bytes: read besides, for models by themselves and for merges as an output stores them.
    """

    cost: Cost
    points: int
    tokens: int
    refinements: int = 0
    own_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Read at most."""
        return (1 + self.refinements) * self.cost.passes * self.cost.bytes_of_both + self.own_bytes


@dataclass(frozen=True, kw_only=True)
class Leaving:
    """What it takes to leave the straight line, before anything is written.

    Attributes:
        words: what is done, and what that takes.
        memory: bytes.
        passes: how often both models are read.
    """

    words: str
    memory: int = 0
    passes: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a verb reads and writes.

    Attributes:
        inputs: what is read.
        template: what is written has its tensors; None: no checkpoint is written.
        folders: of the output, each of which gets a checkpoint.
        models: what is read, where it was recognised.
        matched: the two models are matched. A layer is written while it is still in the page cache; the tensors outside the
            MoE blocks, which are compared in the end, are read twice.
        evaluated: what is measured on a text, which reads both models in each pass; None: nothing.
        leaving: what it takes to leave the straight line; None: that is not left.
        facts: what the shards are made from, of which some may have been written by a call that was stopped; None: that is
            known only when something has been measured.
    """

    inputs: Sequence[Checkpoint]
    template: Checkpoint | None = None
    folders: Sequence[str] = WHOLE
    models: Sequence[MoEModel] = ()
    matched: bool = False
    evaluated: Evaluation | None = None
    leaving: Leaving | None = None
    facts: Callable[[], Mapping[str, Any]] | None = dict

    def shards_left(self, output: Path) -> list[Shard]:
        """Shards of the template that an earlier call has not written yet."""
        if self.template is None:
            return []
        here = all(checkpoint.is_downloaded for checkpoint in self.inputs)
        whole = kept_files(output, self.facts() if self.facts else None) if here else set()
        return [shard for shard, _ in shards_left(self.template, self.folders, whole)]


@dataclass(frozen=True)
class Plan:
    """What a verb would do, from headers and a short probe of this machine.

    Attributes:
        checkpoints: that are written, each in a folder of its own where there are several.
        tensors, shards: of each of them; 0 where none is written.
        bytes_to_download: of checkpoints on the Hub that are not in the cache.
        bytes_to_read: from disk; a checkpoint that is matched and rewritten counts twice, though much may still be cached.
        bytes_free: where the output would be.
        peak_memory: bytes, besides what Python and the libraries take.
        seconds: of reading and writing at the rates that the probe saw, downloads left out; None where nothing is here yet.
        matching_seconds: of the matching besides, at most: every expert compared in full. Related ones take a fraction.
        passes: how often both models are read to evaluate all points of the grid; 0: nothing is evaluated.
        refinements: how often that may happen again, for points that are added.
        points, tokens: that are evaluated, and that are scored at each point.
        repair: what is done to leave the straight line and what that takes, in words; None: nothing.
        problem: why it is not possible all the same: there is no room for the output; None: it is.
    """

    verb: str
    tensors: int
    shards: int
    bytes_to_download: int
    bytes_to_read: int
    bytes_to_write: int
    bytes_free: int
    peak_memory: int
    read_rate: float | None
    write_rate: float
    seconds: float | None
    layers_to_match: int
    matching_seconds: float
    passes: int = 0
    refinements: int = 0
    points: int = 0
    tokens: int = 0
    repair: str | None = None
    problem: str | None = None
    checkpoints: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """For a terminal: one fact a line."""
        rows = {
            "checkpoints": f"{self.checkpoints}, in one pass over A and B" if self.checkpoints > 1 else "",
            "tensors": f"{self.tensors:,} in {self.shards} shards{' each' if self.checkpoints > 1 else ''}"
            if self.tensors
            else "",
            "to download": size_of(self.bytes_to_download) if self.bytes_to_download else "",
            "to read": size_of(self.bytes_to_read) + (f", at {size_of(self.read_rate)}/s here" if self.read_rate else ""),
            "to write": f"{self._written()}; {size_of(self.bytes_free)} free",
            "peak memory": f"{size_of(self.peak_memory)} besides Python and its libraries",
            "reading and writing": f"about {time_of(self.seconds)}" if self.seconds is not None else "unknown before download",
        }
        if self.layers_to_match:
            meanwhile = ", meanwhile written" if self.tensors and not self.passes else ""
            rows["matching"] = f"{self.layers_to_match} layers, at most {time_of(self.matching_seconds)}{meanwhile}"
        if self.repair:
            rows["repair"] = self.repair
        if self.passes:
            rows["evaluation"] = (
                f"{self.points} points with {self.tokens:,} scored tokens each; reads both models {self._times()}; "
            )
            rows["evaluation"] += "the time of the forward passes is not known beforehand"
        possible = "would be possible" if self.problem is None else "would not be possible: there is no room for its output"
        shown = [(name, value) for name, value in rows.items() if value]
        return "\n".join([f"{self.verb} {possible}; nothing has been written", *aligned(shown)])

    def _written(self) -> str:
        if self.tensors:
            return f"{size_of(self.bytes_to_write)}, at {size_of(self.write_rate)}/s here"
        return "a report, a symmetry, or both: a few MB"

    def _times(self) -> str:
        """How often both models are read."""
        times = "once" if self.passes == 1 else f"{self.passes} times"
        more = self.refinements * self.passes
        return f"{times}, and up to {more} {'time' if more == 1 else 'times'} more to refine" if more else times


def planned(verb: str, output: Path, work: Work) -> Plan:
    """The plan for work that has been checked."""
    template, models, leaving = work.template, work.models, work.leaving or Leaving(words="")
    outside = sum(model.checkpoint.tensors[name].nbytes for model in models for name in model.outside)
    both = sum(checkpoint.stored.nbytes for checkpoint in work.inputs)
    reading = both if work.matched or template or not work.evaluated else 0
    if work.matched and template:  # what is evaluated in between is not in the page cache any more
        reading += both if work.evaluated or leaving.passes else outside
    reading += (work.evaluated.nbytes if work.evaluated else 0) + leaving.passes * both
    left = work.shards_left(output)
    writing = sum(shard.size for shard in left)
    nearest = _nearest(output)
    away = [checkpoint for checkpoint in work.inputs if not checkpoint.is_downloaded]
    common = sorted(models[0].layers.keys() & models[-1].layers.keys()) if work.matched else []
    flops = sum(_flops(models[0], index) for index in common)
    read_rate = None if away else _reading(work.inputs)
    write_rate = _writing(nearest)
    cost = work.evaluated.cost if work.evaluated else None
    evaluating = cost.weights + cost.activations if cost else 0
    return Plan(
        verb=verb,
        tensors=len(template.tensors) if template else 0,
        shards=len(template.shards) if template else 0,
        bytes_to_download=sum(sum(checkpoint.stored.absent().values()) for checkpoint in away),
        bytes_to_read=reading,
        bytes_to_write=writing,
        bytes_free=shutil.disk_usage(nearest).free,
        peak_memory=max(_memory(work), evaluating, leaving.memory),
        read_rate=read_rate,
        write_rate=write_rate,
        seconds=reading / read_rate + writing / write_rate if read_rate else None,
        layers_to_match=len(common),
        matching_seconds=flops / _multiplying() if flops else 0.0,
        passes=cost.passes if cost else 0,
        refinements=work.evaluated.refinements if work.evaluated else 0,
        points=work.evaluated.points if work.evaluated else 0,
        tokens=work.evaluated.tokens if work.evaluated else 0,
        repair=leaving.words or None,
        problem=lack_of_space(output, left, nearest),
        checkpoints=len(work.folders) if template else 0,
    )


def _memory(work: Work) -> int:
    """Bytes: buffers of the writer, copies of an expert in each of its threads, and what matching holds of a pair."""
    one = len(work.folders) == 1
    # what is quantized is decoded beside its codes, and turned where its format has it transposed
    more = 2 if any(storage_of(checkpoint) for checkpoint in work.inputs) else 0
    buffers = worker_count() * ((2 if one else 3) + more) * SPAN
    if not work.models:
        return buffers
    layers = [layer for model in work.models for layer in model.layers.values()]
    expert = max(layer.expert_numel for layer in layers)
    units = max(bank.unit_count for layer in layers for bank in layer.banks.values())
    piece = max(_widest_piece(layer) for layer in layers)
    copies = (3 if one else 5) + more  # of what a tensor has of one expert, in float32; A's and B's are held for several
    writing = buffers + worker_count() * copies * 4 * piece
    return writing + ((2 * 4 * expert + more * 4 * piece + 8 * units**2 + (32 << 20)) if work.matched else 0)


def _widest_piece(layer: MoELayer) -> int:
    """Elements of the largest range of a tensor that is computed at once: of one expert, its gate and up together if fused."""
    return max(piece.count for name in layer.claims for piece in islice(layer.pieces(name), 1))


def _flops(model: MoEModel, index: int) -> int:
    """Of the full similarity of all pairs of experts that are matched in a layer."""
    layer = model.layers[index]
    shared = 2 * 3 * layer.shared.unit_count**2 * layer.banks[FIRST].width
    return sum(2 * bank.experts * bank.unit_count * bank.expert_numel for bank in layer.banks.values()) + shared


def _nearest(output: Path) -> Path:
    """The folder that is there already, and would hold the output."""
    root = output.resolve()
    return next(path for path in (root, *root.parents) if path.exists())


def _reading(inputs: Sequence[Checkpoint]) -> float:
    """Bytes per second from the middle of each input's largest shard."""
    values, seconds, count = torch.empty(PROBE, dtype=torch.uint8), 1e-9, 0
    for checkpoint in inputs:
        checkpoint = checkpoint.stored
        shard = max(checkpoint.shards.values(), key=lambda shard: shard.size)
        wanted = values[: min(PROBE, shard.size // 2)]
        started = time.perf_counter()
        checkpoint.fill(wanted, shard.name, shard.size // 4)
        seconds += time.perf_counter() - started
        count += len(wanted)
    return max(count, 1) / seconds


def _writing(folder: Path) -> float:
    """Bytes per second to a file that has no name and is gone at once, sync included."""
    data = os.urandom(1 << 20)
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(PROBE >> 20):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return PROBE / (time.perf_counter() - started)


def _multiplying() -> float:
    """Floating-point operations per second of a float32 product."""
    a = torch.randn(PRODUCT, PRODUCT)
    a @ a
    started = time.perf_counter()
    a @ a
    return 2 * PRODUCT**3 / (time.perf_counter() - started)


def time_of(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "a second"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
