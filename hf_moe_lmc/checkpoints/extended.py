"""A checkpoint read as if it had other tensors outside its MoE blocks: rows of another's vocabulary, a head of its own.

Two ends of a path need the same tensors. Where their files differ in what is no part of an expert, each is extended. A table
over the vocabulary gets the rows that the other alone has, a tied head becomes a tensor, buffers of one come from the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.virtual import VirtualCheckpoint, laid_out


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of a tensor, from a tensor of some checkpoint, cast where their dtypes differ.

    Attributes:
        count: elements.
        first: the first of them in `name`.
    """

    count: int
    checkpoint: Checkpoint
    name: str
    first: int


@dataclass(frozen=True)
class Assembled:
    """A tensor that is put together from pieces, in its order of elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass
class ExtendedCheckpoint(VirtualCheckpoint):
    """`original` with some tensors put together from pieces, and some left out.

    Attributes:
        assembled: by name; those that the original lacks stand at the end of its last shard.
        without: names that are left out.
    """

    assembled: Mapping[str, Assembled] = field(kw_only=True)
    without: frozenset[str] = field(default_factory=frozenset, kw_only=True)

    @classmethod
    def of(
        cls,
        original: Checkpoint,
        assembled: Mapping[str, Assembled],
        without: Collection[str] = (),
        changes: Mapping[str, Any] | None = None,
    ) -> ExtendedCheckpoint:
        """Of a checkpoint, and of what of it changes; see the class."""
        found = cls(
            source=original.source,
            config=original.config,
            shards={},
            tensors={},
            quantization=original.quantization,
            original=original,
            assembled=assembled,
            without=frozenset(without),
            changes={**original.changes, **(changes or {})},
        )
        found._lay_out()
        return found

    def _lay_out(self) -> None:
        """Gives every tensor its place: shards that nothing changes in keep their very headers."""
        self.shards, self.tensors, self._starts = {}, {}, {}
        new = [name for name in self.assembled if name not in self.original.tensors]
        for number, shard in enumerate(self.original.shards.values()):
            names = [name for name in shard.tensors if name not in self.without]
            added = new if number == len(self.original.shards) - 1 else []
            infos = [self._reshaped(self.original.tensors[name]) for name in names]
            infos += [
                TensorInfo(name, shard.name, self.assembled[name].dtype, self.assembled[name].shape, 0, 0) for name in added
            ]
            kept = not added and len(names) == len(shard.tensors)
            if kept and all(info.shape == self.original.tensors[info.name].shape for info in infos):
                self.shards[shard.name] = shard
                self.tensors |= {info.name: info for info in infos}
                continue
            self.shards[shard.name], infos = laid_out(infos, shard.name)
            self.tensors |= {info.name: info for info in infos}

    def _reshaped(self, info: TensorInfo) -> TensorInfo:
        assembled = self.assembled.get(info.name)
        if assembled is None:
            return info
        nbytes = _numel(assembled.shape) * info.dtype.itemsize
        return replace(info, shape=assembled.shape, nbytes=nbytes)

    def layout_digest(self) -> str:
        """What its tensors are made of: together with the fingerprints of all that it reads, it tells what is in it."""
        made = {
            name: [
                str(one.dtype),
                one.shape,
                [(piece.checkpoint.name, piece.name, piece.first, piece.count) for piece in one.pieces],
            ]
            for name, one in self.assembled.items()
        }
        content = json.dumps(
            [self.original.layout_digest(), made, sorted(self.without), dict(self.changes)], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        if name not in self.assembled:
            return self.original.read(name, first, count)
        one = self.assembled[name]
        count = _numel(one.shape) - first if count is None else count
        values = torch.empty(count, dtype=one.dtype)
        self._assemble(values, one, first)
        return values

    def _assemble(self, values: Tensor, one: Assembled, first: int) -> None:
        """Fills a row with the elements of an assembled tensor from `first` on."""
        begin = 0
        for piece in one.pieces:
            low, high = max(first, begin), min(first + len(values), begin + piece.count)
            if low < high:
                values[low - first : high - first] = piece.checkpoint.read(
                    piece.name, piece.first + low - begin, high - low
                ).to(one.dtype)
            begin += piece.count

    def _is_kept(self, shard: str) -> bool:
        same = self.shards[shard] is self.original.shards.get(shard)
        return same and not any(name in self.assembled for name in self.shards[shard].tensors)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
