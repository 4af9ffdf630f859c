"""The linear assignment problem: the only place that knows the solver."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(cost: Tensor) -> Tensor:
    """The permutation that minimises sum_i cost[i, order[i]].

    Args:
        cost: [n, n], finite; its own storage may be used as scratch.

    Returns:
        order, int64 [n], on the CPU.

    Where the cheapest entry of every row, after each column's minimum has been subtracted, falls on a different column,
    that is the optimum already (dual feasible with zero gap); so it is for related weights, and the solver is skipped.
    """
    values = cost.to("cpu", torch.float64)
    values -= values.min(dim=0, keepdim=True).values
    order = values.argmin(dim=1)
    if len(order.unique()) == len(order):
        return order
    return torch.from_numpy(linear_sum_assignment(values.numpy())[1])


def assign_groups(cost: Tensor, groups: int) -> Tensor:
    """The cheapest order that permutes whole groups and the members inside each group.

    Args:
        cost: [n, n], with n / groups consecutive members in each group.

    Two levels, both exact: the best assignment of the members for every pair of groups, then of the groups.
    """
    members = len(cost) // groups
    blocks = cost.to("cpu", torch.float64).view(groups, members, groups, members).transpose(1, 2)
    within = [[assign(blocks[p, q].clone()) for q in range(groups)] for p in range(groups)]
    rows = torch.arange(members)
    between = [blocks[p, q][rows, within[p][q]].sum() for p in range(groups) for q in range(groups)]
    order = assign(torch.stack(between).view(groups, groups))
    return torch.cat([within[p][int(q)] + int(q) * members for p, q in enumerate(order)])
