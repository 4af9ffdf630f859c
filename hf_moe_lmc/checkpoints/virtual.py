"""Checkpoints that are computed from the files of another: read as if their shards were files.

All of it is a matter of where bytes are read and what is made of them; nothing is written anywhere.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo, dtype_name

HEADER_UNIT = 8  # headers are padded to a multiple of this


@dataclass
class VirtualCheckpoint(Checkpoint):
    """A checkpoint whose tensors come from those of `original` in some other way than byte for byte.

    Attributes:
        original: whose files, name and fingerprint these are.
    """

    original: Checkpoint = field(kw_only=True)
    _starts: dict[str, tuple[list[int], list[TensorInfo]]] = field(default_factory=dict, repr=False)

    @abstractmethod
    def _lay_out(self) -> None:
        """Gives every tensor its place in a shard."""

    @abstractmethod
    def _is_kept(self, shard: str) -> bool:
        """Whether a shard has the very bytes of the original's."""

    @property
    def stored(self) -> Checkpoint:
        return self.original.stored

    def download(self) -> None:
        self.original.download()
        self._lay_out()

    def fingerprint(self) -> str:
        return self.original.fingerprint()

    def resume_key(self) -> str:
        return self.original.resume_key()

    def layout_digest(self) -> str:
        return self.original.layout_digest()

    def close(self) -> None:
        self.original.close()

    @abstractmethod
    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor: ...

    def fill(self, values: Tensor, shard: str, position: int) -> None:
        """As if the shard were a file: `position` counts in the layout of this checkpoint."""
        if self._is_kept(shard):
            self.original.fill(values, shard, position)
            return
        target = values.view(torch.uint8)
        starts, infos = self._in_order(shard)
        at, done = bisect_right(starts, position) - 1, 0
        while done < len(target):
            info = infos[at]
            skip = position + done - info.start
            count = min(info.nbytes - skip, len(target) - done)
            if count > 0:
                size = info.dtype.itemsize
                part = self.read(info.name, skip // size, -(-(skip % size + count) // size)).view(torch.uint8)
                target[done : done + count] = part[skip % size : skip % size + count]
                done += count
            at += 1

    def _in_order(self, shard: str) -> tuple[list[int], list[TensorInfo]]:
        if shard not in self._starts:
            infos = [self.tensors[name] for name in self.shards[shard].tensors]
            self._starts[shard] = [info.start for info in infos], infos
        return self._starts[shard]


def laid_out(infos: Sequence[TensorInfo], shard: str) -> tuple[Shard, list[TensorInfo]]:
    """A shard with a safetensors header for tensors one after the other, and these tensors at their places."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in infos:
        nbytes = info.numel * info.dtype.itemsize
        entries[info.name] = {"dtype": dtype_name(info.dtype), "shape": list(info.shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % HEADER_UNIT)
    header = len(body).to_bytes(8, "little") + body
    placed, start = [], len(header)
    for info in infos:
        nbytes = info.numel * info.dtype.itemsize
        placed.append(replace(info, shard=shard, start=start, nbytes=nbytes))
        start += nbytes
    return Shard(shard, header, start, tuple(info.name for info in infos)), placed
