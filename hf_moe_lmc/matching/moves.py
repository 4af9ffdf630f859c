"""Which moves of hidden units are worth it: a permutation, cycle by cycle, where what a cycle gains is more than noise.

The cycles of a permutation can be undone one by one: what is left is a permutation still. Units that two models share stand
where they stood. Where such units have drifted apart, some assignment is always a little cheaper than leaving them alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_GAIN = 0.01  # units of a cycle move where that lowers their own squared distance by more than this share


def worthwhile(permutation: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Whether each unit is in a cycle that pays: bool [unit]; a unit that does not move is in none.

    Args:
        permutation: int64 [unit].
        before, after: cost of each unit where nothing moves, and with the permutation; float64 [unit].

    Example:
        Two units change places for nearly nothing, two others for half of their distance:

        >>> before, after = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([0.995, 0.995, 0.5, 0.5])
        >>> worthwhile(torch.tensor([1, 0, 3, 2]), before, after).tolist()
        [False, False, True, True]
    """
    cycle = cycles(permutation)
    total_before, total_after = (torch.zeros_like(costs).index_add_(0, cycle, costs) for costs in (before, after))
    return (total_after < (1 - UNIT_GAIN) * total_before)[cycle] & (permutation != torch.arange(len(permutation)))


def cycles(permutation: Tensor) -> Tensor:
    """The least number in the cycle of each unit, int64 [unit].

    Example:
        >>> cycles(torch.tensor([0, 3, 4, 1, 5, 2])).tolist()
        [0, 1, 2, 1, 2, 2]
    """
    least, ahead = torch.arange(len(permutation)), permutation
    for _ in range(max(len(permutation) - 1, 0).bit_length()):  # each round looks twice as far
        least, ahead = torch.minimum(least, least[ahead]), ahead[ahead]
    return least
