from __future__ import annotations

from itertools import permutations

import pytest
import torch

from hf_moe_lmc.assignment import assign, assign_groups


def total(cost: torch.Tensor, order: torch.Tensor) -> float:
    return float(cost[torch.arange(len(cost)), order].sum())


@pytest.mark.parametrize("size", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(4))
def test_assignment_is_the_cheapest_permutation(size: int, seed: int) -> None:
    cost = torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    best = min(total(cost, torch.tensor(order)) for order in permutations(range(size)))
    assert total(cost, assign(cost.clone())) == pytest.approx(best)


def test_column_constants_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(6, 6, generator=generator)
    assert torch.equal(assign(cost.clone()), assign(cost + 100 * torch.rand(6, generator=generator)))


@pytest.mark.parametrize("seed", range(4))
def test_grouped_assignment_is_the_cheapest_of_the_wreath_product(seed: int) -> None:
    groups, members = 3, 2
    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
    within = list(permutations(range(members)))
    orders = [
        torch.tensor([q * members + i for p, q in enumerate(outer) for i in (within[k // 2**p % 2])])
        for outer in permutations(range(groups))
        for k in range(2**groups)
    ]
    best = min(total(cost, order) for order in orders)
    found = assign_groups(cost, groups)
    assert total(cost, found) == pytest.approx(best)
    assert any(torch.equal(found, order) for order in orders)


def test_one_group_is_no_restriction() -> None:
    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(9))
    assert torch.equal(assign_groups(cost, 1), assign(cost.clone()))
    assert total(cost, assign_groups(cost, 3)) > total(cost, assign_groups(cost, 1))
