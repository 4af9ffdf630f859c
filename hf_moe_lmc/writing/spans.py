"""Ranges of a shard, computed when they are written: bytes copied, or interpolated between two checkpoints.

One pass over the inputs can feed several outputs of one layout: a range is read once, and computed for each of them.

Tensors that are adjacent in the output and in all inputs are one range, however small they are. Ranges are cut to a bounded
size. So the time depends on the number of bytes, not on the number and the sizes of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo
from hf_moe_lmc.errors import MismatchError
from hf_moe_lmc.runtime.memory import reused
from hf_moe_lmc.writing.held import Held
from hf_moe_lmc.writing.interpolation import interpolate, interpolate_into
from hf_moe_lmc.writing.rounding import RoundingErrors

GLANCE = 1 << 14  # elements that are compared first to see whether two tensors are equal
SPAN = 8 << 20  # most bytes of one range outside the MoE blocks


Compute = Callable[[Sequence[int]], Iterator[Tensor]]


def alone(compute: Callable[[], Tensor]) -> Compute:
    """What a span computes for the only output of a stream."""

    def rows(wanted: Sequence[int]) -> Iterator[Tensor]:
        yield from (compute() for _ in wanted)

    return rows


@dataclass(frozen=True)
class Span:
    """A contiguous range of one shard, at the same place in each output.

    Attributes:
        start: its first byte in the file.
        count: its elements.
        dtype: in which they are written.
        compute: numbers of outputs -> the values there, a row for each, in that dtype or a wider one. What the outputs share
            is read once. A row holds until the next one is asked for.
    """

    start: int
    count: int
    dtype: torch.dtype
    compute: Compute

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


class TensorSource(Protocol):
    """Values for tensors of a checkpoint, under its names, in its shapes, in one output or several."""

    def spans(self, names: Sequence[str]) -> Iterator[Span]:
        """All bytes of some tensors of one shard, named in file order."""

    def read(self, name: str) -> Tensor:
        """One tensor of the only output, flat, not yet cast to the checkpoint's dtype."""

    def values(self, name: str, first: int, count: int) -> Tensor:
        """A range of one tensor, not yet cast to the checkpoint's dtype."""

    def keeps(self, side: str, name: str, ranges: Sequence[tuple[int, int]]) -> bool:
        """Whether a tensor has the very values of side `a` or `b`, so that its bytes can stay.

        Args:
            ranges: (first element, elements) of parts that fit into memory; together, all of it.
        """


@dataclass(frozen=True)
class Copied:
    """The values of a checkpoint itself, the same in each output."""

    checkpoint: Checkpoint

    def spans(self, names: Sequence[str]) -> Iterator[Span]:
        for run in _runs([self.checkpoint.tensors[name] for name in names]):
            for first, count in _steps(run):
                yield Span(run.start + first * run.dtype.itemsize, count, run.dtype, partial(self._copy, run, first, count))

    def _copy(self, run: _Run, first: int, count: int, wanted: Sequence[int]) -> Iterator[Tensor]:
        values = reused(count, run.dtype)
        self.checkpoint.fill(values, run.shard, run.start + first * run.dtype.itemsize)
        yield from (values for _ in wanted)

    def read(self, name: str) -> Tensor:
        return self.checkpoint.read(name)

    def values(self, name: str, first: int, count: int) -> Tensor:
        return self.checkpoint.read(name, first, count)

    def keeps(self, side: str, name: str, ranges: Sequence[tuple[int, int]]) -> bool:
        return bool(side)


@dataclass(frozen=True)
class Interpolated:
    """Points between two checkpoints that hold the same tensors, in the dtypes of `a`.

    Attributes:
        t: of each output.
        held: what `values` shares with other points between the two.
    """

    a: Checkpoint
    b: Checkpoint
    t: tuple[float, ...]
    held: Held = field(default_factory=Held)

    def spans(self, names: Sequence[str]) -> Iterator[Span]:
        tensors, partners = ([checkpoint.tensors[name] for name in names] for checkpoint in (self.a, self.b))
        for run in _runs(tensors, partners):
            for first, count in _steps(run):
                yield Span(run.start + first * run.dtype.itemsize, count, run.dtype, partial(self._blend, run, first, count))

    def _blend(self, run: _Run, first: int, count: int, wanted: Sequence[int]) -> Iterator[Tensor]:
        """Memory: a range of A, one of B, and a third one where there are several outputs. The last one is computed in A's."""
        assert run.partner is not None
        values_a, values_b = reused(count, run.dtype), reused(count, run.partner.dtype)
        points, floating = [self.t[number] for number in wanted], run.dtype.is_floating_point
        if any(t != 1 for t in points) or not floating:
            self.a.fill(values_a, run.shard, run.start + first * run.dtype.itemsize)
        if any(t != 0 for t in points) or not floating:
            self.b.fill(values_b, run.partner.shard, run.partner.start + first * run.partner.dtype.itemsize)
        row = reused(count, run.dtype) if len(points) > 1 else values_a
        for i, t in enumerate(points, 1):
            out = row if i < len(points) else values_a
            try:
                interpolate_into(out, values_a, values_b, t)
            except MismatchError as error:
                raise MismatchError(f"{run.locate(first, values_a, values_b)}: {error}") from error
            yield out

    def read(self, name: str) -> Tensor:
        (t,) = self.t
        try:
            return interpolate(self.a.read(name), self.b.read(name), t)
        except MismatchError as error:
            raise MismatchError(f"{name}: {error}") from error

    def values(self, name: str, first: int, count: int) -> Tensor:
        (t,) = self.t
        try:
            return interpolate(self._range("a", name, first, count), self._range("b", name, first, count), t)
        except MismatchError as error:
            raise MismatchError(f"{name}: {error}") from error

    def _range(self, side: str, name: str, first: int, count: int) -> Tensor:
        found, key = self.held.of(side), (name, first, count)
        if key not in found:
            found[key] = (self.a if side == "a" else self.b).read(*key)
        return cast(Tensor, found[key])

    def keeps(self, side: str, name: str, ranges: Sequence[tuple[int, int]]) -> bool:
        (t,) = self.t
        if side != "a" or t == 0:
            return (side, t) in (("a", 0), ("b", 1))
        return self.held.answer(name, lambda: self._are_equal(name, ranges))

    def _are_equal(self, name: str, ranges: Sequence[tuple[int, int]]) -> bool:
        first, count = ranges[0]
        glance = [(first, min(count, GLANCE))]  # most weights differ at once
        return all(torch.equal(self.a.read(name, *one).float(), self.b.read(name, *one).float()) for one in [*glance, *ranges])


@dataclass(frozen=True)
class PlainStream:
    """The checkpoints at points between two that hold the same tensors, whatever these are.

    Attributes:
        t: of each output.
    """

    a: Checkpoint
    b: Checkpoint
    t: tuple[float, ...]
    tallies: ClassVar[tuple[RoundingErrors, ...]] = ()  # nothing is quantized

    @property
    def template(self) -> Checkpoint:
        return self.a

    def spans(self, shard: Shard) -> Iterator[Span]:
        return Interpolated(self.a, self.b, self.t).spans(shard.tensors)


@dataclass(frozen=True)
class _Run:
    """Tensors of one dtype that lie one after the other, and do so in a partner as well.

    Attributes:
        start: first byte in the file of `shard`.
        members: names, with the number of elements before each.
        partner: the same elements elsewhere.
    """

    shard: str
    start: int
    dtype: torch.dtype
    members: list[tuple[str, int]]
    count: int
    partner: TensorInfo | None

    def locate(self, first: int, values_a: Tensor, values_b: Tensor) -> str:
        """The tensor of the first element in which two ranges that begin at `first` differ."""
        at = first + int((values_a != values_b.to(values_a.dtype)).nonzero()[0])
        return [name for name, before in self.members if before <= at][-1]


def _runs(tensors: Sequence[TensorInfo], partners: Sequence[TensorInfo] | None = None) -> Iterator[_Run]:
    """Joins tensors of one shard, given in file order, as far as they and their partners are contiguous."""
    begun: list[int] = []

    def run() -> _Run:
        first = tensors[begun[0]]
        members, count = [], 0
        for i in begun:
            members.append((tensors[i].name, count))
            count += tensors[i].numel
        return _Run(first.shard, first.start, first.dtype, members, count, partners[begun[0]] if partners else None)

    for i, info in enumerate(tensors):
        joined = bool(begun) and _follows(tensors[begun[-1]], info)
        if joined and partners:
            joined = _follows(partners[begun[-1]], partners[i])
        if begun and not joined:
            yield run()
            begun = []
        begun.append(i)
    if begun:
        yield run()


def _follows(before: TensorInfo, info: TensorInfo) -> bool:
    same = before.shard == info.shard and before.dtype == info.dtype
    return same and before.start + before.nbytes == info.start


def _steps(run: _Run) -> Iterator[tuple[int, int]]:
    """(first element, number of elements) of ranges of a bounded size; none of an empty run."""
    widest = max(run.dtype.itemsize, run.partner.dtype.itemsize if run.partner else 0)
    step = SPAN // widest
    for first in range(0, run.count, step):
        yield first, min(step, run.count - first)
