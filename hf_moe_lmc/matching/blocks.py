"""Weight matching of two MoE blocks: the paper's Algorithm 1, over the whole symmetry of gated experts.

Two stages, each a linear assignment problem and without data:

1. the order of the experts, from the router rows (`gate`, Eq. 10) or from Gram matrices that no symmetry of the hidden
   units changes (`expert`, Eq. 11 generalised to gate, up and down);
2. for each matched pair of experts, the order of the hidden units (Git Re-Basin's weight matching), and with `scaled`
   units the sign and scale of the linear branch as well.

The two stages are not the joint optimum over both; nothing here claims that they are. Further banks of experts are
matched in the same way, each for itself. Where a table names the expert of each token, it decides the order.

Experts of more than SMALL units are first surveyed along the gate order: each is read once, its units are matched from sketches
where that comes with a proof (`certificate`), and what the Gram order needs is estimated from the same sketches. Only what is
left without a proof is matched by its full similarity. `exact` does without sketches.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.matching.assignment import assign_groups
from hf_moe_lmc.matching.certificate import (
    COLUMNS,
    WIDER,
    Sketched,
    certified_order,
)
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.matching.order import (
    expert_cost,
    gate_cost,
    margin,
    sketched_expert_cost,
)
from hf_moe_lmc.matching.units import SMALL, UnitMatch, UnitRows, match_units
from hf_moe_lmc.moe.layer import Bank, MoELayer
from hf_moe_lmc.moe.notation import EXPERT_VECTORS
from hf_moe_lmc.symmetry.group import LayerSymmetry

MARGIN = 0.5  # of a sketched squared Gram cost to those beside it: below, sketched and exact costs give the same order

DECIDED = {  # how the order was chosen
    "table": "by the table of token experts",
    "asked": "one order was asked for, and computed in full",
    "distance": "the units were matched for both orders; the lower distance decided",
    "both": "both orders are the same",
    "margin": "both orders are the same, or one was asked for: its sketched Gram costs are less than half of all others",
    "sketch": "the experts are unrelated: the order of the sketched Gram costs, unproved; units were matched for it alone",
}


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
        way: how the units of each expert of A were matched, one of `certificate.WAYS`.
        shared_way: that of the shared expert, or None.
        order_decided: one of DECIDED.
        order_margin: largest ratio of a kept pair's sketched squared Gram cost to the others in its row and its column; None
            where it was not sketched.
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
    way: list[str] = field(default_factory=list)
    shared_way: str | None = None
    order_decided: str = "asked"
    order_margin: float | None = None
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
    exact: bool
    matches: dict[tuple[int, int], UnitMatch] = field(default_factory=dict)
    unproved: set[tuple[int, int]] = field(default_factory=set)  # pairs for which sketches have been tried in vain
    before: dict[int, float] = field(default_factory=dict)  # squared distances of the experts as they are

    @property
    def wide(self) -> bool:
        return not self.exact and self.a.kind.order and self.a.unit_count > SMALL

    def match(self, i: int, j: int) -> UnitMatch:
        if not self.proved(i, j):
            of_a, of_b = _finite_rows(self.a, i, self.device), _finite_rows(self.b, j, self.device)
            self.matches[i, j] = match_units(of_a, of_b, self.units)
        return self.matches[i, j]

    def proved(self, i: int, j: int) -> bool:
        """Whether the pair has been matched; tries sketches if those have not been."""
        if self.wide and (i, j) not in self.matches and (i, j) not in self.unproved:
            of_a, of_b = _finite_rows(self.a, i, self.device), _finite_rows(self.b, j, self.device)
            self.try_sketches(i, j, Sketched(of_a, self.units), Sketched(of_b, self.units))
        return (i, j) in self.matches

    def try_sketches(self, i: int, j: int, of_a: Sketched, of_b: Sketched) -> None:
        found = _from_sketches(of_a, of_b)
        if found is None:
            self.unproved.add((i, j))
        else:
            self.matches[i, j] = found

    def squared_before(self, i: int) -> float:
        if i not in self.before:
            if (i, i) in self.matches:
                return self.matches[i, i].squared_before
            of_a, of_b = _finite_rows(self.a, i, self.device), _finite_rows(self.b, i, self.device)
            self.before[i] = of_a.squared_distance(of_b)
        return self.before[i]

    def survey(self, order: Tensor) -> _Grams:
        """Tries sketches on the pairs of an order, and sums up what an order by Gram matrices needs.

        Goes along the cycles of the order, so that A's expert i meets B's order[i] and i while each is in memory: all are read
        once, and the first of a cycle again.
        """
        grams = _Grams()
        seen: set[int] = set()
        for start in range(self.a.experts):
            if start in seen:
                continue
            i, of_a = start, self._sketched(self.a, start)
            while i not in seen:
                seen.add(i)
                j = int(order[i])
                of_b = self._sketched(self.b, j)
                self.try_sketches(i, j, of_a, of_b)
                grams.add(grams.of_a, i, of_a)
                grams.add(grams.of_b, j, of_b)
                if i != j:
                    del of_a  # not more than two at a time
                    of_a = (
                        self._sketched(self.a, j) if j != start else Sketched(_finite_rows(self.a, j, self.device), self.units)
                    )
                    self.before[j] = of_a.rows.squared_distance(of_b.rows)
                elif (i, i) not in self.matches:
                    self.before[i] = of_a.rows.squared_distance(of_b.rows)
                del of_b
                i = j
        return grams

    def _sketched(self, bank: Bank, expert: int) -> Sketched:
        found = Sketched(UnitRows.of(bank, expert, self.device), self.units)
        found.draw(COLUMNS)
        _check_rows(found.rows, bank, expert)
        return found


@dataclass
class _Grams:
    """Sketched Gram matrices of experts, by number of columns and expert."""

    of_a: dict[int, dict[int, Tensor]] = field(default_factory=lambda: {COLUMNS: {}, WIDER: {}})
    of_b: dict[int, dict[int, Tensor]] = field(default_factory=lambda: {COLUMNS: {}, WIDER: {}})

    def add(self, of: dict[int, dict[int, Tensor]], expert: int, sketched: Sketched) -> None:
        for columns in of:
            if ("up", columns) in sketched.sketches:
                of[columns][expert] = sketched.grams(columns)

    def cost(self) -> tuple[Tensor, int]:
        """Estimates of the squared Gram costs, float64 [expert, expert], from so many columns."""
        wider = len(self.of_a[WIDER]) == len(self.of_a[COLUMNS]) and len(self.of_b[WIDER]) == len(self.of_b[COLUMNS])
        columns = WIDER if wider else COLUMNS
        of_a, of_b = ([of[columns][i] for i in range(len(of[columns]))] for of in (self.of_a, self.of_b))
        return sketched_expert_cost(of_a, of_b), columns


@dataclass
class _Orders:
    """The orders to choose from, and how."""

    orders: dict[str, Tensor]
    decided: str
    form: str | None = None
    margin: float | None = None


def match_layer(
    a: MoELayer,
    b: MoELayer,
    method: WeightMatching,
    *,
    groups: int = 1,
    device: torch.device | None = None,
) -> Matching:
    """Algorithm 1 of the paper on one pair of blocks.

    Args:
        method: where both orders are asked for and agree, the units are matched once.
        groups: expert groups that bind; experts then move only within and with their groups.

    Memory: two experts as they are stored and, from sketches, 3 * WIDER float32 numbers for each of their units; otherwise
    one of them in float32 and one [unit, unit] matrix (float64 up to assignment.SPARSE units, then float32), and the workspace
    of `expert_cost`. A survey keeps three [WIDER, WIDER] float64 matrices of each expert besides.
    """
    device = device or torch.device("cpu")
    matchings = {
        name: _match_bank(bank, b.banks[name], method, 1 if name else groups, device) for name, bank in a.banks.items()
    }
    own = matchings.pop("")
    symmetry = replace(own.symmetry, others={name: matching.symmetry for name, matching in matchings.items()})
    return replace(own, symmetry=symmetry, others=matchings)


def _match_bank(a: Bank, b: Bank, method: WeightMatching, groups: int, device: torch.device) -> Matching:
    started = time.perf_counter()
    for bank in (a, b):
        _check_router(bank)
    whole = a.unit_count > 0  # else there is nothing but router rows
    pairs = _Pairs(a, b, method.units, device, method.exact)
    found = _wide_orders(pairs, groups, method.order) if whole and pairs.wide else _orders(pairs, groups, method.order)
    candidates = {
        name: sum(pairs.match(i, int(j)).squared_after for i, j in enumerate(chosen)) ** 0.5 if whole else 0.0
        for name, chosen in found.orders.items()
    }
    least = min(candidates, key=lambda name: candidates[name])
    chosen = found.orders[least]
    matches = [pairs.match(i, int(j)) for i, j in enumerate(chosen)] if whole else []
    shared = _match_shared(a, b, method, device)
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
        order_method=least,
        candidates=candidates,
        expert_cost_form=found.form,
        norm=sum(match.squared_norm for match in matches) ** 0.5,
        distance_before=sum(pairs.squared_before(i) for i in range(a.experts)) ** 0.5 if whole else 0.0,
        distance_after_order=sum(match.squared_before for match in matches) ** 0.5,
        distance_after_units=candidates[least],
        router_distance_before=float((router - other_router).norm()),
        router_distance_after=float((router - other_router[chosen]).norm()),
        shared_distance_before=shared.squared_before**0.5,
        shared_distance_after=shared.squared_after**0.5,
        scales_kept=sum(match.scaled for match in matches) + int(shared.scaled),
        seconds=time.perf_counter() - started,
        way=[match.way for match in matches],
        shared_way=shared.way if a.shared_count else None,
        order_decided=found.decided,
        order_margin=found.margin,
    )


def _orders(pairs: _Pairs, groups: int, order: OrderMethod) -> _Orders:
    """The orders asked for, from their costs in full."""
    a, b = pairs.a, pairs.b
    whole = a.unit_count > 0
    table = _table_cost(a, b) if "expert_table" in a.roles else None
    if table is not None:
        return _Orders({"table": assign_groups(table, groups)}, "table")
    orders, form = {}, None
    if order in ("gate", "best") or not whole:
        orders["gate"] = assign_groups(gate_cost(a, b), groups)
    if whole and order in ("expert", "best"):
        cost = expert_cost(a, b, pairs.units, pairs.device)
        _check_finite(cost.values, a, b)
        form = cost.form if cost.columns is None else f"{cost.form} of {cost.columns} columns"
        orders["expert"] = assign_groups(cost.values, groups)
    same = len(orders) > 1 and torch.equal(orders["gate"], orders["expert"])
    return _Orders(orders, "both" if same else "distance" if len(orders) > 1 else "asked", form)


def _wide_orders(pairs: _Pairs, groups: int, order: OrderMethod) -> _Orders:
    """The order or orders to keep one of, from sketches of the experts where these decide."""
    a, b = pairs.a, pairs.b
    table = _table_cost(a, b) if "expert_table" in a.roles else None
    gate = assign_groups(gate_cost(a, b) if table is None else table, groups)
    grams = pairs.survey(gate)
    if table is not None or order == "gate":
        return _Orders({"gate" if table is None else "table": gate}, "asked" if table is None else "table")
    cost, columns = grams.cost()
    chosen = assign_groups(cost.sqrt(), groups)
    form, ratio = f"sketch of {columns} columns from both sides", margin(cost, chosen)
    same = torch.equal(gate, chosen)
    if order == "expert":
        return _Orders({"expert": chosen}, "margin", form, ratio) if ratio < MARGIN else _orders(pairs, groups, order)
    if same:
        return _Orders({"gate": gate, "expert": chosen}, "margin" if ratio < MARGIN else "both", form, ratio)
    if all(pairs.proved(i, int(j)) for one in (gate, chosen) for i, j in enumerate(one)):
        return _Orders({"gate": gate, "expert": chosen}, "distance", form, ratio)
    return _Orders({"expert": chosen}, "sketch", form, ratio)


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
    """What to say of weights that cannot be matched: the tensor as well, which `what` is a part of."""
    checkpoint = bank.layer.checkpoint
    found = next(((name, at) for name in bank.layer.claims if (at := checkpoint.first_not_finite(name))), None)
    where = f"; in {checkpoint.tensors[found[0]].shard}, tensor {found[0]}, the first at {found[1]}" if found else ""
    return CheckpointError(
        f"{bank.full_name}: {what} holds NaN or infinite weights{where}. Repair the checkpoint: such weights cannot be matched"
    )


def _match_shared(a: Bank, b: Bank, method: WeightMatching, device: torch.device) -> UnitMatch:
    if not a.shared_count:
        return UnitMatch(torch.arange(0), torch.ones(0), False, 0.0, 0.0, 0.0)
    of_a, of_b = _finite_rows(a, None, device), _finite_rows(b, None, device)
    found = None
    if not method.exact and of_a.kind.order and of_a.count > SMALL:
        found = _from_sketches(Sketched(of_a, method.units), Sketched(of_b, method.units))
    return found or match_units(of_a, of_b, method.units)


def _from_sketches(of_a: Sketched, of_b: Sketched) -> UnitMatch | None:
    found = certified_order(of_a, of_b)
    if found is None:
        return None
    pairs, way = found
    as_they_are = torch.equal(pairs.order, torch.arange(len(pairs.order))) and bool((pairs.sign == 1).all())
    if as_they_are:
        before = float((pairs.gate + pairs.up + pairs.down).sum()) + of_a.rows.bias_distance(of_b.rows)
    else:
        before = of_a.rows.squared_distance(of_b.rows)
    return pairs.match(way, before)


def _finite_rows(bank: Bank, expert: int | None, device: torch.device) -> UnitRows:
    """One routed expert, or with None the shared one; raises CheckpointError where it is not finite."""
    rows = UnitRows.of(bank, expert, device)
    _check_rows(rows, bank, expert)
    return rows


def _check_rows(rows: UnitRows, bank: Bank, expert: int | None) -> None:
    if not math.isfinite(rows.squared_norm):
        raise _not_finite(bank, "the shared expert" if expert is None else f"expert {expert}")
