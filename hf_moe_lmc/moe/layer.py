"""One MoE block of a checkpoint: its experts, and the group that acts on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hf_moe_lmc.moe.experts import Bank, SharedExpert
from hf_moe_lmc.moe.notation import UnitKind, bank_size, split_role
from hf_moe_lmc.moe.view import BlockView
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry


@dataclass(frozen=True)
class MoELayer(BlockView):
    """One MoE block of a checkpoint, with its banks of experts and its shared expert."""

    @cached_property
    def banks(self) -> dict[str, Bank]:
        """The banks of experts by name, the first one first; those without experts are left out."""
        names = dict.fromkeys([FIRST, *(split_role(role)[0] for role in self.roles)])
        return {name: Bank(self, name) for name in names if bank_size(self.sizes, name, "expert")}

    @cached_property
    def shared(self) -> SharedExpert:
        return SharedExpert(self)

    @cached_property
    def expert_numel(self) -> int:
        """Elements of the largest routed expert."""
        return max(bank.expert_numel for bank in self.banks.values())

    def identity(self) -> LayerSymmetry:
        """The identity of this block's group."""
        banks = {name: BankSymmetry.identity(bank.experts, bank.unit_count) for name, bank in self.banks.items()}
        return LayerSymmetry(banks, UnitSymmetry.identity(self.shared.unit_count))

    def random(self, generator: torch.Generator, *, groups: int = 1, scale: float = 1.0) -> LayerSymmetry:
        """A random element of this block's group; `scale`: see LayerSymmetry.random.

        For each bank two elements are drawn, one for the kind of its units and one for that of the shared expert's. So a
        seed gives what it gave in every release.
        """
        identity = self.identity()
        banks, shared = {}, identity.shared
        for name, bank in self.banks.items():

            def drawn(kind: UnitKind, bank: Bank = bank) -> LayerSymmetry:
                return LayerSymmetry.random(
                    bank.experts,
                    bank.unit_count,
                    self.shared.unit_count if bank.name == FIRST else 0,
                    groups=groups if bank.name == FIRST else 1,
                    signs=kind.sign,
                    scale=scale if kind.scale else 1.0,
                    generator=generator,
                )

            routed, other = drawn(bank.kind).banks[FIRST], drawn(self.shared.kind).shared
            banks[name] = routed if bank.kind.permutation else replace(routed, unit_order=identity.banks[name].unit_order)
            if name == FIRST:
                shared = other if self.shared.kind.permutation else replace(other, order=identity.shared.order)
        return LayerSymmetry(banks, shared)

    def problems(self, symmetry: LayerSymmetry) -> list[str]:
        """What in a valid symmetry of these sizes the hidden units of this block do not allow."""
        problems = [problem for name, bank in self.banks.items() for problem in bank.problems(symmetry.banks[name])]
        return problems + self.shared.problems(symmetry.shared)
