"""Outputs in a storage format: weights are computed as numbers and stored again, or their bytes are moved.

A weight is written in units: one expert of it, or rows outside the MoE blocks. A unit is computed once for all its parts, its
codes and its scales. The parts that are written later wait for that; they are small.

What is copied and what is rounded again:

- the bytes stay where the output has the format of A, and t = 0 or the weights of A and B' are equal;
- the bytes move where the output has the format of B, t = 1, and the format carries what was done to them exactly;
- all else is interpolated in float32 and stored anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, is_finite
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.formats.protocol import CODES, Part, StoredWeight
from hf_moe_lmc.formats.recognition import Storage
from hf_moe_lmc.formats.templates import Template
from hf_moe_lmc.writing.held import Held
from hf_moe_lmc.writing.interpolation import interpolate
from hf_moe_lmc.writing.rounding import RoundingErrors, Tally, kind_of
from hf_moe_lmc.writing.spans import SPAN, Span, TensorSource, alone
from hf_moe_lmc.writing.units import Once, Outside, Range, Unit, units

LAG = 8  # units between the codes and the scales of one, so that no thread waits for another's work
DIVIDES = "input_global_scale"  # what activations are divided by: the larger scale is the smaller number


@dataclass(frozen=True)
class Origin:
    """Where the bytes of a range of a weight stand.

    Attributes:
        name: of the weight; range: of its elements.
        sign: what its values are multiplied by, 1 or -1, a row in the layout of the range; None: nothing.
    """

    name: str
    range: Range
    sign: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Mixture:
    """What the values of a range are made of: (1 - t) a + t b, or a alone."""

    a: Tensor
    b: Tensor | None = None
    t: float = 0.0


class Blocks(Protocol):
    """The tensors of a checkpoint that lie in MoE blocks, by ranges that belong to one expert each."""

    def ranges(self, name: str) -> list[Range]:
        """The ranges of a tensor; none if it lies in no block."""

    def kind(self, name: str) -> str:
        """What a tensor is: gate, up, down."""

    def values(self, name: str, of: Range) -> Tensor:
        """A range as it is to be written, a row in the dtype of the computation."""

    def mixture(self, name: str, of: Sequence[Range]) -> Mixture:
        """What the values of neighbouring ranges are made of."""

    def origin(self, name: str, of: Range, side: str) -> Origin | None:
        """Where the bytes of a range stand, if the output keeps those of `side`, as far as no value has to be looked at."""

    def activation(self, weight: StoredWeight, info: TensorInfo, side: str) -> Tensor:
        """A scale of what goes into a weight, or one for each of its experts."""


@dataclass(frozen=True)
class EncodedStream:
    """An output whose layout, storage or dtypes are not those of the numbers that it is made of.

    Attributes:
        template: of the output.
        stored: the checkpoint whose layout that is, as it is stored.
        sides: the checkpoints that the output is made of: those whose scales of activations it covers.
        outside: where the values of tensors outside the MoE blocks come from.
        blocks: where all others come from; None: nothing is known of MoE blocks.
        side: `a` or `b`: whose bytes are kept where they can be.
    """

    template: Template
    stored: Checkpoint
    sides: tuple[Checkpoint, ...]
    outside: TensorSource
    blocks: Blocks | None
    side: str
    errors: RoundingErrors = field(default_factory=RoundingErrors)

    @property
    def storage(self) -> Storage | None:
        return self.template.storage

    @property
    def tallies(self) -> tuple[RoundingErrors, ...]:
        return (self.errors,) if self.storage else ()

    def spans(self, shard: Shard) -> Iterator[Span]:
        waiting: deque[Span] = deque()
        here = set(shard.tensors)
        begun: set[str] = set()
        for name in shard.tensors:
            weight = self.weight_of(name)
            if weight is None:
                yield from self._plain_spans(self.template.tensors[name])
            elif weight.name not in begun:
                begun.add(weight.name)
                for codes, others in self._weight_spans(weight, here, shard.name):
                    yield from codes
                    waiting.extend(others)
                    while len(waiting) > LAG:
                        yield waiting.popleft()
        yield from waiting

    def weight_of(self, name: str) -> StoredWeight | None:
        """The quantized weight that a tensor of the template is a part of."""
        if self.storage is None or name not in self.storage.owner:
            return None
        weight = self.storage.weights[self.storage.owner[name]]
        shape = next(info.shape for info in weight.infos if info.name == name)
        return weight if self.template.tensors[name].shape == shape else None

    def ranges(self, name: str) -> list[Range]:
        return self.blocks.ranges(name) if self.blocks else []

    # --- tensors that are written as numbers --------------------------------------------------------------------------

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        """A range of a tensor that is written as numbers, a row in the dtype that it is written in."""
        dtype, last = self.template.tensors[name].dtype, first + count
        ranges = self.ranges(name)
        if self.blocks is None or not ranges:
            return self.outside.values(name, first, count).to(dtype)
        wanted = [(start, size) for start, size in ranges if start < last and start + size > first]
        parts = [self.blocks.values(name, one).to(dtype) for one in wanted]
        return (torch.cat(parts) if parts[1:] else parts[0])[first - wanted[0][0] : last - wanted[0][0]]

    def _plain_spans(self, info: TensorInfo) -> Iterator[Span]:
        if self.storage and info.name in self.storage.cache:
            yield _whole_span(info, partial(self._beside, info))
            return
        compute: Callable[[str, int, int], Tensor] = self.outside.values
        ranges = self.ranges(info.name)
        if ranges:
            compute = self._block_values
        else:
            step = SPAN // max(info.dtype.itemsize, 4)
            ranges = [(first, min(step, info.numel - first)) for first in range(0, info.numel, step)]
        for first, count in ranges:
            start = info.start + first * info.dtype.itemsize
            yield Span(start, count, info.dtype, alone(partial(compute, info.name, first, count)))

    def _block_values(self, name: str, first: int, count: int) -> Tensor:
        assert self.blocks is not None
        return self.blocks.values(name, (first, count))

    def _beside(self, info: TensorInfo) -> Tensor:
        """A scale outside the MoE blocks, of activations or of keys and values: the largest of those under its name."""
        found = [
            one.stored.read(info.name)
            for one in self.sides
            if info.name in one.stored.tensors and one.stored.tensors[info.name].shape == info.shape
        ]
        return larger(found, info.name)

    # --- quantized weights --------------------------------------------------------------------------------------------

    def _weight_spans(self, weight: StoredWeight, here: set[str], shard: str) -> Iterator[tuple[list[Span], list[Span]]]:
        """For each unit, the spans of its codes, and those of its other parts that lie in this shard."""
        parts = {role: part for role, part in weight.parts.items() if part.info.name in here}
        ranges = self.ranges(weight.name)
        every = list(units(weight, ranges))
        # codes and scales in two shards are computed in each; they count where the codes are
        tally = self.errors.of(shard) if weight.parts[CODES].info.name in here else Tally()
        compute = partial(self._in_block, tally)
        if not ranges:
            compute = partial(self._outside, tally, Outside(weight, every, self.outside, self.side))
        for unit in every:
            windows = {role: unit.window(part) for role, part in parts.items()}
            windows = {role: window for role, window in windows.items() if window[0] < window[1]}
            once = Once(partial(compute, unit), len(windows))
            spans = {role: self._part_span(weight.parts[role], window, once, role) for role, window in windows.items()}
            yield [spans.pop(CODES)] if CODES in spans else [], list(spans.values())
        others = [_whole_span(self._info(info), partial(self.stored.read, info.name)) for info in weight.beside]
        for info in weight.activations:
            read = (
                partial(self.blocks.activation, weight, info, self.side)
                if self.blocks and ranges
                else partial(self._beside, info)
            )
            others.append(_whole_span(self._info(info), read))
        yield [], [span for span, info in zip(others, (*weight.beside, *weight.activations), strict=True) if info.name in here]

    def _info(self, info: TensorInfo) -> TensorInfo:
        return self.template.tensors[info.name]

    def _part_span(self, part: Part, window: tuple[int, int], once: Once, role: str) -> Span:
        info = self._info(part.info)
        start = info.start + window[0] * part.width * info.dtype.itemsize
        return Span(start, (window[1] - window[0]) * part.width, info.dtype, alone(partial(once.take, role)))

    def _in_block(self, tally: Tally, unit: Unit) -> dict[str, Tensor]:
        """The parts of one expert of a weight."""
        assert self.blocks is not None
        kind = kind_of(unit.weight.name, self.blocks.kind(unit.weight.name))
        found = self.of_block(unit)
        return self._kept(unit, found, tally, kind) if isinstance(found, Origin) else self._encoded(unit, found, tally, kind)

    def of_block(self, unit: Unit) -> Origin | Tensor:
        """Where the bytes of one expert of a weight stand, or its values, which are stored anew."""
        assert self.blocks is not None
        name = unit.weight.name
        origin = self.blocks.origin(name, unit.ranges[0], self.side) if len(unit.ranges) == 1 else None
        if origin:
            return origin
        found = self.blocks.mixture(name, unit.ranges)
        if found.b is None:
            return found.a
        if self.side == "a" and (found.t == 0 or torch.equal(found.a, found.b)):
            return Origin(name, unit.whole)
        return interpolate(found.a, found.b, found.t)

    def _outside(self, tally: Tally, whole: Outside, unit: Unit) -> dict[str, Tensor]:
        """The parts of some rows of a weight outside the MoE blocks."""
        kind = kind_of(unit.weight.name, None)
        found = self.of_rows(unit, whole)
        if isinstance(found, Origin):
            return self._kept(unit, found, tally, kind)
        return self._encoded(unit, found, tally, kind, whole.largest(unit.first // unit.weight.rows))

    def of_rows(self, unit: Unit, whole: Outside) -> Origin | Tensor:
        """As `of_block`, of some rows outside the MoE blocks."""
        if whole.is_kept():
            return Origin(unit.weight.name, unit.whole)
        return self.outside.values(unit.weight.name, unit.start, unit.numel)

    def _kept(self, unit: Unit, origin: Origin, tally: Tally, kind: str) -> dict[str, Tensor]:
        """The bytes of a unit, from the place that they stand in, with the signs that they get."""
        assert self.storage is not None
        weight = self.storage.weights[origin.name]
        same = Unit(weight, origin.range[0] // weight.columns, unit.count)
        found = {}
        for role, part in weight.parts.items():
            start, end = same.window(part)
            stored = self.stored.read(part.info.name, start * part.width, (end - start) * part.width)
            found[role] = stored.view(-1, part.width)
        if origin.sign is not None:
            found[CODES] = weight.format.negated(found[CODES], _as_stored(weight, origin.sign()))
        moved = (origin.name, same.first) != (unit.weight.name, unit.first)
        tally.keep(kind, moved=moved, sign=origin.sign is not None)
        return found

    def _encoded(self, unit: Unit, values: Tensor, tally: Tally, kind: str, largest: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of a unit, stored anew."""
        found: dict[str, list[Tensor]] = {role: [] for role in unit.weight.parts}
        for place, matrix, stored in anew(unit, values, largest):
            tally.measure(kind, unit.weight, place, matrix, stored)
            for role, part in stored.items():
                found[role].append(part)
        return {role: torch.cat(parts) if parts[1:] else parts[0] for role, parts in found.items()}


def anew(unit: Unit, values: Tensor, largest: Tensor | None) -> Iterator[tuple[tuple[int, int], Tensor, dict[str, Tensor]]]:
    """The matrices of a unit: number and first row, values as rows, and the parts that they are stored in.

    Raises:
        CheckpointError: a value that the format has no code for.
    """
    weight = unit.weight
    if not weight.parts[CODES].info.dtype.is_floating_point and not is_finite(values):  # in FP8, the writer sees it
        raise CheckpointError(
            f"{weight.name}: a value is NaN or infinite, for which {weight.format.kind} has no code; repair the inputs"
        )
    rows = _as_stored(weight, values.float())
    dtypes = {role: part.info.dtype for role, part in weight.parts.items()}
    start = 0
    for number, first, count in unit.matrices():
        matrix = rows[start : start + count]
        above = None if weight.format.rows else matrix.abs().amax() if largest is None else largest
        yield (number, first), matrix, weight.format.encode(matrix, dtypes, above)
        start += count


@dataclass(frozen=True)
class EncodedStreams:
    """Several outputs of one layout. A range is read and decoded once for all of them.

    Attributes:
        template: of each output.
        streams: one for each output.
        held: what they share.
    """

    template: Template
    streams: tuple[EncodedStream, ...]
    held: Held

    @property
    def tallies(self) -> tuple[RoundingErrors, ...]:
        return tuple(tally for stream in self.streams for tally in stream.tallies)

    def spans(self, shard: Shard) -> Iterator[Span]:
        for spans in zip(*(stream.spans(shard) for stream in self.streams), strict=True):
            first = spans[0]
            yield Span(first.start, first.count, first.dtype, partial(self._of_outputs, spans))

    def _of_outputs(self, spans: Sequence[Span], wanted: Sequence[int]) -> Iterator[Tensor]:
        if len(wanted) == 1:
            yield from spans[wanted[0]].compute([0])
            return
        with self.held.for_one_range():
            for number in wanted:
                yield from spans[number].compute([0])


def _as_stored(weight: StoredWeight, values: Tensor) -> Tensor:
    """Values in the shape of a weight as rows of what is stored."""
    if not weight.transposed:
        return values.reshape(-1, weight.columns)
    return values.view(-1, weight.columns, weight.rows).transpose(1, 2).reshape(-1, weight.columns)


def _whole_span(info: TensorInfo, compute: Callable[[], Tensor]) -> Span:
    return Span(info.start, info.numel, info.dtype, alone(compute))


def larger(found: list[Tensor], name: str) -> Tensor:
    """The larger scale of several, element by element, in the dtype of the first."""
    result = found[0].clone()
    pick = torch.minimum if name.endswith(DIVIDES) else torch.maximum
    for other in found[1:]:
        result = pick(result, other.to(result.dtype).view(result.shape))
    return result
