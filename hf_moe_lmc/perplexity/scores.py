"""What a model gives for each token: its loss, and whether the token was the model's first choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

POSITIONS_AT_ONCE = 512  # rows of logits that are widened to float32 at a time


@dataclass(frozen=True, eq=False)
class Scores:
    """What the points of a path have scored on each window, summed over its scored tokens.

    Attributes:
        losses: float64 [point, window], nats.
        right: tokens that were the first choice, float64 [point, window].
    """

    losses: Tensor
    right: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Scores:
        """From float64 [point, window, 2]."""
        return cls(*values.unbind(dim=2))


class TokenScores(NamedTuple):
    """What a model gives for each token.

    Attributes:
        losses: cross entropy, float64 [batch, token], nats.
        right: 1 where the token is the model's first choice, else 0: float64 [batch, token]. Of equal choices the one of the
            lowest id is first.
    """

    losses: Tensor
    right: Tensor


def token_scores(logits: Tensor, targets: Tensor) -> TokenScores:
    """Cross entropy of each token, and whether it is the model's first choice; both in float32.

    Args:
        logits: [batch, token, vocabulary].
        targets: int64 [batch, token].

    Example:
        >>> token_scores(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))  # four tokens, all alike
        TokenScores(losses=tensor([[1.3863, 1.3863]], dtype=torch.float64), right=tensor([[1., 0.]], dtype=torch.float64))
    """
    targets = targets.to(logits.device)
    losses, right = torch.empty(2, *targets.shape, dtype=torch.float64, device=logits.device)
    for first in range(0, logits.shape[1], POSITIONS_AT_ONCE):
        here = slice(first, first + POSITIONS_AT_ONCE)
        # rows of one matrix: along another dimension, torch is up to twenty times slower
        wide, wanted = logits[:, here].float().flatten(0, 1), targets[:, here]
        found = torch.nn.functional.cross_entropy(wide, wanted.flatten(), reduction="none")
        losses[:, here] = found.view(wanted.shape).double()
        right[:, here] = (wide.argmax(dim=1).view(wanted.shape) == wanted).double()
    return TokenScores(losses, right)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses of `token_scores` alone: float64 [batch, token], nats.

    Example:
        >>> token_losses(torch.zeros(1, 2, 4), torch.tensor([[0, 3]]))  # four tokens, all alike
        tensor([[1.3863, 1.3863]], dtype=torch.float64)
    """
    return token_scores(logits, targets).losses
