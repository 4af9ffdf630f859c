"""A quantized checkpoint read as the plain one that it stands for: every weight under its own name, in its own shape.

What reads checkpoints need not know of quantization: the view of MoE blocks, matching, the path and the writer all read a
DecodedCheckpoint as they read any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import ABSENT
from hf_moe_lmc.checkpoints.extended import ExtendedCheckpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.packed import DECLARATIONS
from hf_moe_lmc.checkpoints.virtual import VirtualCheckpoint, laid_out
from hf_moe_lmc.formats.protocol import CODES
from hf_moe_lmc.formats.reading import read_range
from hf_moe_lmc.formats.recognition import Storage, recognise_storage
from hf_moe_lmc.runtime.memory import cast


@dataclass
class DecodedCheckpoint(VirtualCheckpoint):
    """`original` with its quantized weights as numbers.

    Attributes:
        storage: how they are stored.
        dtype: that they are read in: decoded in float32, and rounded once.
    """

    storage: Storage = field(kw_only=True)
    dtype: torch.dtype = field(default=torch.float32, kw_only=True)

    @classmethod
    def of(cls, original: Checkpoint, storage: Storage, dtype: torch.dtype = torch.float32) -> DecodedCheckpoint:
        """Of a checkpoint as it lies on disk."""
        changes = {**original.changes, **dict.fromkeys(DECLARATIONS, ABSENT)}
        found = cls(
            source=original.source,
            config=original.config,
            shards={},
            tensors={},
            original=original,
            storage=storage,
            dtype=dtype,
            changes=changes,
        )
        found._lay_out()
        return found

    def _lay_out(self) -> None:
        self.shards, self.tensors, self._starts = {}, {}, {}
        owner, weights = self.storage.owner, self.storage.weights
        hidden = set(self.storage.cache)
        codes = {weight.parts[CODES].info.name for weight in weights.values()}
        for shard in self.original.shards.values():
            infos = []
            for name in shard.tensors:
                if name in codes:
                    weight = weights[owner[name]]
                    infos.append(TensorInfo(weight.name, shard.name, self.dtype, weight.shape, 0, 0))
                elif name not in owner and name not in hidden:
                    infos.append(self.original.tensors[name])
            if len(infos) == len(shard.tensors) and not owner.keys() & set(shard.tensors):
                self.shards[shard.name] = shard
            else:
                self.shards[shard.name], infos = laid_out(infos, shard.name)
            self.tensors |= {info.name: info for info in infos}

    def _is_kept(self, shard: str) -> bool:
        return self.shards[shard] is self.original.shards.get(shard)

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        weight = self.storage.weights.get(name)
        if weight is None:
            return self.original.read(name, first, count)
        count = weight.numel - first if count is None else count
        return cast(read_range(self.original, weight, first, count), self.dtype)


def decoded(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """A checkpoint as plain numbers: the same one where it is plain already.

    Args:
        dtype: that quantized weights are read in; None: float32, or what it was before.

    Raises:
        FamilyError: quantized weights that are not whole, or are not what config.json declares.
    """
    if isinstance(checkpoint, DecodedCheckpoint):
        return (
            checkpoint
            if dtype in (None, checkpoint.dtype)
            else DecodedCheckpoint.of(checkpoint.original, checkpoint.storage, dtype or torch.float32)
        )
    if isinstance(checkpoint, ExtendedCheckpoint):
        return replace_original(checkpoint, decoded(checkpoint.original, dtype))
    storage = recognise_storage(checkpoint)
    return checkpoint if storage is None else DecodedCheckpoint.of(checkpoint, storage, dtype or torch.float32)


def replace_original(checkpoint: ExtendedCheckpoint, original: Checkpoint) -> ExtendedCheckpoint:
    """An extended checkpoint of another original with the same tensors."""
    if original is checkpoint.original:
        return checkpoint
    found = replace(checkpoint, original=original)
    found._lay_out()
    return found


def storage_of(checkpoint: Checkpoint) -> Storage | None:
    """How the weights that a checkpoint is read from are stored; None where all are plain."""
    if isinstance(checkpoint, DecodedCheckpoint):
        return checkpoint.storage
    return storage_of(checkpoint.original) if isinstance(checkpoint, VirtualCheckpoint) else None
