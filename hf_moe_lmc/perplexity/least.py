"""Where on a path the loss is least, and how sure that is.

The t of the least loss is chosen on the text that it is then judged by, which flatters it. Two things keep that in bounds.
All t whose loss cannot be told from the least one are given. And the loss at the chosen t is measured again by cross-fitting:
on each fifth of the documents, t is that of the least loss on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.perplexity.bootstrap import Floats, Interval
from hf_moe_lmc.perplexity.by_text import DECIDING, TextMeans


@dataclass(frozen=True, eq=False)
class LeastLoss:
    """The point of the least loss on one path, on the unweighted mean of the texts.

    Attributes:
        t: the grid, ascending from 0 to 1.
        losses: float64 [point, window], nats, summed over each window.
        means: of the texts.

    Example:
        >>> from hf_moe_lmc.perplexity.windows import Windows
        >>> windows = Windows(tuple(torch.arange(5) for _ in range(6)), tuple(range(6)), 5, False, 30)
        >>> losses = torch.tensor([[8] * 6, [4, 5] * 3, [5, 4] * 3, [9] * 6], dtype=torch.float64)
        >>> least = LeastLoss((0.0, 0.4, 0.6, 1.0), losses, TextMeans(windows))
        >>> least.chosen, least.interval
        (0.4, (0.4, 0.6))
    """

    t: tuple[float, ...]
    losses: Tensor
    means: TextMeans

    @cached_property
    def nll(self) -> Floats:
        """Mean loss at each point, nats per token."""
        return self.means.of(None, self.losses.numpy())

    @cached_property
    def index(self) -> int | None:
        """Of the point of the least loss, the first of equal ones; None where no loss is finite."""
        return least_of(self.nll)

    @property
    def chosen(self) -> float | None:
        """Its t."""
        return None if self.index is None else self.t[self.index]

    @cached_property
    def between(self) -> int | None:
        """Of the point of the least loss between the ends; None without such a point, and where no loss there is finite."""
        found = least_of(self.nll[1:-1])
        return None if found is None else found + 1

    @cached_property
    def close(self) -> tuple[float, ...]:
        """All t whose loss cannot be told from the least one: the paired interval of the difference reaches down to 0.

        Empty with too few documents to decide.
        """
        if self.index is None or self.means.clusters(None) < DECIDING:
            return ()
        above = (self.losses - self.losses[self.index]).numpy()
        resampled = self.means.resampled(None, above)
        # the chosen point is one of them: it differs from itself by 0
        return tuple(t for i, t in enumerate(self.t) if np.isfinite(self.nll[i]) and self._low(resampled[:, i]) <= 0)

    @property
    def interval(self) -> Interval | None:
        """Least and largest of those t that are neighbours around the chosen one; None with too few documents."""
        if self.index is None or not self.close:
            return None
        first = last = self.index
        while first > 0 and self.t[first - 1] in self.close:
            first -= 1
        while last + 1 < len(self.t) and self.t[last + 1] in self.close:
            last += 1
        return self.t[first], self.t[last]

    @property
    def step(self) -> float:
        """How far the farther neighbour of the chosen point is; 0 without a chosen point."""
        if self.index is None:
            return 0.0
        around = self.t[max(self.index - 1, 0) : self.index + 2]
        return max(abs(t - self.t[self.index]) for t in around)

    @property
    def elsewhere(self) -> tuple[float, ...]:
        """Those t that are no neighbours, such as the other end of a path with a barrier."""
        low, high = self.interval or (0.0, 1.0)
        return tuple(t for t in self.close if not low <= t <= high)

    def _low(self, values: Floats) -> float:
        found = self.means.expanded_interval(None, values)
        return -np.inf if found is None else found[0]

    @property
    def undecided(self) -> bool:
        """Whether no point of the grid can be told from the least one."""
        return self.close == self.t

    @cached_property
    def cross_fitted(self) -> Tensor | None:
        """Loss of each window at the t that the other folds of the documents choose: float64 [window], nats.

        None without documents to hold out, and where such a fold has no finite loss.
        """
        if self.means.clusters(None) < 2:
            return None
        folds, losses = self.means.folds(), self.losses.numpy()
        found = torch.empty(losses.shape[1], dtype=torch.float64)
        for fold in range(int(folds.max()) + 1):
            own = folds == fold
            index = least_of(self._without(own))
            if index is None:
                return None
            found[torch.from_numpy(own)] = self.losses[index][torch.from_numpy(own)]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The `verdict.least` of report.json."""
        nll = None if self.index is None else float(self.nll[self.index])
        return {"t": self.chosen, "interval": self.interval, "close": list(self.close), "nll": nll}

    def _without(self, left_out: np.ndarray[Any, np.dtype[np.bool_]]) -> Floats:
        """Mean loss at each point over the windows that are not left out."""
        sums, tokens = (np.where(left_out, 0, every.numpy()) for every in (self.losses, self.means.windows.scored))
        return np.asarray(
            np.mean([sums[:, own].sum(axis=1) / tokens[own].sum() for own in self.means.members.values()], axis=0)
        )


def least_of(values: Floats) -> int | None:
    """Number of the least finite value, the first of equal ones; None where there is none."""
    finite = np.isfinite(values)
    return int(np.where(finite, values, np.inf).argmin()) if finite.any() else None
