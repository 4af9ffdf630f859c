"""Group elements of the hidden units of one expert, and of a bank of experts: what those of layers are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.errors import SymmetryError
from hf_moe_lmc.symmetry.storage import BANK_FIELDS


@dataclass(frozen=True, eq=False)
class UnitSymmetry:
    """A group element of the hidden units of one expert: the shared one of a layer.

    Attributes:
        order: int64 [unit], a permutation; empty where there is no shared expert.
        scale: float32 [unit], finite and not zero; -1 is a flipped sign.

    Example:
        >>> g = UnitSymmetry(torch.tensor([1, 0]), torch.tensor([-1.0, 2.0]))
        >>> (g.inverse() @ g) == UnitSymmetry.identity(2)
        True
    """

    order: Tensor
    scale: Tensor

    @classmethod
    def identity(cls, units: int) -> UnitSymmetry:
        return cls(torch.arange(units), torch.ones(units))

    @classmethod
    def random(cls, units: int, *, signs: bool = True, scale: float = 1.0, generator: torch.Generator) -> UnitSymmetry:
        """A random element: a permutation, `signs` unless turned off, magnitudes between 1/`scale` and `scale`."""
        return cls(_random_permutations(1, units, generator)[0], _random_scales((units,), signs, scale, generator))

    @property
    def is_lossless(self) -> bool:
        """Whether it changes no magnitude."""
        return bool((self.scale.abs() == 1).all())

    def inverse(self) -> UnitSymmetry:
        order = self.order.argsort()
        return UnitSymmetry(order, 1 / self.scale[order])

    def __matmul__(self, first: UnitSymmetry) -> UnitSymmetry:
        """`(g @ f)` acts as f, then as g."""
        if len(self.order) != len(first.order):
            raise SymmetryError(f"cannot compose symmetries of {len(self.order)} and of {len(first.order)} hidden units")
        return UnitSymmetry(first.order[self.order], first.scale[self.order] * self.scale)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UnitSymmetry) and torch.equal(self.order, other.order) and torch.equal(self.scale, other.scale)

    def isclose(self, other: UnitSymmetry, tolerance: float = 1e-5) -> bool:
        """Equal permutations and signs, scales equal to a relative `tolerance`."""
        return torch.equal(self.order, other.order) and torch.allclose(self.scale, other.scale, rtol=tolerance, atol=0)

    def validate(self, where: str) -> None:
        """Raises SymmetryError, naming `where`, unless this is an element of the group."""
        if self.order.ndim != 1 or self.scale.shape != self.order.shape:
            raise SymmetryError(f"{where}: order and scale of the hidden units differ in length")
        _check_permutation(where, "order", self.order)
        _check_scale(where, "scale", self.scale)


@dataclass(frozen=True, eq=False)
class BankSymmetry:
    """A group element of one bank of experts.

    Attributes:
        expert_order: int64 [expert], a permutation.
        unit_order: int64 [expert, unit], a permutation in each row.
        unit_scale: float32 [expert, unit], finite and not zero; -1 is a flipped sign.
    """

    expert_order: Tensor
    unit_order: Tensor
    unit_scale: Tensor

    @classmethod
    def identity(cls, experts: int, units: int) -> BankSymmetry:
        return cls(torch.arange(experts), torch.arange(units).repeat(experts, 1), torch.ones(experts, units))

    @classmethod
    def random(
        cls,
        experts: int,
        units: int,
        *,
        groups: int = 1,
        signs: bool = True,
        scale: float = 1.0,
        generator: torch.Generator,
    ) -> BankSymmetry:
        """A random element: permutations, `signs` unless turned off, magnitudes between 1/`scale` and `scale`.

        Args:
            groups: groups of experts that bind; experts move within and with them.
        """
        members = experts // groups
        within = _random_permutations(groups, members, generator)
        return cls(
            expert_order=(_random_permutations(1, groups, generator)[0][:, None] * members + within).flatten(),
            unit_order=_random_permutations(experts, units, generator),
            unit_scale=_random_scales((experts, units), signs, scale, generator),
        )

    def units(self, expert: int) -> UnitSymmetry:
        """The element of the hidden units of one (new) expert."""
        return UnitSymmetry(self.unit_order[expert], self.unit_scale[expert])

    @property
    def is_lossless(self) -> bool:
        """Whether it changes no magnitude."""
        return bool((self.unit_scale.abs() == 1).all())

    def inverse(self) -> BankSymmetry:
        expert = self.expert_order.argsort()
        unit = self.unit_order.argsort(dim=1)
        return BankSymmetry(expert, unit[expert], (1 / self.unit_scale.gather(1, unit))[expert])

    def __matmul__(self, first: BankSymmetry) -> BankSymmetry:
        """`(g @ f)` acts as f, then as g."""
        if self.unit_order.shape != first.unit_order.shape:
            sizes = " and ".join(str(list(element.unit_order.shape)) for element in (self, first))
            raise SymmetryError(f"cannot compose symmetries of [expert, unit] {sizes}")
        moved_scale = first.unit_scale[self.expert_order].gather(1, self.unit_order)
        return BankSymmetry(
            expert_order=first.expert_order[self.expert_order],
            unit_order=first.unit_order[self.expert_order].gather(1, self.unit_order),
            unit_scale=moved_scale * self.unit_scale,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BankSymmetry) and all(
            torch.equal(getattr(self, name), getattr(other, name)) for name in BANK_FIELDS
        )

    def isclose(self, other: BankSymmetry, tolerance: float = 1e-5) -> bool:
        """Equal permutations and signs, scales equal to a relative `tolerance`."""
        return (
            torch.equal(self.expert_order, other.expert_order)
            and torch.equal(self.unit_order, other.unit_order)
            and torch.allclose(self.unit_scale, other.unit_scale, rtol=tolerance, atol=0)
        )

    def validate(self, where: str, groups: int = 1) -> None:
        """Raises SymmetryError, naming `where`, unless this is an element of the group."""
        if self.unit_order.ndim != 2:
            raise SymmetryError(f"{where}: unit_order must be [expert, unit]")
        experts, units = self.unit_order.shape
        if self.unit_scale.shape != (experts, units) or self.expert_order.shape != (experts,):
            raise SymmetryError(f"{where}: orders and scales disagree about {experts} experts of {units} units")
        _check_permutation(where, "expert_order", self.expert_order)
        _check_permutation(where, "unit_order", self.unit_order)
        _check_scale(where, "unit_scale", self.unit_scale)
        if groups > 1:
            if experts % groups:
                raise SymmetryError(f"{where}: {experts} experts do not divide into {groups} groups")
            group = (self.expert_order // (experts // groups)).view(groups, -1)
            if not bool((group == group[:, :1]).all()):
                raise SymmetryError(f"{where}: expert_order tears the {groups} expert groups apart")


def _random_permutations(count: int, size: int, generator: torch.Generator) -> Tensor:
    """int64 [count, size], a permutation in each row."""
    return torch.rand(count, size, generator=generator).argsort(dim=1)


def _random_scales(shape: tuple[int, ...], signs: bool, scale: float, generator: torch.Generator) -> Tensor:
    """Signs, unless turned off, times magnitudes that are log-uniform between 1/`scale` and `scale`."""
    sign = torch.randint(2, shape, generator=generator) * 2.0 - 1.0 if signs else torch.ones(shape)
    return sign * scale ** (torch.rand(shape, generator=generator) * 2 - 1)


def _check_permutation(where: str, name: str, order: Tensor) -> None:
    if not torch.equal(order.sort(dim=-1).values, torch.arange(order.shape[-1]).expand_as(order)):
        raise SymmetryError(f"{where}: {name} is not a permutation")


def _check_scale(where: str, name: str, scale: Tensor) -> None:
    if not bool((scale.isfinite() & (scale != 0)).all()):
        raise SymmetryError(f"{where}: {name} has entries that are zero or not finite")
