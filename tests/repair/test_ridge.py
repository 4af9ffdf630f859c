"""The ridge regression of down projections by itself, on random experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.repair.ridge import Part, is_dual, ridge

SIZES = [(12, 3, 8), (200, 3, 8), (9000, 2, 5)]  # tokens, experts, units: more columns, fewer, several ranges of tokens


def drawn(tokens: int, experts: int, units: int) -> tuple[list[Part], Tensor, Tensor]:
    """Parts of a random Phi in which each expert has half of the tokens, Phi itself, and a residual."""
    generator = torch.Generator().manual_seed(0)
    phi, parts = torch.zeros(tokens, experts * units), []
    for expert in range(experts):
        rows = torch.randperm(tokens, generator=generator)[: tokens // 2].sort().values
        values = torch.randn(len(rows), units, generator=generator)
        phi[rows, expert * units : (expert + 1) * units] = values
        parts.append(Part(expert, rows, units, lambda wanted, values=values: values[wanted]))  # type: ignore[misc]
    return parts, phi, torch.randn(tokens, 6, generator=generator)


def changes(parts: list[Part], residual: Tensor, strength: float, dual: bool | None) -> Tensor:
    return torch.cat([change for _, change in ridge(parts, residual, strength, dual=dual).changes])


@pytest.mark.parametrize("size", SIZES[:2])
@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_both_forms_solve_the_equations(size: tuple[int, int, int], strength: float) -> None:
    parts, phi, residual = drawn(*size)
    wide, columns = phi.double(), phi.shape[1]
    shift = strength * float(wide.square().sum()) / columns
    expected = torch.linalg.solve(wide.T @ wide + shift * torch.eye(columns), wide.T @ residual.double()).float()
    for dual in (True, False):
        torch.testing.assert_close(changes(parts, residual, strength, dual), expected, rtol=1e-3, atol=1e-5)
    wrong = torch.linalg.solve(wide.T @ wide + 2 * shift * torch.eye(columns), wide.T @ residual.double()).float()
    assert not torch.allclose(changes(parts, residual, strength, None), wrong, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_left_is_what_is_reported_and_less_than_before(size: tuple[int, int, int]) -> None:
    parts, phi, residual = drawn(*size)
    fit = ridge(parts, residual, 0.1)
    left = residual - phi @ torch.cat([change for _, change in fit.changes])
    assert fit.before == pytest.approx(float(residual.norm()), rel=1e-4)
    assert fit.after == pytest.approx(float(left.norm()), rel=1e-3)
    assert fit.after < fit.before


def test_the_form_with_the_smaller_system_is_taken() -> None:
    assert [is_dual(drawn(*size)[0], size[0]) for size in SIZES] == [True, False, False]


@pytest.mark.parametrize("dual", [True, False])
def test_an_infinite_strength_gives_the_start(dual: bool) -> None:
    parts, _, residual = drawn(*SIZES[0])
    assert float(changes(parts, residual, 1e9, dual).abs().max()) < 1e-7
    assert float(changes(parts, residual, 0.1, dual).abs().max()) > 1e-2


@pytest.mark.parametrize("dual", [True, False])
def test_experts_without_tokens_keep_their_weights(dual: bool) -> None:
    parts, _, residual = drawn(*SIZES[0])
    empty = Part("empty", torch.empty(0, dtype=torch.int64), 4, lambda wanted: torch.empty(len(wanted), 4))
    found = dict(ridge([*parts, empty], residual, 0.1, dual=dual).changes)
    assert found["empty"].shape == (4, 6)
    assert not found["empty"].any()
    assert found[0].any()
