"""RegMean: linear maps merged so that they give on each parent's own inputs what that parent gives.

    W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i,   G_i = X_i' X_i with off-diagonals times OFF_DIAGONAL

(Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849). X_i are the inputs of the map
in parent i on text of its own domain. Where inputs are (nearly) absent, what comes out is the plain average.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OFF_DIAGONAL = 0.9
FLOOR = 1e-6  # of the mean of the diagonal: keeps directions without inputs at the average
DOUBLE = 4096  # wider maps are solved in float32


@dataclass
class Gram:
    """Second moments of the inputs of a linear map.

    Attributes:
        matrix: sum of x x', float32 [input, input].
        tokens: how many inputs were added.
    """

    matrix: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> Gram:
        return cls(torch.zeros(width, width, device=device))

    def add(self, inputs: Tensor) -> None:
        """Takes in inputs, [..., input]."""
        flat = inputs.reshape(-1, inputs.shape[-1]).float()
        self.matrix += flat.T @ flat
        self.tokens += len(flat)


def regmean(a: Tensor, b: Tensor, grams: tuple[Gram, Gram], totals: tuple[int, int], t: float) -> Tensor:
    """Merges one linear map.

    Args:
        a, b: of A and of B', [output, input].
        grams: of their inputs.
        totals: tokens of text that each parent read, by which its Gram is divided; an expert gets a part of them.
        t: weight of B'; A's is 1 - t.

    Returns:
        float32 [output, input].

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> gram_a, gram_b = Gram.empty(2), Gram.empty(2)
        >>> gram_a.add(torch.tensor([[1.0, 0.0]])), gram_b.add(torch.tensor([[0.0, 1.0]]))
        (None, None)
        >>> regmean(a, b, (gram_a, gram_b), (1, 1), 0.5).round(decimals=3).tolist()  # each is right where it was used
        [[1.0, 1.0]]
        >>> regmean(a, b, (gram_a, gram_a), (1, 1), 0.5).round(decimals=3).tolist()  # the average
        [[0.5, 0.5]]
    """
    wide = torch.float64 if a.shape[1] <= DOUBLE else torch.float32
    average = torch.lerp(a.to(wide), b.to(wide), t)
    weights = [weight / max(total, 1) for weight, total in zip((1 - t, t), totals, strict=True)]
    damped = [_damped(gram.matrix.to(wide) * weight) for gram, weight in zip(grams, weights, strict=True)]
    both = damped[0] + damped[1]
    floor = FLOOR * float(both.diagonal().mean())
    if not floor > 0:
        return average.float()
    # W - average solves the same system, and stays 0 where nothing is known
    wanted = (a.to(wide) - average) @ damped[0] + (b.to(wide) - average) @ damped[1]
    both.diagonal().add_(floor)
    return (average + torch.cholesky_solve(wanted.T, torch.linalg.cholesky(both)).T).float()


def _damped(gram: Tensor) -> Tensor:
    diagonal = gram.diagonal().clone()
    gram.mul_(OFF_DIAGONAL).diagonal().copy_(diagonal)
    return gram
