"""Stage 1 of Algorithm 1: the candidate permutations of the experts of a bank, and what is to decide between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.matching.assignment import assign_groups
from hf_moe_lmc.matching.expert_costs import expert_cost, gate_cost, margin
from hf_moe_lmc.matching.finite import check_cost
from hf_moe_lmc.matching.options import OrderMethod
from hf_moe_lmc.matching.pairs import ExpertPairs
from hf_moe_lmc.moe.experts import Bank

MARGIN = 0.5  # of a sketched squared Gram cost to those beside it: below, sketched and exact costs give the same order


@dataclass(frozen=True)
class Candidates:
    """The permutations to choose from.

    Attributes:
        permutations: by the method that found them: `gate`, `expert` or `table`; `tied` where there is but one.
        decided: how one of them is chosen, a key of `result.DECIDED`.
        form, margin: as `expert_cost_form` and `order_margin` of BankMatching.
    """

    permutations: dict[str, Tensor]
    decided: str
    form: str | None = None
    margin: float | None = None


def as_it_is(b: Bank) -> Candidates:
    """The order that the experts have, which is the only one where router rows are tied."""
    return Candidates({"tied": torch.arange(b.experts)}, "tied")


def candidates(pairs: ExpertPairs, groups: int, order: OrderMethod) -> Candidates:
    """The permutations that `order` asks for, from sketches of the experts where these decide."""
    if pairs.a.unit_count and pairs.wide:
        return _from_sketches(pairs, groups, order)
    return _from_full_costs(pairs, groups, order)


def _from_full_costs(pairs: ExpertPairs, groups: int, order: OrderMethod) -> Candidates:
    a, b = pairs.a, pairs.b
    has_units = a.unit_count > 0
    table = _table_cost(a, b)
    if table is not None:
        return Candidates({"table": assign_groups(table, groups)}, "table")
    permutations, form = {}, None
    if order in ("gate", "best") or not has_units:
        permutations["gate"] = assign_groups(gate_cost(a, b), groups)
    if has_units and order in ("expert", "best"):
        cost = expert_cost(a, b, pairs.units, pairs.device)
        check_cost(cost.values, a, b)
        form = cost.form if cost.columns is None else f"{cost.form} of {cost.columns} columns"
        permutations["expert"] = assign_groups(cost.values, groups)
    both = len(permutations) > 1
    same = both and torch.equal(permutations["gate"], permutations["expert"])
    return Candidates(permutations, "both" if same else "distance" if both else "asked", form)


def _from_sketches(pairs: ExpertPairs, groups: int, order: OrderMethod) -> Candidates:
    a, b = pairs.a, pairs.b
    table = _table_cost(a, b)
    gate = assign_groups(gate_cost(a, b) if table is None else table, groups)
    grams = pairs.survey(gate)
    if table is not None:
        return Candidates({"table": gate}, "table")
    if order == "gate":
        return Candidates({"gate": gate}, "asked")
    cost, columns = grams.cost()
    expert = assign_groups(cost.sqrt(), groups)
    form, ratio = f"sketch of {columns} columns from both sides", margin(cost, expert)
    if order == "expert":
        if ratio < MARGIN:
            return Candidates({"expert": expert}, "margin", form, ratio)
        return _from_full_costs(pairs, groups, order)
    if torch.equal(gate, expert):
        return Candidates({"gate": gate, "expert": expert}, "margin" if ratio < MARGIN else "both", form, ratio)
    if all(pairs.proved(i, int(j)) for permutation in (gate, expert) for i, j in enumerate(permutation)):
        return Candidates({"gate": gate, "expert": expert}, "distance", form, ratio)
    return Candidates({"expert": expert}, "sketch", form, ratio)


def _table_cost(a: Bank, b: Bank) -> Tensor | None:
    """Cost of the permutations that make B's table of token experts A's; None without a table, or if none does.

    Experts that no token names are left to the router rows.
    """
    if "expert_table" not in a.roles:
        return None
    table_a, table_b = (bank.values("expert_table").long() for bank in (a, b))
    rows = min(len(table_a), len(table_b))  # one vocabulary may have grown
    named_by_a, named_by_b = table_a[:rows].flatten(), table_b[:rows].flatten()
    permutation = torch.full((a.experts,), -1)
    permutation[named_by_a] = named_by_b
    named = permutation >= 0
    if not torch.equal(permutation[named_by_a], named_by_b) or len(permutation[named].unique()) < int(named.sum()):
        return None
    cost = gate_cost(a, b)
    forced = torch.zeros_like(cost)
    forced[named, permutation[named]] = -2 * float(cost.max() + 1) * a.experts
    return cost + forced
