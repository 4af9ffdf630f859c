"""The experts of one MoE block as values: its banks of routed experts, and its shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_moe_lmc.moe.notation import EXPERT_ROLES, SHARED, UnitKind, bank_size, split_role
from hf_moe_lmc.moe.view import BlockView
from hf_moe_lmc.symmetry.banks import FIRST, in_bank, qualified
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry

MATRICES = ("gate", "up", "down")


@dataclass(frozen=True)
class Bank:
    """The routed experts of one bank of a block, with the roles that are theirs.

    Attributes:
        name: FIRST, or that of a further bank.
    """

    layer: BlockView
    name: str = FIRST

    @property
    def full_name(self) -> str:
        return in_bank(f"{self.layer.checkpoint.name}: layer {self.layer.index}", self.name)

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Its roles, without the bank's name; those of the shared expert are not among them."""
        split = [split_role(role) for role in self.layer.roles]
        return tuple(dict.fromkeys(base for bank, base in split if bank == self.name and not base.startswith("shared_")))

    @property
    def router(self) -> str:
        """Kind of router."""
        return self.layer.router

    @property
    def kind(self) -> UnitKind:
        """What the hidden units allow."""
        return self.layer.units[self.name]

    @property
    def experts(self) -> int:
        return bank_size(self.layer.sizes, self.name, "expert")

    @property
    def unit_count(self) -> int:
        """Hidden units of each expert; 0 where they have none, or none that is whole."""
        return bank_size(self.layer.sizes, self.name, "unit") if {"up", "down"} <= set(self.roles) else 0

    @cached_property
    def width(self) -> int:
        """What the experts read: the residual width, or a latent one."""
        return self.layer.width(qualified(self.name, "up"))

    @property
    def expert_numel(self) -> int:
        """Elements of one expert."""
        matrices = [role for role in MATRICES if role in self.roles]
        return len(matrices) * self.unit_count * self.width if self.unit_count else 0

    def values(self, role: str, expert: int | None = None) -> Tensor:
        """The tensor of a role as BlockView.stored gives it."""
        return self.layer.stored(qualified(self.name, role), expert)

    def problems(self, element: BankSymmetry) -> list[str]:
        """What in a valid group element of these sizes the hidden units do not allow."""
        where = in_bank(f"layer {self.layer.index}", self.name) + ": hidden units"
        return list(_problems(where, self.kind, element.unit_order, element.unit_scale))


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert of a block, which every token goes through; without hidden units where there is none."""

    layer: BlockView

    @property
    def full_name(self) -> str:
        return f"{self.layer.checkpoint.name}: layer {self.layer.index}"

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Its roles, as those of a routed expert: gate, up, down and their biases."""
        names = [role.removeprefix("shared_") for role in self.layer.roles if role.startswith("shared_")]
        return tuple(name for name in names if name in EXPERT_ROLES)

    @property
    def kind(self) -> UnitKind:
        """What the hidden units allow."""
        return self.layer.units[SHARED]

    @property
    def unit_count(self) -> int:
        return self.layer.sizes.get("shared", 0) if "up" in self.roles else 0

    @property
    def expert_numel(self) -> int:
        """Elements of its matrices."""
        return sum(self.unit_count * self.layer.width(f"shared_{role}") for role in MATRICES if role in self.roles)

    def values(self, role: str, expert: int | None = None) -> Tensor:
        """The values of one of its roles. `expert` is None: there is one."""
        return self.layer.stored(f"shared_{role}", expert)

    def problems(self, element: UnitSymmetry) -> list[str]:
        """What in a valid group element of its size the hidden units do not allow."""
        where = f"layer {self.layer.index}: the shared expert's hidden units"
        return list(_problems(where, self.kind, element.order, element.scale))


def _problems(where: str, kind: UnitKind, order: Tensor, scale: Tensor) -> Iterator[str]:
    if not kind.permutation and not torch.equal(order, torch.arange(order.shape[-1]).expand_as(order)):
        yield f"{where} change places, but {kind.words}"
    if not kind.sign and bool((scale < 0).any()):
        yield f"{where} change sign; allowed: {kind.words}"
    if not kind.scale and bool((scale.abs() != 1).any()):
        yield f"{where} are scaled; allowed: {kind.words}"
