"""What of a symmetry a storage format carries exactly: which bytes move where, and with which signs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.formats.protocol import CODES, StoredWeight
from hf_moe_lmc.formats.reading import read_part
from hf_moe_lmc.formats.recognition import Storage
from hf_moe_lmc.moe.action import ActedLayer, AwaitedLayer, Elements
from hf_moe_lmc.moe.experts import MATRICES
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import EXPERT_VECTORS, SHARED, UnitKind, is_expert_role, split_role
from hf_moe_lmc.moe.view import LayerSource, Piece
from hf_moe_lmc.symmetry.banks import qualified
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry
from hf_moe_lmc.writing.encoded import Origin
from hf_moe_lmc.writing.units import Range, is_apart


def origin_of(
    layer: MoELayer, name: str, piece: Piece, source: LayerSource, storage: Storage | None, stored: Checkpoint
) -> Origin | None:
    """Where the bytes stand that `source` has for a piece of `layer`; None where there are no such bytes.

    Args:
        stored: the checkpoint that holds the layer, as it is stored.
    """
    if isinstance(source, CarriedLayer | AwaitedLayer):
        source = source.acted
    if source is layer:
        return Origin(name, _range(piece))
    if not isinstance(source, ActedLayer) or source.layer is not layer or storage is None:
        return None
    role, expert = piece.parts[0]
    bank, base = split_role(role)
    if base.startswith("shared_"):
        units, place, kind = source.symmetry.shared, None, source.units[SHARED]
    elif is_expert_role(role):
        assert expert is not None
        g = source.symmetry.banks[bank]
        units, place, kind = g.units(expert), int(g.expert_order[expert]), source.units[bank]
    else:
        order = source.symmetry.banks[bank].expert_order
        return Origin(name, _range(piece)) if base not in EXPERT_VECTORS or _is_identity(order) else None
    if not _is_identity(units.order) or bool((units.scale.abs() != 1).any()):
        return None
    found, moved = layer.piece_of(role, place)
    if storage.weights[found].layout != storage.weights[name].layout:
        return None
    signed = {split_role(one)[1].removeprefix("shared_") for one, _ in piece.parts} & {"up", "down"}
    if not signed or bool((units.scale == 1).all()):
        return Origin(found, _range(moved))
    weight = storage.weights[found]
    if not weight.format.negatable(_codes(stored, weight, moved)):
        return None
    return Origin(found, _range(moved), partial(_signs, layer, name, piece, source.symmetry, kind))


def _range(piece: Piece) -> Range:
    return piece.first, piece.count


def _codes(stored: Checkpoint, weight: StoredWeight, piece: Piece) -> Tensor:
    first, count = piece.first // weight.columns, piece.count // weight.columns
    parts = [
        read_part(stored, weight.parts[CODES], matrix, 0, weight.rows)
        for matrix in range(first // weight.rows, -(-(first + count) // weight.rows))
    ]
    return torch.cat(parts)


def _signs(layer: MoELayer, name: str, piece: Piece, symmetry: LayerSymmetry, kind: UnitKind) -> Tensor:
    """The sign of each element of a piece, in its layout."""
    return layer.assemble(name, piece, _SignsOf(layer, symmetry, kind))


@dataclass(frozen=True)
class _SignsOf:
    """The signs that a symmetry gives the elements of a block, without a look at its values."""

    layer: MoELayer
    symmetry: LayerSymmetry
    kind: UnitKind

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        bank, base = split_role(role)
        shared = base.startswith("shared_")
        base = base.removeprefix("shared_")
        if shared:
            units = self.symmetry.shared
        else:
            assert expert is not None
            units = self.symmetry.banks[bank].units(expert)
        width = self.layer.width(role)
        sign = torch.ones_like(units.scale) if base == "gate" else units.scale ** (self.kind.power if base == "down" else 1)
        return sign[:, None].expand(len(sign), width)


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(order.shape[-1]).expand_as(order))


@dataclass(frozen=True)
class CarriedLayer:
    """A block in the coordinates of what its storage formats carry of a symmetry, once that is there."""

    layer: MoELayer
    symmetry: LayerSymmetry | Future[LayerSymmetry]
    storage: Storage
    stored_in: Checkpoint

    @cached_property
    def acted(self) -> ActedLayer:
        whole = self.symmetry.result() if isinstance(self.symmetry, Future) else self.symmetry
        return ActedLayer(self.layer, carried(self.layer, whole, self.storage, self.stored_in), self.layer.units)

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        return self.acted.stored(role, expert)


def carried_layers(model: MoEModel, elements: Elements, storage: Storage) -> dict[int, LayerSource]:
    """The MoE layers of a quantized model in the coordinates of what their formats carry of group elements."""
    stored = model.checkpoint.stored
    return {
        index: CarriedLayer(layer, elements[index], storage, stored) if index in elements else layer
        for index, layer in model.layers.items()
    }


def carried(layer: MoELayer, element: LayerSymmetry, storage: Storage, stored: Checkpoint) -> LayerSymmetry:
    """What of an element moves bytes alone: the order of experts always.

    Hidden units of experts whose matrices are quantized stay in their places. Signs are kept where nothing else happens to
    the units of an expert, and every code has a negative.
    """
    banks = {name: _carried_bank(layer, name, bank, storage, stored) for name, bank in element.banks.items()}
    shared = element.shared
    weights = _weights(layer, "", None, storage, shared=True)
    if weights and not _is_carried(shared, weights, stored):
        shared = UnitSymmetry.identity(len(shared.order))
    return LayerSymmetry(banks, shared)


def _carried_bank(layer: MoELayer, name: str, bank: BankSymmetry, storage: Storage, stored: Checkpoint) -> BankSymmetry:
    experts, units = bank.unit_order.shape
    if not units or not _weights(layer, name, 0, storage):
        return bank
    order, scale = torch.arange(units).repeat(experts, 1), torch.ones(experts, units)
    for expert, place in enumerate(bank.expert_order.tolist()):
        element = bank.units(expert)
        if _is_carried(element, _weights(layer, name, place, storage), stored):
            order[expert], scale[expert] = element.order, element.scale
    return replace(bank, unit_order=order, unit_scale=scale)


def _weights(
    layer: MoELayer, bank: str, expert: int | None, storage: Storage, *, shared: bool = False
) -> list[tuple[str, StoredWeight, Piece]]:
    """The quantized ones among the matrices of an expert: role, weight, and the range of it."""
    roles = [f"shared_{role}" if shared else qualified(bank, role) for role in MATRICES]
    found = [(role, *layer.piece_of(role, expert)) for role in roles if role in layer.roles]
    return [(role, storage.weights[name], piece) for role, name, piece in found if name in storage.weights]


def _is_carried(element: UnitSymmetry, weights: list[tuple[str, StoredWeight, Piece]], stored: Checkpoint) -> bool:
    if not _is_identity(element.order) or bool((element.scale.abs() != 1).any()):
        return False
    if bool((element.scale == 1).all()):
        return True
    return all(
        weight.format.negatable(_codes(stored, weight, piece)) for role, weight, piece in weights if not role.endswith("gate")
    )


def check_movable(model: MoEModel, storage: Storage) -> None:
    """Raises FamilyError where experts of a quantized model cannot change places byte for byte."""
    if problems := unmovable(model, storage):
        raise FamilyError(
            f"{model.checkpoint.name}: experts cannot change places in {storage.kind}:\n{listing(problems)}\n"
            "Write the output in bfloat16: --format bf16"
        )


def unmovable(model: MoEModel, storage: Storage) -> list[str]:
    """Why experts of a quantized model cannot change places byte for byte, weight by weight; empty: they can."""
    problems = []
    for layer in model.layers.values():
        problems += _uneven(layer, storage)
        for name in layer.claims:
            weight = storage.weights.get(name)
            if weight is None:
                continue
            bases = {split_role(role)[1].removeprefix("shared_") for role in layer.claims[name].roles}
            if not bases <= set(MATRICES):
                problems.append(f"{name}: a quantized {', '.join(sorted(bases))}: moving its rows would need new scales")
                continue
            if not all(is_apart(weight, _range(piece)) for piece in layer.pieces(name)):
                problems.append(f"{name}: two experts share a scale, so that neither can move without new scales")
    return problems


def _uneven(layer: MoELayer, storage: Storage) -> list[str]:
    """Experts that are stored in another way than the first one."""
    first: dict[str, str] = {}
    problems = []
    for name, claim in layer.claims.items():
        if claim.expert is None:
            continue
        like = first.setdefault(claim.roles[0], name)
        weight, other = storage.weights.get(name), storage.weights.get(like)
        if (weight and weight.layout) != (other and other.layout):
            kinds = [one.format.kind if one else "plain numbers" for one in (weight, other)]
            how = f"{kinds[0]}, but {like} in {kinds[1]}" if kinds[0] != kinds[1] else f"other parts than {like}"
            problems.append(f"{name} is stored in {how}: they cannot change places")
    return problems


def moved_units(elements: Mapping[int, LayerSymmetry], written: Mapping[int, LayerSymmetry]) -> int:
    """How many hidden units of routed experts `elements` move, flip or scale and `written` leaves as they are."""
    count = 0
    for index, element in elements.items():
        for name, bank in element.banks.items():
            other = written[index].banks[name]
            differs = (bank.unit_order != other.unit_order) | (bank.unit_scale != other.unit_scale)
            count += int(differs.sum())
    return count
