from __future__ import annotations

import pytest
import torch

from hf_moe_lmc.matching import rows

UNITS, WIDTH = 70, 50


def matrix(seed: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    x = torch.randn(UNITS, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.T.contiguous().T if transposed else x


@pytest.mark.parametrize("block", [1, 300, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [(False, False), (True, True), (True, False), (False, True)])
def test_sums_over_rows_whatever_the_layout(
    transposed: tuple[bool, bool], dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "BLOCK", block)
    x, y = (matrix(seed, dtype, way) for seed, way in enumerate(transposed))
    kept = x.clone(), y.clone()
    order = torch.randperm(UNITS, generator=torch.Generator().manual_seed(2))
    factor = torch.randn(UNITS, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(rows.squares(x), x.double().square().sum(dim=1), rtol=1e-6)
    assert torch.allclose(rows.distances(x, y), (x.double() - y.double()).square().sum(dim=1), rtol=1e-6)
    expected = (x.double() - factor[:, None].double() * y[order].double()).square().sum(dim=1)
    assert torch.allclose(rows.distances(x, y, order, factor), expected, rtol=1e-5)
    signs = torch.randint(2, (WIDTH, 6), generator=torch.Generator().manual_seed(4)).float() * 2 - 1
    values, squares = rows.project(x, signs)
    error = (values.double() - x.double() @ signs.double()).abs().amax(dim=1)
    assert bool((error <= rows.projection_error(x) * squares.sqrt()).all())
    assert torch.allclose(squares, rows.squares(x), rtol=1e-6)
    assert torch.equal(x, kept[0]) and torch.equal(y, kept[1])  # nothing is changed in place


def test_matrices_without_columns_have_zero_sums() -> None:
    empty = torch.zeros(5, 0)
    assert torch.equal(rows.squares(empty), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(rows.distances(empty, empty), torch.zeros(5, dtype=torch.float64))
