"""An output read as if it had been written: its values as they are after they have been stored, without a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.virtual import VirtualCheckpoint, laid_out
from hf_moe_lmc.formats.protocol import CODES, StoredWeight
from hf_moe_lmc.formats.reading import flat, read_range
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.writing.encoded import EncodedStream, Origin, anew
from hf_moe_lmc.writing.units import Outside, Unit, units

Part = tuple[Unit, Callable[[], Origin | Tensor]]  # and what it is made of


@dataclass
class WrittenCheckpoint(VirtualCheckpoint):
    """An output, read as if it had been written.

    Attributes:
        original: the checkpoint whose layout it has, read as numbers.
        stream: computes its values.
    """

    stream: EncodedStream = field(kw_only=True)
    _parts: dict[str, tuple[Sequence[Part], Outside | None]] = field(default_factory=dict, repr=False)
    _last: tuple[str, int, Tensor] | None = field(default=None, repr=False)  # of a unit that is read in pieces

    def _lay_out(self) -> None:
        self.shards, self.tensors, self._starts = {}, {}, {}
        for name, shard in self.original.shards.items():
            infos = [self.original.tensors[key] for key in shard.tensors]
            written = [info if self._weight(info.name) else replace(info, dtype=self._dtype(info.name)) for info in infos]
            self.shards[name], placed = laid_out(written, name)
            self.tensors |= {info.name: info for info in placed}

    def _dtype(self, name: str) -> torch.dtype:
        return self.stream.template.tensors[name].dtype

    def _is_kept(self, shard: str) -> bool:
        return False

    def _weight(self, name: str) -> StoredWeight | None:
        """How a tensor is stored; None: as numbers."""
        storage, tensors = self.stream.storage, self.stream.template.tensors
        weight = storage.weights.get(name) if storage else None
        codes = weight.parts[CODES].info.name if weight else name
        return self.stream.weight_of(codes) if codes in tensors else None

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        info, weight = self.tensors[name], self._weight(name)
        last = info.numel if count is None else first + count
        if weight is None:
            return self.stream.numbers(name, first, last - first)
        found, start = [], None
        for part in self._parts_of(weight)[0]:
            unit = part[0]
            if unit.start < last and unit.start + unit.numel > first:
                start = unit.start if start is None else start
                found.append(self._unit(weight, part, whole=first <= unit.start and unit.start + unit.numel <= last))
        assert start is not None
        values = torch.cat(found) if found[1:] else found[0]
        return values if len(values) == last - first else values[first - start : last - start].clone()

    def _parts_of(self, weight: StoredWeight) -> tuple[Sequence[Part], Outside | None]:
        """A weight in units, with what they have in common outside the MoE blocks."""
        if weight.name not in self._parts:
            stream, ranges = self.stream, self.stream.ranges(weight.name)
            every = list(units(weight, ranges))
            whole = None if ranges else Outside(weight, every, stream.outside, stream.side)
            made = [partial(stream.of_rows, unit, whole) if whole else partial(stream.of_block, unit) for unit in every]
            self._parts[weight.name] = list(zip(every, made, strict=True)), whole
        return self._parts[weight.name]

    def _unit(self, weight: StoredWeight, part: Part, *, whole: bool) -> Tensor:
        """The values of a unit: float32, flat in the shape of the weight. What is read in pieces is held for the next piece."""
        unit, last = part[0], self._last
        if last and last[:2] == (weight.name, unit.first):
            return last[2].clone() if whole else last[2]
        values = self._read_back(weight, *part)
        if not whole:
            self._last = (weight.name, unit.first, values)
        return values

    def _read_back(self, weight: StoredWeight, unit: Unit, content: Callable[[], Origin | Tensor]) -> Tensor:
        found, storage, outside = content(), self.stream.storage, self._parts_of(weight)[1]
        assert storage is not None
        if isinstance(found, Origin):
            values = read_range(self.stream.stored, storage.weights[found.name], *found.range)
            return values if found.sign is None else values * found.sign().view(-1)
        largest = outside.largest(unit.first // weight.rows) if outside else None
        parts = [flat(weight, weight.format.decode(stored, 0, weight.columns)) for _, _, stored in anew(unit, found, largest)]
        return torch.cat(parts) if parts[1:] else parts[0]


def as_written(model: MoEModel, stream: EncodedStream) -> MoEModel:
    """An output in the layout of `model`, to be read as if it had been written."""
    layout = model.checkpoint
    found = WrittenCheckpoint(source=layout.source, config=layout.config, shards={}, tensors={}, original=layout, stream=stream)
    found._lay_out()
    return model.on(found)
