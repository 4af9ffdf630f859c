from __future__ import annotations

from itertools import permutations

import pytest
import torch

from hf_moe_lmc.matching import assignment
from hf_moe_lmc.matching.assignment import assign, assign_groups, prices


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


@pytest.mark.parametrize("kind", ["unrelated", "related", "ties", "rows alike"])
@pytest.mark.parametrize("seed", range(2))
def test_few_entries_with_prices_give_the_optimum_of_all(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(150, 8, generator=generator) for _ in range(2))
    if kind == "related":
        y = x[torch.randperm(150, generator=generator)] + 0.7 * y
    if kind == "rows alike":
        x[:] = x[:1]
    cost = torch.randint(4, (150, 150), generator=generator).float() if kind == "ties" else -(x @ y.T).abs()
    best = total(cost, assign(cost.clone()))
    monkeypatch.setattr(assignment, "SPARSE", 10)
    monkeypatch.setattr(assignment, "CANDIDATES", 3)  # so that entries are missing at first
    found = assign(cost.clone())
    assert torch.equal(found.sort().values, torch.arange(150))
    assert total(cost, found) == pytest.approx(best, rel=1e-6)
    assert torch.equal(found, assign(cost.clone()))


@pytest.mark.parametrize("seed", range(3))
def test_prices_prove_an_optimum_and_nothing_else(seed: int) -> None:
    cost = torch.rand(30, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def proved(order: torch.Tensor) -> bool:
        price = prices(cost, order)
        assert bool((price <= 0).all())
        own = (cost - price).gather(1, order[:, None])
        return bool((cost - price >= own - 1e-9).all())

    order = assign(cost.clone())
    assert proved(order)
    worse = order.clone()
    worse[:2] = order[:2].flip(0)
    assert not proved(worse)
