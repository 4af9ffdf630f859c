"""The linear assignment problem: the only place that knows the solver."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

SPARSE = 4096  # above so many rows, an assignment on the cheapest entries is proved for all of them by its prices
CANDIDATES = 24  # cheapest entries of each row, and of each column, to begin with
BLOCK = 32 << 20  # elements of a block of rows that is looked at
ROUNDS = 12  # of added candidates, before the dense solver has to do


def assign(cost: Tensor) -> Tensor:
    """The permutation that minimises sum_i cost[i, permutation[i]].

    First each column's minimum is subtracted. If the cheapest entries of all rows then fall on different columns, they are
    the optimum: dual feasible with zero gap. So it is for related weights, and the solver is skipped.

    Args:
        cost: [n, n], finite; its own storage may be used as scratch.

    Returns:
        int64 [n], on the CPU.

    Example:
        >>> assign(torch.tensor([[1.0, 0.0, 9.0], [2.0, 9.0, 9.0], [9.0, 0.0, 1.0]])).tolist()
        [1, 0, 2]
    """
    values = cost.to("cpu", torch.float32 if len(cost) > SPARSE and cost.dtype == torch.float32 else torch.float64)
    values -= values.amin(dim=0, keepdim=True)
    permutation = values.argmin(dim=1)
    if len(permutation.unique()) == len(permutation):
        return permutation
    if len(values) > SPARSE:
        return _assign_sparse(values)
    return torch.from_numpy(linear_sum_assignment(values.numpy())[1])


def prices(cost: Tensor, permutation: Tensor) -> Tensor:
    """Column prices that prove an assignment optimal: cost[i, j] - v[j] >= cost[i, p[i]] - v[p[i]] for all i and j.

    Args:
        cost: float64 [n, n].
        permutation: p, an optimal assignment; for others the relaxation (Bellman and Ford's, from 0) does not settle.

    Returns:
        v <= 0, float64 [n].
    """
    own = cost.gather(1, permutation[:, None])[:, 0]
    tolerance = 1e-12 * float(cost.abs().max()) if cost.numel() else 0.0
    price = torch.zeros(len(cost), dtype=torch.float64)
    for _ in range(len(cost)):
        lower = (cost + (price[permutation] - own)[:, None]).amin(dim=0)
        if bool((lower >= price - tolerance).all()):
            break
        price = torch.minimum(price, lower)
    return price


def _assign_sparse(values: Tensor) -> Tensor:
    """The optimum over all entries, computed on few of them: each round adds those that its prices show to be missing.

    Optimal up to n times the rounding of the prices, 1e-9 of the largest entry; ties are broken by the solver, always alike.
    """
    count = len(values)
    tolerance = 1e-9 * float(values.max())
    cells = [torch.arange(count) * (count + 1)]  # the diagonal makes every round feasible
    for first, block in _blocks(values):
        here = block.topk(CANDIDATES, dim=1, largest=False).indices + (torch.arange(len(block)) + first)[:, None] * count
        cells.append(here.flatten())
    for first in range(0, count, step := max(1, BLOCK // count)):
        block = values[:, first : first + step].T.contiguous()
        here = block.topk(CANDIDATES, dim=1, largest=False).indices * count
        cells.append((here + (torch.arange(len(block)) + first)[:, None]).flatten())
    known = torch.cat(cells).unique()
    for _ in range(ROUNDS):
        row, column = known // count, known % count
        weight = values.view(-1)[known].double()
        permutation = _solve(row, column, weight, count)
        price, row_price = _sparse_prices(row, column, weight, permutation, values)
        added = torch.cat([_missing(block, first, price, row_price, tolerance) for first, block in _blocks(values)])
        if not len(added):
            return permutation
        known = torch.cat([known, added]).unique()
    return torch.from_numpy(linear_sum_assignment(values.double().numpy())[1])


def _blocks(values: Tensor) -> list[tuple[int, Tensor]]:
    step = max(1, BLOCK // 8 // len(values))
    return [(first, values[first : first + step]) for first in range(0, len(values), step)]


def _solve(row: Tensor, column: Tensor, weight: Tensor, count: int) -> Tensor:
    weights = (weight + 1).numpy()  # a weight 0 would be no edge
    graph = csr_array((weights, (row.numpy(), column.numpy())), shape=(count, count))
    rows, columns = min_weight_full_bipartite_matching(graph)
    permutation = np.empty(count, dtype=np.int64)
    permutation[rows] = columns
    return torch.from_numpy(permutation)


def _sparse_prices(row: Tensor, column: Tensor, weight: Tensor, permutation: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Prices of columns and rows that prove `permutation` on the known entries."""
    own = values.gather(1, permutation[:, None])[:, 0].double()
    price = torch.zeros(len(permutation), dtype=torch.float64)
    for _ in range(len(permutation)):
        lower = price.scatter_reduce(0, column, weight + (price[permutation] - own)[row], "amin")
        if bool((lower >= price - 1e-12).all()):
            break
        price = lower
    return price, own - price[permutation]


def _missing(block: Tensor, first: int, price: Tensor, row_price: Tensor, tolerance: float) -> Tensor:
    """Places, in the whole matrix, of the entries of a block of rows that cost less than their prices.

    A look in the entries' own precision leaves few to be looked at in float64.
    """
    reduced = (block - price.to(block.dtype)).sub_(row_price[first : first + len(block), None].to(block.dtype))
    coarse = tolerance + 8 * torch.finfo(block.dtype).eps * float(block.max() + price.abs().max() + row_price.abs().max())
    suspects = (reduced.amin(dim=1) < coarse).nonzero()[:, 0]
    row, column = (reduced[suspects] < coarse).nonzero(as_tuple=True)
    row = suspects[row]
    exact = block[row, column].double() - price[column] - row_price[first + row]
    return ((first + row) * len(price) + column)[exact < -tolerance]


def assign_groups(cost: Tensor, groups: int) -> Tensor:
    """The cheapest permutation that permutes whole groups and the members inside each group.

    Two levels, both exact: the best assignment of the members for every pair of groups, then of the groups.

    Args:
        cost: [n, n], with n / groups consecutive members in each group.

    Returns:
        int64 [n], on the CPU.
    """
    members = len(cost) // groups
    blocks = cost.to("cpu", torch.float64).view(groups, members, groups, members).transpose(1, 2)
    within = [[assign(blocks[p, q].clone()) for q in range(groups)] for p in range(groups)]
    rows = torch.arange(members)
    between = [blocks[p, q][rows, within[p][q]].sum() for p in range(groups) for q in range(groups)]
    permutation = assign(torch.stack(between).view(groups, groups))
    return torch.cat([within[p][int(q)] + int(q) * members for p, q in enumerate(permutation)])
