"""What is plotted, as plain values: the same for pictures and for the interactive page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bounds = tuple[float, float] | None  # low and high of an interval; None: not known
Span = tuple[int, int]  # first and last of neighbouring decoder layers
Floats = NDArray[np.float64]

FAR = 4  # times the highest bar
ROUNDING = 1e-6  # nats per token; what is smaller is neither a barrier nor a dip


@dataclass(frozen=True, kw_only=True)
class Heading:
    """What stands above a plot.

    Attributes:
        title: the finding, or else the two models.
        models: names of A and B.
        measured: text and tokens.
    """

    title: str
    models: tuple[str, str]
    measured: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One path, in nats per token.

    Attributes:
        t: its points, ascending from 0 to 1.
        nll: losses at these.
        excess: of the loss over the straight line between the ends.
        band: pointwise intervals of the excess; empty where there are none.
        barrier, interval: the largest excess and its interval.
        straight: the points lie on a straight line of weights, so that the largest excess is a barrier.
    """

    t: Sequence[float]
    nll: Sequence[float]
    excess: Sequence[float]
    band: Sequence[tuple[float, float]]
    barrier: float
    interval: Bounds
    straight: bool = True

    @property
    def missing(self) -> list[float]:
        """Points whose loss is not finite."""
        return [t for t, loss in zip(self.t, self.nll, strict=True) if not np.isfinite(loss)]

    @property
    def peak(self) -> int | None:
        """Index of the largest excess; None without a barrier."""
        return int(np.argmax(self.excess)) if self.barrier > ROUNDING else None

    @property
    def best(self) -> int | None:
        """Index of the least loss; None where that is at an end, or a loss is not finite."""
        best = int(np.argmin(self.nll))
        return best if not self.missing and 0 < best < len(self.t) - 1 else None

    @property
    def label(self) -> str:
        """The barrier in words, or how far the curve lies below the line.

        Example:
            >>> Line(t=(0, 0.5, 1), nll=(1, 0.5, 1), excess=(0, -0.5, 0), band=[], barrier=0.0, interval=None).label
            'no barrier, 0.5 below the line at t = 0.5'
        """
        if self.missing:
            return f"the loss is not finite at {_listed(self.missing)}"
        if self.peak is not None:
            found = f"{self.barrier:.3g}{_brackets(self.interval)}"
            at = f"at t = {self.t[self.peak]:.3g}"
            return f"barrier {found} {at}" if self.straight else f"{found} above the line {at}"
        lowest = int(np.argmin(self.excess))
        if not self.excess[lowest] < -ROUNDING:
            return "no barrier" if self.straight else "on the line"
        low, high = self.band[lowest] if self.band else (np.nan, np.nan)
        below = _brackets((-high, -low) if self.band else None)
        none = "no barrier, " if self.straight else ""
        return f"{none}{-self.excess[lowest]:.3g} below the line{below} at t = {self.t[lowest]:.3g}"


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss along paths from A to B.

    Attributes:
        lines: by path name.
        sure: what bands and brackets are, or why there are none.
    """

    heading: Heading
    lines: Mapping[str, Line]
    sure: str

    @property
    def ends(self) -> tuple[float, float]:
        """Losses of A and of B: of the first path, since all paths have their ends in common but for rounding."""
        nll = next(iter(self.lines.values())).nll
        return nll[0], nll[-1]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Barriers of paths on which some layers alone are interpolated, nats per token.

    Attributes:
        barriers: by first and last layer.
        intervals: of the same.
        t: points of these paths.
        whole: barrier of the aligned path of the whole model.
        sure: what the intervals are, or why there are none.
    """

    heading: Heading
    barriers: Mapping[Span, float]
    intervals: Mapping[Span, Bounds]
    t: Sequence[float]
    whole: float
    sure: str

    @property
    def singles(self) -> list[Span]:
        return sorted(span for span in self.barriers if span[0] == span[1])

    @property
    def ranges(self) -> list[Span]:
        """Short ones first."""
        return sorted((span for span in self.barriers if span[0] != span[1]), key=lambda span: (span[1] - span[0], span))

    @property
    def far(self) -> bool:
        """Whether the line of the whole model is so high that all bars would be flat."""
        return bool(self.whole > FAR * self._bars > 0)

    @property
    def highest(self) -> float:
        """Of what is shown: bars, intervals, and the whole model unless it is far above."""
        return self._bars if self.far or not np.isfinite(self.whole) else max(self._bars, self.whole)

    @property
    def whole_label(self) -> str:
        """The barrier of the whole model in words."""
        if not np.isfinite(self.whole):
            return "all layers: not finite"
        return f"all layers: {self.whole:.3g}" + (", above this plot" if self.far else "")

    @property
    def _bars(self) -> float:
        bounds = [bounds[1] for bounds in self.intervals.values() if bounds]
        return max((value for value in [*self.barriers.values(), *bounds] if np.isfinite(value)), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts the tokens take along one path.

    Attributes:
        path: its name.
        t: points, ascending.
        layers: numbers of the MoE layers.
        to_a, to_b: share of a token's experts that A, or B, would choose as well, [point, layer]; nan: not recorded.
        load: share of the tokens that each expert gets, [point, layer, expert]; nan: no such expert.
    """

    heading: Heading
    path: str
    t: Sequence[float]
    layers: Sequence[int]
    to_a: Floats
    to_b: Floats
    load: Floats

    @property
    def relative(self) -> Floats:
        """Load over an even share: 1 where all experts of a layer get equally many tokens."""
        return np.asarray(self.load * np.isfinite(self.load).sum(axis=-1, keepdims=True))


def layers_in_words(first: int, last: int) -> str:
    """Layers in words.

    Example:
        >>> layers_in_words(8, 8), layers_in_words(0, 3)
        ('8', '0-3')
    """
    return str(first) if first == last else f"{first}-{last}"


def points_in_words(t: Sequence[float]) -> str:
    """The points of a path: each where they are few.

    Example:
        >>> points_in_words((0.0, 0.5, 1.0)), points_in_words([i / 24 for i in range(25)])
        ('t = 0, 0.5, 1', '25 points from t = 0 to t = 1')
    """
    few = len(t) <= 7
    return f"t = {', '.join(f'{x:.3g}' for x in t)}" if few else f"{len(t)} points from t = {t[0]:.3g} to t = {t[-1]:.3g}"


def _listed(t: Sequence[float]) -> str:
    return points_in_words(t) if len(t) <= 7 else f"{len(t)} points"


def _brackets(interval: Bounds) -> str:
    return "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
