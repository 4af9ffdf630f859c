"""Quantized weights in units that are written each by itself, and computed once for all their parts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hf_moe_lmc.formats.protocol import Part, StoredWeight
from hf_moe_lmc.writing.spans import SPAN, TensorSource

Range = tuple[int, int]  # first element, number of elements


@dataclass(frozen=True)
class Unit:
    """Rows of a weight that are computed together, counted over all the matrices that it is stored as.

    Attributes:
        ranges: of the weight's elements that it holds: those of experts; none outside MoE blocks.
    """

    weight: StoredWeight
    first: int
    count: int
    ranges: tuple[Range, ...] = ()

    @property
    def start(self) -> int:
        """Its first element in the shape of the weight."""
        return self.first * self.weight.columns

    @property
    def numel(self) -> int:
        return self.count * self.weight.columns

    @property
    def whole(self) -> Range:
        """All of it as one range."""
        return self.start, self.numel

    def matrices(self) -> Iterator[tuple[int, int, int]]:
        """(matrix, first row in it, rows) of what it spans."""
        at, end = self.first, self.first + self.count
        while at < end:
            matrix, row = divmod(at, self.weight.rows)
            rows = min(self.weight.rows - row, end - at)
            yield matrix, row, rows
            at += rows

    def window(self, part: Part) -> tuple[int, int]:
        """First and last but one row of a part that it fills; an empty one where another unit fills it."""
        windows = [part.window(*one) for one in self.matrices()]
        first_row = self.first % self.weight.rows
        if part.per > 1 and first_row % part.per:
            return windows[0][1], windows[-1][1]  # the unit before it has filled the row that both lie in
        return windows[0][0], windows[-1][1]


@dataclass
class Once:
    """Something that several spans need: computed by the first that asks, kept until the last has asked."""

    compute: Callable[[], dict[str, Tensor]]
    left: int
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _found: dict[str, Tensor] = field(default_factory=dict)

    def take(self, role: str) -> Tensor:
        with self._lock:
            if not self._found:
                self._found = self.compute()
            self.left -= 1
            value = self._found[role]
            if not self.left:
                self._found = {}
            return value


def is_apart(weight: StoredWeight, of: Range) -> bool:
    """Whether a range of a weight shares no scale with what lies beside it."""
    matrix = weight.rows * weight.columns
    grain = matrix if weight.transposed or not weight.format.rows else weight.columns * weight.format.rows
    return all(place % matrix % grain == 0 for place in (of[0], of[0] + of[1]))


def units(weight: StoredWeight, ranges: Sequence[Range]) -> Iterator[Unit]:
    """A weight in units that can be stored each by itself: a bounded number of rows, or experts.

    Args:
        ranges: of the experts in it; none outside MoE blocks. Where scales are shared by several, all are one unit.
    """
    matrix = weight.rows * weight.columns
    if ranges:
        if all(is_apart(weight, one) for one in ranges):
            for first, count in ranges:
                yield Unit(weight, first // weight.columns, count // weight.columns, ((first, count),))
        else:
            yield Unit(weight, 0, weight.matrices * weight.rows, tuple(ranges))
        return
    step = weight.rows
    if not weight.transposed and matrix * 4 > SPAN:
        grain = weight.format.rows or 1
        step = max(grain, SPAN // (4 * weight.columns) // grain * grain)
    for i in range(weight.matrices):
        for row in range(0, weight.rows, step):
            yield Unit(weight, i * weight.rows + row, min(step, weight.rows - row))


@dataclass
class Outside:
    """What the units of one weight outside the MoE blocks have in common, found out once."""

    weight: StoredWeight
    units: Sequence[Unit]
    source: TensorSource
    side: str
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _kept: bool | None = None
    _largest: dict[int, Tensor] = field(default_factory=dict)

    def is_kept(self) -> bool:
        """Whether the bytes stay: see the module."""
        with self._lock:
            if self._kept is None:
                self._kept = self.source.keeps(self.side, self.weight.name, [(unit.start, unit.numel) for unit in self.units])
            return self._kept

    def largest(self, matrix: int) -> Tensor | None:
        """The largest absolute value of a matrix whose rows share a scale and are not in one unit; else None."""
        if self.weight.format.rows:
            return None
        mine = [unit for unit in self.units if unit.first // self.weight.rows == matrix]
        if len(mine) == 1:
            return None
        with self._lock:
            if matrix not in self._largest:
                found = (self.source.values(self.weight.name, unit.start, unit.numel).abs().amax() for unit in mine)
                self._largest[matrix] = torch.stack(list(found)).amax()
            return self._largest[matrix]
