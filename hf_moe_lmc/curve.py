"""The loss along an interpolation path, and the barrier it crosses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class BarrierCurve:
    """Losses on a grid that holds both ends (paper, Eq. 1; here t = 0 is A and t = 1 is B).

    Attributes:
        t: ascending, from 0 to 1.
        nll: negative log-likelihood at each t, nats per token.
    """

    t: tuple[float, ...]
    nll: tuple[float, ...]

    @cached_property
    def excess(self) -> tuple[float, ...]:
        """L(theta_t) - [(1 - t) L(A) + t L(B)], nats per token."""
        first, last = self.nll[0], self.nll[-1]
        return tuple(loss - ((1 - t) * first + t * last) for t, loss in zip(self.t, self.nll, strict=True))

    @property
    def barrier(self) -> float:
        """The largest excess, ends included: never negative. Nats per token; nan where a loss is not finite."""
        return max(0.0, *self.excess) if all(map(math.isfinite, self.excess)) else math.nan

    @property
    def barrier_t(self) -> float:
        """Where on the path the barrier is."""
        return self.t[max(range(len(self.t)), key=lambda i: self.excess[i])]

    @property
    def area(self) -> float:
        """Signed area between the curve and the straight line, by the trapezoid rule. Nats per token."""
        steps = zip(self.t, self.t[1:], self.excess, self.excess[1:], strict=False)
        return sum((t1 - t0) * (e0 + e1) / 2 for t0, t1, e0, e1 in steps)

    @property
    def perplexity(self) -> tuple[float, ...]:
        return tuple(math.inf if loss >= 700 else math.exp(loss) for loss in self.nll)
