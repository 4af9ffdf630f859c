"""The loss along an interpolation path, and the barrier it crosses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NEGLIGIBLE = 1e-3  # nats; a smaller barrier is no more than rounding errors
RESOLVED = 0.1  # of the barrier: how far the neighbours of the maximum may be below it

Losses = NDArray[np.float64]  # [..., point], nats per token


def excess(t: Sequence[float], nll: Losses) -> Losses:
    """L(theta_t) - [(1 - t) L(A) + t L(B)], [..., point], nats per token."""
    at = np.asarray(t, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # a loss that is infinite leaves nan
        return np.asarray(nll - ((1 - at) * nll[..., :1] + at * nll[..., -1:]), dtype=np.float64)


def barrier(t: Sequence[float], nll: Losses) -> Losses:
    """The largest excess of each curve, ends included: [...], never negative, nan where a loss is not finite."""
    above = excess(t, nll)
    return np.where(np.isfinite(above).all(axis=-1), np.maximum(above.max(axis=-1), 0.0), np.nan)


def area(t: Sequence[float], nll: Losses) -> Losses:
    """Signed area between each curve and its straight line, by the trapezoid rule: [...], nats per token."""
    above = excess(t, nll)
    return np.asarray((np.diff(np.asarray(t)) * (above[..., 1:] + above[..., :-1]) / 2).sum(axis=-1))


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
        return tuple(excess(self.t, np.array(self.nll)).tolist())

    @property
    def barrier(self) -> float:
        """The largest excess, ends included: never negative. Nats per token; nan where a loss is not finite."""
        return float(barrier(self.t, np.array(self.nll)))

    @property
    def peak(self) -> int:
        """Number of the point where the barrier is."""
        return max(range(len(self.t)), key=lambda i: self.excess[i])

    @property
    def barrier_t(self) -> float:
        """Where on the path the barrier is."""
        return self.t[self.peak]

    @property
    def barrier_worse_end(self) -> float:
        """The largest rise above the worse of both ends: max over t of L(theta_t) - max(L(A), L(B)), never negative.

        Nats per token; nan where a loss is not finite.
        """
        finite = all(map(math.isfinite, self.nll))
        return max(self.nll) - max(self.nll[0], self.nll[-1]) if finite else math.nan

    @property
    def perplexity_ratio(self) -> float:
        """exp(barrier): the perplexity at its worst over the ends' own, interpolated geometrically."""
        return math.inf if self.barrier >= 700 else math.exp(self.barrier)

    @property
    def area(self) -> float:
        """Signed area between the curve and the straight line, by the trapezoid rule. Nats per token."""
        return float(area(self.t, np.array(self.nll)))

    @property
    def perplexity(self) -> tuple[float, ...]:
        return tuple(math.inf if loss >= 700 else math.exp(loss) for loss in self.nll)

    def unresolved(self, half_width: float = 0.0) -> str | None:
        """Why the grid may have missed the top of the barrier, in words; None where it looks resolved.

        Args:
            half_width: of the barrier's interval, nats per token; what is less than it is noise.
        """
        i, barrier = self.peak, self.barrier
        if not barrier > max(half_width, NEGLIGIBLE) or i in (0, len(self.t) - 1):
            return None  # nan as well
        if len(self.t) > 3 and i in (1, len(self.t) - 2):  # nothing is known between it and the end
            end = "first" if i == 1 else "last"
            return f"its maximum is at t = {self.t[i]:.3g}, the {end} inner point of the grid"
        drop = barrier - min(self.excess[i - 1], self.excess[i + 1])
        if drop > max(RESOLVED * barrier, half_width):
            return f"the loss falls by {drop:.3g} nats from its maximum at t = {self.t[i]:.3g} to the next point of the grid"
        return None
