"""Weight matching of two MoE blocks: the paper's Algorithm 1, over the whole symmetry of gated experts.

Two stages, each a linear assignment problem and without data:

1. the order of the experts, from the router rows (`gate`, Eq. 10) or from Gram matrices that no symmetry of the hidden
   units changes (`expert`, Eq. 11 generalised to gate, up and down);
2. for each matched pair of experts, the order of the hidden units (Git Re-Basin's weight matching), and with `scaled`
   units the sign and scale of the linear branch as well.

The two stages are not the joint optimum over both; nothing here claims that they are. Further banks of experts are
matched in the same way, each for itself. Where a table names the expert of each token, it decides the order.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_moe_lmc.assignment import assign_groups
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.family import EXPERT_VECTORS
from hf_moe_lmc.layer import Bank, MoELayer
from hf_moe_lmc.order import expert_cost, gate_cost
from hf_moe_lmc.symmetry import LayerSymmetry
from hf_moe_lmc.units import UnitMatch, UnitMethod, UnitRows, match_units

OrderMethod = Literal["gate", "expert", "best"]


def check_methods(order: str, units: str) -> None:
    """Raises InputError for an unknown `order` or `units`."""
    for what, value, known in (("order", order, get_args(OrderMethod)), ("units", units, get_args(UnitMethod))):
        if value not in known:
            raise InputError(f"{what} {value!r}: expected one of {', '.join(known)}")


@dataclass(frozen=True)
class Matching:
    """The group element that takes one block of B close to A's, and how close.

    Distances are Frobenius norms of differences, of the routed experts' weights unless named otherwise.

    Attributes:
        order_method: the order that was kept, `gate` or `expert`; `table` where a table of token experts decided it.
        candidates: distance after the units for each order that was tried.
        expert_cost_form: form and, for a sketch, number of columns of the `expert` cost; None if not computed.
        norm: Frobenius norm of A's routed experts.
        scales_kept: number of experts (the shared one included) whose scales paid.
        others: the matchings of further banks of experts; the figures above are the first bank's.
    """

    symmetry: LayerSymmetry
    order_method: str
    candidates: dict[str, float]
    expert_cost_form: str | None
    norm: float
    distance_before: float
    distance_after_order: float
    distance_after_units: float
    router_distance_before: float
    router_distance_after: float
    shared_distance_before: float
    shared_distance_after: float
    scales_kept: int
    seconds: float
    others: dict[str, Matching] = field(default_factory=dict)

    @property
    def is_trivial(self) -> bool:
        """Whether the blocks were equal to begin with."""
        own = self.distance_before == self.router_distance_before == self.shared_distance_before == 0
        return own and all(other.is_trivial for other in self.others.values())


@dataclass
class _Pairs:
    """Matched pairs of experts, each computed once."""

    a: Bank
    b: Bank
    units: UnitMethod
    device: torch.device
    matches: dict[tuple[int, int], UnitMatch] = field(default_factory=dict)

    def match(self, i: int, j: int) -> UnitMatch:
        if (i, j) not in self.matches:
            of_a, of_b = _finite_rows(self.a, i, self.device), _finite_rows(self.b, j, self.device)
            self.matches[i, j] = match_units(of_a, of_b, self.units)
        return self.matches[i, j]

    def squared_before(self, i: int, j: int) -> float:
        if (i, j) in self.matches:
            return self.matches[i, j].squared_before
        return _finite_rows(self.a, i, self.device).squared_distance(_finite_rows(self.b, j, self.device))


def match_layer(
    a: MoELayer,
    b: MoELayer,
    *,
    groups: int = 1,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    device: torch.device | None = None,
) -> Matching:
    """Algorithm 1 of the paper on one pair of blocks.

    Args:
        groups: expert groups that bind; experts then move only within and with their groups.
        order: `gate`, `expert`, or `best`: whichever leaves the lower distance of the expert weights once the units are
            matched (if both agree, the units are matched once).
        units: `plain` or `scaled`.

    Memory: two experts in float32, one float64 [unit, unit] matrix, and the workspace of `expert_cost`.
    """
    device = device or torch.device("cpu")
    matchings = {
        name: _match_bank(bank, b.banks[name], 1 if name else groups, order, units, device) for name, bank in a.banks.items()
    }
    own = matchings.pop("")
    symmetry = replace(own.symmetry, others={name: matching.symmetry for name, matching in matchings.items()})
    return replace(own, symmetry=symmetry, others=matchings)


def _match_bank(a: Bank, b: Bank, groups: int, order: OrderMethod, units: UnitMethod, device: torch.device) -> Matching:
    started = time.perf_counter()
    for bank in (a, b):
        _check_router(bank)
    whole = a.unit_count > 0  # else there is nothing but router rows
    form = None
    orders: dict[str, Tensor] = {}
    table = _table_cost(a, b) if "expert_table" in a.roles else None
    if table is not None:
        orders["table"] = assign_groups(table, groups)
    elif order in ("gate", "best") or not whole:
        orders["gate"] = assign_groups(gate_cost(a, b), groups)
    if whole and table is None and order in ("expert", "best"):
        cost = expert_cost(a, b, units, device)
        _check_finite(cost.values, a, b)
        form = cost.form if cost.columns is None else f"{cost.form} of {cost.columns} columns"
        orders["expert"] = assign_groups(cost.values, groups)
    pairs = _Pairs(a, b, units, device)
    candidates = {
        method: sum(pairs.match(i, int(j)).squared_after for i, j in enumerate(chosen)) ** 0.5 if whole else 0.0
        for method, chosen in orders.items()
    }
    method = min(candidates, key=lambda name: candidates[name])
    chosen = orders[method]
    matches = [pairs.match(i, int(j)) for i, j in enumerate(chosen)] if whole else []
    shared = _match_shared(a, b, units, device)
    still = LayerSymmetry.identity(a.experts, a.unit_count)
    router = a.read("router").double()
    other_router = b.read("router").double()
    return Matching(
        symmetry=LayerSymmetry(
            expert_order=chosen,
            unit_order=torch.stack([match.order for match in matches]) if whole else still.unit_order,
            unit_scale=torch.stack([match.scale for match in matches]) if whole else still.unit_scale,
            shared_order=shared.order,
            shared_scale=shared.scale,
        ),
        order_method=method,
        candidates=candidates,
        expert_cost_form=form,
        norm=sum(match.squared_norm for match in matches) ** 0.5,
        distance_before=sum(pairs.squared_before(i, i) for i in range(a.experts)) ** 0.5 if whole else 0.0,
        distance_after_order=sum(match.squared_before for match in matches) ** 0.5,
        distance_after_units=candidates[method],
        router_distance_before=float((router - other_router).norm()),
        router_distance_after=float((router - other_router[chosen]).norm()),
        shared_distance_before=shared.squared_before**0.5,
        shared_distance_after=shared.squared_after**0.5,
        scales_kept=sum(match.scaled for match in matches) + int(shared.scaled),
        seconds=time.perf_counter() - started,
    )


def _table_cost(a: Bank, b: Bank) -> Tensor | None:
    """Cost of the orders that make B's table of token experts A's; None if no order does.

    Experts that no token names are left to the router rows.
    """
    of_a, of_b = (bank.read("expert_table").flatten().long() for bank in (a, b))
    order = torch.full((a.experts,), -1)
    order[of_a] = of_b
    named = order >= 0
    if not torch.equal(order[of_a], of_b) or len(order[named].unique()) < int(named.sum()):
        return None
    cost = gate_cost(a, b)
    forced = torch.zeros_like(cost)
    forced[named, order[named]] = -2 * float(cost.max() + 1) * a.experts
    return cost + forced


def _check_router(bank: Bank) -> None:
    """Raises CheckpointError, naming the first row or vector that is not finite."""
    bad = (~bank.read("router").isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise _not_finite(bank, f"router row {int(bad[0])}")
    for role in bank.roles:
        if role in (*EXPERT_VECTORS, "shared_router") and not bool(bank.read(role).isfinite().all()):
            raise _not_finite(bank, role.replace("_", " "))


def _check_finite(cost: Tensor, a: Bank, b: Bank) -> None:
    """Raises CheckpointError, naming the expert of A or B that makes a cost [expert, expert] not finite."""
    bad = ~cost.isfinite()
    if bool(bad.any()):
        of_a = bad.all(dim=1)
        bank, number = (a, of_a) if bool(of_a.any()) else (b, bad.any(dim=0))
        raise _not_finite(bank, f"expert {int(number.nonzero()[0])}")


def _not_finite(bank: Bank, what: str) -> CheckpointError:
    return CheckpointError(f"{bank.full_name}: {what} holds NaN or infinite weights")


def _match_shared(a: Bank, b: Bank, units: UnitMethod, device: torch.device) -> UnitMatch:
    if not a.shared_count:
        return UnitMatch(torch.arange(0), torch.ones(0), False, 0.0, 0.0, 0.0)
    return match_units(_finite_rows(a, None, device), _finite_rows(b, None, device), units)


def _finite_rows(bank: Bank, expert: int | None, device: torch.device) -> UnitRows:
    """One routed expert, or with None the shared one; raises CheckpointError where it is not finite."""
    rows = UnitRows.of(bank, expert, device)
    if not math.isfinite(rows.squared_norm):
        raise _not_finite(bank, "the shared expert" if expert is None else f"expert {expert}")
    return rows
