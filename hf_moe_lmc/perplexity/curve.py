"""The loss along an interpolation path, and the barrier on it.

Paper, Eq. 1, with theta_t = (1 - t) A + t B: t = 0 is A, t = 1 is B.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NEGLIGIBLE = 1e-3  # nats per token; a smaller barrier is no more than rounding errors
RESOLVED = 0.1  # of the barrier: how far the neighbours of the maximum may be below it
LARGEST_EXPONENT = 700  # nats; exp of more is taken for infinite

Losses = NDArray[np.float64]  # [..., point], nats per token


def excess(t: Sequence[float], nll: Losses) -> Losses:
    """Loss over the straight line between the ends: L(theta_t) - [(1 - t) L(A) + t L(B)].

    Args:
        t: the grid, ascending from 0 to 1.
        nll: losses of one curve or of several, [..., point], nats per token.

    Returns:
        [..., point], nats per token; nan where an end is not finite.

    Example:
        >>> excess((0.0, 0.5, 1.0), np.array([1.0, 4.0, 3.0])).tolist()
        [0.0, 2.0, 0.0]
    """
    at = np.asarray(t, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # a loss that is infinite leaves nan
        return np.asarray(nll - ((1 - at) * nll[..., :1] + at * nll[..., -1:]), dtype=np.float64)


def barrier(t: Sequence[float], nll: Losses) -> Losses:
    """Largest excess of each curve, ends included: [..., point] -> [...], nats per token.

    Never negative; nan where a loss is not finite.

    Example:
        >>> barrier((0.0, 0.5, 1.0), np.array([[1.0, 4.0, 3.0], [1.0, 0.5, 3.0]])).tolist()
        [2.0, 0.0]
    """
    above = excess(t, nll)
    return np.where(np.isfinite(above).all(axis=-1), np.maximum(above.max(axis=-1), 0.0), np.nan)


def area(t: Sequence[float], nll: Losses) -> Losses:
    """Signed area under the excess of each curve, by the trapezoid rule: [..., point] -> [...], nats per token.

    Example:
        >>> float(area((0.0, 0.5, 1.0), np.array([1.0, 4.0, 3.0])))
        1.0
    """
    above = excess(t, nll)
    return np.asarray((np.diff(np.asarray(t)) * (above[..., 1:] + above[..., :-1]) / 2).sum(axis=-1))


@dataclass(frozen=True)
class BarrierCurve:
    """Losses on a grid from A (t = 0) to B (t = 1).

    Attributes:
        t: ascending, from 0 to 1.
        nll: negative log-likelihood at each t, nats per token.

    Example:
        >>> curve = BarrierCurve((0.0, 0.5, 1.0), (1.0, 4.0, 3.0))
        >>> curve.barrier, curve.barrier_t, curve.area, curve.barrier_worse_end
        (2.0, 0.5, 1.0, 1.0)
    """

    t: tuple[float, ...]
    nll: tuple[float, ...]

    @cached_property
    def excess(self) -> tuple[float, ...]:
        """L(theta_t) - [(1 - t) L(A) + t L(B)] at each t, nats per token."""
        return tuple(excess(self.t, np.array(self.nll)).tolist())

    @property
    def barrier(self) -> float:
        """Largest excess, ends included, nats per token. Never negative; nan where a loss is not finite."""
        return float(barrier(self.t, np.array(self.nll)))

    @property
    def peak(self) -> int:
        """Index of the point with the largest excess."""
        return max(range(len(self.t)), key=lambda i: self.excess[i])

    @property
    def barrier_t(self) -> float:
        """Where on the path the barrier is."""
        return self.t[self.peak]

    @property
    def barrier_worse_end(self) -> float:
        """Largest rise over the worse of both ends: max over t of L(theta_t) - max(L(A), L(B)), nats per token.

        Never negative; nan where a loss is not finite.
        """
        finite = all(map(math.isfinite, self.nll))
        return max(self.nll) - max(self.nll[0], self.nll[-1]) if finite else math.nan

    @property
    def perplexity_ratio(self) -> float:
        """exp(barrier): the perplexity at the barrier over the ends' own, interpolated geometrically."""
        return math.inf if self.barrier >= LARGEST_EXPONENT else math.exp(self.barrier)

    @property
    def area(self) -> float:
        """Signed area under the excess, by the trapezoid rule, nats per token."""
        return float(area(self.t, np.array(self.nll)))

    @property
    def perplexity(self) -> tuple[float, ...]:
        """exp(nll) at each t."""
        return tuple(math.inf if loss >= LARGEST_EXPONENT else math.exp(loss) for loss in self.nll)

    def unresolved(self, half_width: float = 0.0) -> str | None:
        """Why the grid may have missed the top of the barrier, in words; None where it looks resolved.

        Args:
            half_width: of the barrier's interval, nats per token; smaller differences are noise.

        Example:
            >>> BarrierCurve((0.0, 0.5, 1.0), (1.0, 2.0, 1.0)).unresolved()
            'the loss falls by 1 nats from its maximum at t = 0.5 to the next point of the grid'
        """
        i, barrier = self.peak, self.barrier
        if not barrier > max(half_width, NEGLIGIBLE) or i in (0, len(self.t) - 1):
            return None  # also where the barrier is nan
        if len(self.t) > 3 and i in (1, len(self.t) - 2):  # no point lies between the maximum and the end
            end = "first" if i == 1 else "last"
            return f"its maximum is at t = {self.t[i]:.3g}, the {end} inner point of the grid"
        drop = barrier - min(self.excess[i - 1], self.excess[i + 1])
        if drop > max(RESOLVED * barrier, half_width):
            return f"the loss falls by {drop:.3g} nats from its maximum at t = {self.t[i]:.3g} to the next point of the grid"
        return None
