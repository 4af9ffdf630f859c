"""A small sample of the experts of two MoE layers, for where router rows do not tell their origin.

Of some experts a short range is read: all hidden units, each with a few of its weights, where the layout has these one after
the other; else a few units with all their weights. Units of one origin resemble each other one by one, in place or, as far as
all of them were read, in another order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from hf_moe_lmc.lineage.routers import EQUAL, LEAST_COSINE
from hf_moe_lmc.lineage.statistic import degrees_of_freedom, log10_chance, whitened
from hf_moe_lmc.moe.experts import MATRICES, Bank
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.symmetry.banks import FIRST

WEIGHTS, FEWEST = 64, 16  # of each unit, or units, that are read of an expert
RANGE = 1 << 20  # bytes that are read of an expert at most, unless the fewest take more
EXPERTS = 2  # of A in each layer that are looked at
CANDIDATES = 8  # of B, among which each of them is looked for
UNITS = 64  # of A that are looked for among all of B
CLEARLY = 0.02  # by which another place must be better than an expert's own

Related = Literal["related", "unrelated", "undecided"]


@dataclass(frozen=True)
class ExpertFinding:
    """What the sampled experts of one layer say.

    Attributes:
        partners: for each sampled expert of A that is related to one of B, the number of that: its own where it is as good.
        in_order: the hidden units of all these have the places that they have in A.
        apart: each of them is better than all others that were compared; copies of one expert are not.
        cosine: mean cosine of the units of these experts and of the best they were compared with.
        log10_chance: bound of the probability that unrelated ones do as well.
    """

    says: Related
    why: str = ""
    partners: Mapping[int, int] = field(default_factory=dict)
    in_order: bool = True
    apart: bool = True
    cosine: float | None = None
    log10_chance: float = 0.0


def are_sampled(a: MoELayer, b: MoELayer) -> bool:
    """Whether experts of both have hidden units, as many, of which the same weights can be read."""
    if FIRST not in a.banks or FIRST not in b.banks:
        return False
    banks = a.banks[FIRST], b.banks[FIRST]
    first, second = ((bank.unit_count, bank.width, _role(bank)) for bank in banks)
    return first == second and banks[0].unit_count > 0


def pairs_to_compare(order: Sequence[int], *, sure: bool) -> list[tuple[int, int]]:
    """Which expert of A is held against which of B.

    Args:
        order: the place in B of each expert of A that the routers suggest.
        sure: they leave no doubt of it.

    Example:
        >>> pairs_to_compare([2, 0, 1], sure=True)
        [(0, 2), (2, 1)]
    """
    chosen = sorted({0, len(order) - 1})[:EXPERTS]
    if sure:
        return [(i, order[i]) for i in chosen]
    likely = list(dict.fromkeys([*chosen, *(order[i] for i in chosen), *range(len(order))]))[:CANDIDATES]
    return [(i, j) for i in chosen for j in likely]


def read_units(layer: MoELayer, experts: Sequence[int]) -> dict[int, Tensor]:
    """A sample of the units of some experts, [unit, weight], by their numbers."""
    role = _role(layer.banks[FIRST])
    return {number: layer.leading(role, number, _entries(layer, role)) for number in experts}


def _entries(layer: MoELayer, role: str) -> int:
    """Entries along the slowest axis that are read."""
    bank = layer.banks[FIRST]
    other = bank.width if layer.slowest_axis(role) == "unit" else bank.unit_count
    return max(FEWEST, min(WEIGHTS, RANGE // (2 * other)))


def _role(bank: Bank) -> str:
    """The matrix of which a range holds some weights of all units, if there is one."""
    roles = [role for role in reversed(MATRICES) if role in bank.roles]
    return next((role for role in roles if bank.layer.slowest_axis(role) != "unit"), roles[-1])


def all_units(layer: MoELayer) -> bool:
    """Whether the sample has some weights of all units, so that their order does not matter."""
    return layer.slowest_axis(_role(layer.banks[FIRST])) != "unit" and layer.banks[FIRST].kind.permutation


def judge_experts(
    a: dict[int, Tensor], b: dict[int, Tensor], pairs: Sequence[tuple[int, int]], limit: float, *, any_order: bool
) -> ExpertFinding:
    """What the units of sampled experts say.

    Args:
        a, b: see `read_units`.
        limit: decimal logarithm of the probability below which nothing is taken for chance.
        any_order: units may have other places, see `all_units`.
    """
    white_a, white_b = ({number: whitened(rows) for number, rows in side.items()} for side in (a, b))
    if any(rows is None for side in (white_a, white_b) for rows in side.values()):
        return ExpertFinding("undecided", "the sampled experts have units that are all equal")
    limit -= math.log10(2 * len(pairs))
    found = {(i, j): _units(white_a[i], white_b[j], any_order) for i, j in pairs}  # type: ignore[arg-type]
    best = {i: max((pair for pair in pairs if pair[0] == i), key=lambda pair: found[pair].cosine) for i, _ in pairs}
    related = {i: found[pair].log10_chance <= limit and found[pair].cosine >= LEAST_COSINE for i, pair in best.items()}
    cosine = sum(found[pair].cosine for pair in best.values()) / len(best)
    chance = max(found[pair].log10_chance for pair in best.values())
    if all(related.values()):
        for i, pair in best.items():
            if (i, i) in found and found[i, i].cosine >= found[pair].cosine - CLEARLY:
                best[i] = i, i
        in_order = all(found[pair].in_order for pair in best.values())
        apart = all(found[pair].cosine < found[best[pair[0]]].cosine - CLEARLY for pair in pairs if pair not in best.values())
        return ExpertFinding("related", "", dict(best.values()), in_order, apart, cosine, chance)
    if any(related.values()):
        return ExpertFinding(
            "undecided", "some sampled experts are related, others are not", cosine=cosine, log10_chance=chance
        )
    if all(one.log10_equal <= limit for one in found.values()):
        return ExpertFinding("unrelated", cosine=cosine, log10_chance=chance)
    why = "the experts are too small to be told from chance"
    return ExpertFinding("undecided", why, cosine=cosine, log10_chance=chance)


@dataclass(frozen=True)
class _Units:
    """The units of two experts.

    Attributes:
        cosine: the mean of matched ones; log10_chance: that of it among unrelated ones.
        log10_equal: what that would be of units that are nearly equal.
        in_order: they are matched in place.
    """

    cosine: float
    log10_chance: float
    log10_equal: float
    in_order: bool


def _units(a: Tensor, b: Tensor, any_order: bool) -> _Units:
    count, width = a.shape
    some = a[:UNITS]
    cosines = some @ b.T
    square = cosines.double().square()
    spread = float(square.sum() - square.diagonal().sum()) / max(len(some) * (count - 1), 1)
    freedom = degrees_of_freedom(count, width, spread)
    in_place = float((a * b).sum(dim=1).mean())
    here = _Units(in_place, log10_chance(in_place, freedom), log10_chance(EQUAL, freedom), True)
    if not any_order:
        return here
    best = cosines.abs().amax(dim=1)
    orders = len(some) * math.log(2 * count)  # of either sign
    without = float((square.sum() - best.double().square().sum()) / max(len(some) * (count - 1), 1))
    freedom = degrees_of_freedom(len(some), width, without)
    anywhere = float(best.mean())
    other = _Units(anywhere, log10_chance(anywhere, freedom, orders), log10_chance(EQUAL, freedom, orders), False)
    if in_place >= LEAST_COSINE or here.log10_chance <= other.log10_chance:
        return replace(here, log10_equal=other.log10_equal)
    return other
