"""The MoE blocks of an output in a storage format: what its experts are made of, and whose bytes they can keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.formats.protocol import StoredWeight
from hf_moe_lmc.formats.recognition import Storage
from hf_moe_lmc.moe.action import ActedLayer, AwaitedLayer
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import is_expert_role, split_role
from hf_moe_lmc.moe.view import LayerSource, Piece
from hf_moe_lmc.writing.carried import CarriedLayer, origin_of
from hf_moe_lmc.writing.encoded import Mixture, Origin, larger
from hf_moe_lmc.writing.held import Held
from hf_moe_lmc.writing.streams import HeldLayer, InterpolatedLayer, MadeLayer
from hf_moe_lmc.writing.units import Range


@dataclass(frozen=True)
class ModelBlocks:
    """The MoE blocks of a model.

    Attributes:
        model: whose layout the output has, read as numbers.
        layers: where the values of each of its MoE layers come from.
        storage: of the output; None: it is plain.
        stored: the checkpoint whose layout that is, as it is stored.
        held: what it shares with other points between two models.
    """

    model: MoEModel
    layers: Mapping[int, LayerSource]
    storage: Storage | None
    stored: Checkpoint
    held: Held = field(default_factory=Held)

    def ranges(self, name: str) -> list[Range]:
        layer = self.model.layer_of.get(name)
        return [(piece.first, piece.count) for piece in layer.pieces(name)] if layer else []

    def kind(self, name: str) -> str:
        return "_".join(split_role(role)[1] for role in self.model.layer_of[name].claims[name].roles)

    def _piece(self, name: str, of: Range) -> tuple[MoELayer, Piece]:
        layer = self.model.layer_of[name]
        return layer, next(piece for piece in layer.pieces(name) if (piece.first, piece.count) == of)

    def values(self, name: str, of: Range) -> Tensor:
        layer, piece = self._piece(name, of)
        return layer.assemble(name, piece, self._held(layer.index))

    def _held(self, index: int) -> LayerSource:
        """A block whose sides hold what they are asked for, as long as its range is computed."""
        source = self.layers[index]
        if not isinstance(source, InterpolatedLayer):
            return source
        of_a, of_b = (self.held.of((side, index)) for side in "ab")
        return replace(source, a=HeldLayer(source.a, of_a), b=HeldLayer(source.b, of_b))

    def mixture(self, name: str, of: Sequence[Range]) -> Mixture:
        source = self._held(self.model.layer_of[name].index)
        if not isinstance(source, InterpolatedLayer):
            values = self._joined(name, of, source)
            if _is_made(source):  # bytes of A stay where nothing comes of it but A's values
                return Mixture(self._joined(name, of, source.parents[0]), values, 1.0)
            return Mixture(values)
        return Mixture(self._joined(name, of, source.a), self._joined(name, of, source.b), source.t)

    def _joined(self, name: str, of: Sequence[Range], source: LayerSource) -> Tensor:
        parts = [layer.assemble(name, piece, source).float() for layer, piece in (self._piece(name, one) for one in of)]
        return torch.cat(parts) if parts[1:] else parts[0]

    def origin(self, name: str, of: Range, side: str) -> Origin | None:
        layer, piece = self._piece(name, of)
        source = self.layers[layer.index]
        if isinstance(source, InterpolatedLayer):
            if side == "a" and source.t == 0:
                return Origin(name, of)
            if side != "b" or source.t != 1:
                return None
            source = source.b
        return origin_of(layer, name, piece, source, self.storage, self.stored)

    def activation(self, weight: StoredWeight, info: TensorInfo, side: str) -> Tensor:
        layer = self.model.layer_of[weight.name]
        claim = layer.claims[weight.name]
        role = claim.roles[0]
        experts = [claim.expert]
        if is_expert_role(role) and claim.expert is None:
            experts = list(range(layer.banks[split_role(role)[0]].experts))
        source = self.layers[layer.index]
        sides: tuple[LayerSource, ...] = (source,)
        if isinstance(source, InterpolatedLayer):
            whole = {"a": source.t == 0, "b": source.t == 1}.get(side, False)
            sides = ({"a": source.a, "b": source.b}[side],) if whole else source.parents
        elif _is_made(source):
            sides = source.parents
        ending = _ending(info.name, weight.name)
        found = []
        for expert in experts:
            scales = [one for one in (_activation_of(side, role, expert, ending) for side in sides) if one is not None]
            found.append(larger(scales, info.name))
        if info.numel == len(found):
            return torch.stack([one.reshape(-1)[0] for one in found])
        return larger([one.reshape(-1) for one in found], info.name)


def _is_made(source: LayerSource) -> TypeGuard[MadeLayer]:
    return hasattr(source, "parents")


def _ending(part: str, weight: str) -> str:
    """What the name of a part adds to that of its weight."""
    return part.removeprefix(weight).removeprefix(weight.removesuffix(".weight"))


def _activation_of(source: LayerSource, role: str, expert: int | None, ending: str) -> Tensor | None:
    """The scale that a source has for one expert; None where it has none."""
    if isinstance(source, AwaitedLayer | CarriedLayer):
        source = source.acted
    layer = source
    if isinstance(source, ActedLayer):
        layer = source.layer
        if is_expert_role(role) and expert is not None:
            expert = int(source.symmetry.banks[split_role(role)[0]].expert_order[expert])
    assert isinstance(layer, MoELayer)
    storage = storage_of(layer.checkpoint)
    if storage is None:
        return None
    name, piece = layer.piece_of(role, expert)
    weight = storage.weights.get(name)
    held = [info for info in weight.activations if _ending(info.name, name) == ending] if weight else []
    if weight is None or not held:
        return None
    values = layer.checkpoint.stored.read(held[0].name)
    count = weight.numel // piece.count
    return values.view(count, -1)[piece.first // piece.count] if count > 1 and values.numel() == count else values
