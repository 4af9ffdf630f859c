"""RegMean of one linear map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.repair.regmean import FLOOR, OFF_DIAGONAL, Gram, regmean


def drawn(seed: int, tokens: int = 40) -> tuple[Tensor, Gram]:
    generator = torch.Generator().manual_seed(seed)
    gram = Gram.empty(5)
    gram.add(torch.randn(tokens, 5, generator=generator))
    return torch.randn(3, 5, generator=generator), gram


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_equal_grams_give_the_plain_average(t: float) -> None:
    (a, gram), (b, other) = drawn(0), drawn(1)
    torch.testing.assert_close(regmean(a, b, (gram, gram), (40, 40), t), torch.lerp(a, b, t), rtol=0, atol=1e-5)
    if 0 < t < 1:
        assert not torch.allclose(regmean(a, b, (gram, other), (40, 40), t), torch.lerp(a, b, t), atol=1e-3)


def test_it_is_the_closed_form() -> None:
    (a, gram_a), (b, gram_b) = drawn(0), drawn(1)
    damping = torch.full((5, 5), OFF_DIAGONAL) + (1 - OFF_DIAGONAL) * torch.eye(5)
    of_a, of_b = 0.7 * gram_a.matrix * damping / 40, 0.3 * gram_b.matrix * damping / 40
    expected = torch.linalg.solve(of_a + of_b, of_a @ a.T + of_b @ b.T).T
    torch.testing.assert_close(regmean(a, b, (gram_a, gram_b), (40, 40), 0.3), expected, rtol=0, atol=100 * FLOOR)


def test_without_any_inputs_it_is_the_average_and_with_those_of_one_parent_its_map() -> None:
    (a, gram), (b, _) = drawn(0), drawn(1)
    nothing = Gram.empty(5)
    torch.testing.assert_close(regmean(a, b, (nothing, nothing), (40, 40), 0.3), torch.lerp(a, b, 0.3))
    torch.testing.assert_close(regmean(a, b, (gram, nothing), (40, 40), 0.3), a, rtol=0, atol=1e-4)


def test_inputs_that_are_never_used_stay_at_the_average() -> None:
    (a, _), (b, _) = drawn(0), drawn(1)
    gram = Gram.empty(5)
    gram.add(torch.eye(5)[:2])
    merged = regmean(a, b, (gram, Gram.empty(5)), (2, 2), 0.5)
    torch.testing.assert_close(merged[:, 2:], torch.lerp(a, b, 0.5)[:, 2:])
    torch.testing.assert_close(merged[:, :2], a[:, :2], rtol=0, atol=1e-4)
