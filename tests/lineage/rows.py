"""Router rows as unrelated models have them: drawn independently, in distributions that lead naive tests astray."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]  # (shape [..., n, d], generator) -> rows of one model


def _flat(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _scaled(scale: Callable[[int], Tensor]) -> Draw:
    return lambda shape, generator: _flat(shape, generator) * scale(shape[-1])


def _spike(width: int) -> Tensor:
    scale = torch.ones(width)
    scale[0] = width**0.5
    return scale


def _common_mean(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    mean = torch.randn(shape[-1], generator=torch.Generator().manual_seed(1))  # the same in all models
    return _flat(shape, generator) + 10 * mean


def _heavy(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    squares = torch.randn((2, *shape), generator=generator).square().sum(dim=0)
    return _flat(shape, generator) / (squares / 2).sqrt()


def _few_directions(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """All rows of all models lie in one space that has no more dimensions than there are rows."""
    rows = torch.zeros(shape)
    count = min(shape[-2] - 1, shape[-1])
    rows[..., :count] = torch.randn((*shape[:-1], count), generator=generator)
    return rows


def _clusters(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Rows about a few centres that all models have in common."""
    count = max(2, shape[-2] // 3)
    centres = 3 * torch.randn(count, shape[-1], generator=torch.Generator().manual_seed(2))
    return centres[torch.randint(count, shape[:-1], generator=generator)] + _flat(shape, generator)


DRAWS: Mapping[str, Draw] = {
    "independent directions": _flat,
    "a spectrum that falls slowly": _scaled(lambda width: torch.arange(1, width + 1) ** -0.5),
    "a spectrum that falls fast": _scaled(lambda width: 1 / torch.arange(1, width + 1)),
    "one large dimension": _scaled(_spike),
    "a large common mean": _common_mean,
    "heavy tails": _heavy,
    "one small space": _few_directions,
    "common clusters": _clusters,
}
