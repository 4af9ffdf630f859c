"""Checkpoints that are computed as they are read: a model in other coordinates, and the points between two models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import Shard
from hf_moe_lmc.errors import MismatchError
from hf_moe_lmc.moe.action import Elements
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.view import LayerSource, Piece
from hf_moe_lmc.runtime.memory import like, reused
from hf_moe_lmc.writing.interpolation import interpolate, interpolate_into
from hf_moe_lmc.writing.rounding import RoundingErrors
from hf_moe_lmc.writing.spans import Copied, Interpolated, Span, TensorSource


@dataclass(frozen=True)
class ModelStream:
    """Checkpoints in the layout of `model` with the values of other sources, computed piece by piece in one pass.

    Attributes:
        layers: where the values of each MoE layer come from; what is no LayerLine is the same in each output.
        outside: where those of the tensors outside the MoE blocks come from.
    """

    model: MoEModel
    layers: Mapping[int, LayerSource | LayerLine]
    outside: TensorSource
    tallies: ClassVar[tuple[RoundingErrors, ...]] = ()  # nothing is quantized

    @property
    def template(self) -> Checkpoint:
        return self.model.checkpoint

    def spans(self, shard: Shard) -> Iterator[Span]:
        outside: list[str] = []
        for name in shard.tensors:
            layer = self.model.layer_of.get(name)
            if layer is None:
                outside.append(name)
                continue
            yield from self.outside.spans(outside)
            outside = []
            info = self.template.tensors[name]
            for piece in layer.pieces(name):
                start = info.start + piece.first * info.dtype.itemsize
                yield Span(start, piece.count, info.dtype, partial(self._assemble, layer, name, piece))
        yield from self.outside.spans(outside)

    def _assemble(self, layer: MoELayer, name: str, piece: Piece, wanted: Sequence[int]) -> Iterator[Tensor]:
        for source in self.in_outputs(layer.index, wanted):
            yield layer.assemble(name, piece, source)

    def in_outputs(self, layer: int, wanted: Sequence[int]) -> Iterator[LayerSource]:
        """An MoE layer in some outputs. What is read for one is held for the others, until the last of them is gone."""
        source = self.layers[layer]
        if isinstance(source, LayerLine):
            yield from source.at(wanted)
        else:
            yield from [_shared(source, wanted)] * len(wanted)


def whole(stream: ModelStream, name: str) -> Tensor:
    """One tensor of the only output of a stream in its shape, not yet cast to the dtype of the template."""
    info = stream.template.tensors[name]
    layer = stream.model.layer_of.get(name)
    if layer is None:
        return stream.outside.read(name).view(info.shape)
    (source,) = stream.in_outputs(layer.index, [0])
    values = torch.empty(0, dtype=info.dtype)
    for piece in layer.pieces(name):
        part = layer.assemble(name, piece, source)
        if piece.count == info.numel:
            return part.view(info.shape)
        if values.numel() < info.numel:
            values = reused(info.numel, part.dtype)
        values[piece.first : piece.first + piece.count] = part
    return values.view(info.shape)


def rewritten(model: MoEModel, elements: Elements) -> ModelStream:
    """`model` in the coordinates that group elements give it; tensors outside the MoE blocks byte for byte."""
    return ModelStream(model, model.acted(elements), Copied(model.checkpoint))


@dataclass(frozen=True)
class InterpolatedLayer:
    """A point on the line between two MoE blocks, those of layer `index`.

    Attributes:
        rounded: values of one dtype are returned in it, as if cast once; else in float32.
    """

    index: int
    a: LayerSource
    b: LayerSource
    t: float
    rounded: bool = False

    @property
    def parents(self) -> tuple[LayerSource, ...]:
        return self.a, self.b

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        a, b = self.a.stored(role, expert), self.b.stored(role, expert)
        try:
            if not (self.rounded and a.dtype == b.dtype):
                return interpolate(a, b, self.t)
            out = like(a)
            interpolate_into(out, a, b, self.t)
            return out
        except MismatchError as error:
            raise MismatchError(f"layer {self.index}: {role}: {error}") from error


class MadeLayer(LayerSource, Protocol):
    """A block whose values are computed from those of two others."""

    @property
    def parents(self) -> tuple[LayerSource, ...]:
        """A's and B''s: their scales of activations are those of what is made of them."""


class Between(Protocol):
    """A block between two blocks, as `InterpolatedLayer` is made: index, A's, B's, t, rounded."""

    def __call__(self, index: int, a: LayerSource, b: LayerSource, t: float, rounded: bool = False, /) -> MadeLayer: ...


class Merging(Protocol):
    """How the points between two models are made: the straight line, or what a repair has in place of it."""

    def between(self, layer: MoELayer) -> Between:
        """What makes the points of one MoE layer, given as A has it; called once, for all points."""

    def outside(self, start: TensorSource) -> TensorSource:
        """The tensors outside the MoE blocks, from those of the straight line."""


@dataclass(frozen=True)
class StraightLine:
    """The points (1 - t) A + t B'."""

    def between(self, layer: MoELayer) -> Between:
        return InterpolatedLayer

    def outside(self, start: TensorSource) -> TensorSource:
        return start


STRAIGHT = StraightLine()


@dataclass(frozen=True)
class LayerLine:
    """Points between two MoE blocks, those of layer `index`: one for each output.

    Attributes:
        t: of each output.
        rounded: as in InterpolatedLayer.
        between: makes each of them.
    """

    index: int
    a: LayerSource
    b: LayerSource
    t: tuple[float, ...]
    rounded: bool = False
    between: Between = InterpolatedLayer

    def at(self, wanted: Sequence[int]) -> Iterator[LayerSource]:
        a, b = _shared(self.a, wanted), _shared(self.b, wanted)
        for number in wanted:
            yield self.between(self.index, a, b, self.t[number], self.rounded)


@dataclass(frozen=True)
class HeldLayer:
    """A block that holds what it has been asked for, so that it is read once for several outputs."""

    source: LayerSource
    held: dict[tuple[str, int | None], Tensor] = field(default_factory=dict)

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        if (role, expert) not in self.held:
            self.held[role, expert] = self.source.stored(role, expert)
        return self.held[role, expert]


def _shared(source: LayerSource, wanted: Sequence[int]) -> LayerSource:
    return source if len(wanted) == 1 else HeldLayer(source)


def layers_at(a: MoEModel, acted: Mapping[int, LayerSource], t: float, merging: Merging = STRAIGHT) -> dict[int, LayerSource]:
    """The MoE layers of the point at one t, in A's layout, not rounded.

    Args:
        acted: those of B'. Layers for multi-token prediction that B lacks are A's.
    """
    return {
        index: merging.between(layer)(index, layer, acted[index], t) if index in acted else layer
        for index, layer in a.layers.items()
    }


def interpolated(
    a: MoEModel,
    b: MoEModel,
    elements: Elements,
    t: float | Sequence[float],
    *,
    rounded: bool = False,
    merging: Merging = STRAIGHT,
) -> ModelStream:
    """The checkpoints theta_t in A's layout, where B' is `b` in the coordinates that group elements give it.

    Args:
        t: of one output, or of each.
        rounded: it is to be written: no wider copies where A and B share a dtype.
        merging: how the points between the two are made.
    """
    acted = b.acted(elements)
    points = tuple(t) if isinstance(t, Sequence) else (t,)
    layers: dict[int, LayerSource | LayerLine] = {
        # layers for multi-token prediction that B lacks are A's
        index: LayerLine(index, layer, acted[index], points, rounded, merging.between(layer)) if index in acted else layer
        for index, layer in a.layers.items()
    }
    return ModelStream(a, layers, merging.outside(Interpolated(a.checkpoint, b.checkpoint, points)))
