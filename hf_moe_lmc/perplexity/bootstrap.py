"""Intervals of means: a paired percentile bootstrap over the documents of a text.

Tokens of one document are not independent, so whole documents are resampled: they are the clusters. All points of all paths
get the same resamples. Errors of neighbouring points are nearly equal, and what they share cancels in differences. Means are
weighted by token.

A text of one document has its windows resampled. That takes windows to be independent, and intervals may be too narrow.

Sources: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. For few documents: Hesterberg, What
Teachers Should Know about the Bootstrap (2015), section 5.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

Floats = NDArray[np.float64]
Interval = tuple[float, float]  # low, high

FEW_CLUSTERS = 20  # percentile intervals over fewer are too narrow
BLOCK_ENTRIES = 1 << 22  # of the table [replicate, cluster] that is in memory at a time


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of the clusters, with replacement.

    Attributes:
        documents: document of each window.
        tokens: scored tokens of each window.
        replicates: number of resamples.
        level: confidence level of the intervals.
        seed: the same seed gives the same resamples.

    Example:
        >>> bootstrap = Bootstrap(documents=(0, 0, 1), tokens=(10, 10, 20))
        >>> bootstrap.unit, bootstrap.count
        ('document', 2)
        >>> means = bootstrap.means(np.array([[10.0, 10.0, 60.0]]))  # documents of 1 and of 3 nats per token
        >>> means.shape, bootstrap.interval(means[:, 0])
        ((2000, 1), (1.0, 3.0))
    """

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    replicates: int = 2000
    level: float = 0.95
    seed: int = 0

    @property
    def unit(self) -> str:
        """Kind of the clusters: `document`, or `window` of the only document."""
        return "document" if len(set(self.documents)) > 1 else "window"

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """Cluster of each window, numbered from 0."""
        if self.unit == "window":
            return np.arange(len(self.documents))
        return np.unique(np.array(self.documents), return_inverse=True)[1]

    @property
    def count(self) -> int:
        """Number of clusters."""
        return int(self.clusters.max()) + 1

    def cluster_sums(self, values: Floats) -> Floats:
        """Sums over the windows of each cluster: [point, window] -> [point, cluster]."""
        sums = np.zeros((len(values), self.count))
        np.add.at(sums.T, self.clusters, values.T)
        return sums

    def means(self, losses: Floats) -> Floats:
        """Mean loss of each resample at each point, weighted by token: float64 [replicate, point], nats per token.

        A point with a loss that is not finite has nan in all resamples.

        Args:
            losses: float64 [point, window], nats, summed over each window.
        """
        sums = self.cluster_sums(losses)
        tokens = self.cluster_sums(np.array(self.tokens, dtype=np.float64)[None])[0]
        finite = np.asarray(np.isfinite(sums).all(axis=1))
        usable = np.where(finite[:, None], sums, 0).T
        blocks = [np.where(finite, counts @ usable, np.nan) / (counts @ tokens)[:, None] for counts in self._counts()]
        return np.concatenate(blocks)

    def _counts(self) -> Iterator[Floats]:
        """How often each resample holds each cluster, in blocks: float64 [some replicates, cluster]."""
        generator = np.random.default_rng(self.seed)
        block = max(1, BLOCK_ENTRIES // self.count)
        for first in range(0, self.replicates, block):
            rows = min(block, self.replicates - first)
            members = generator.integers(0, self.count, (rows, self.count))
            flat = (members + self.count * np.arange(rows)[:, None]).ravel()
            yield np.bincount(flat, minlength=rows * self.count).reshape(rows, self.count).astype(np.float64)

    def interval(self, values: Floats) -> Interval | None:
        """Percentile interval of a statistic; None with a single cluster, where there is nothing to resample.

        Args:
            values: the statistic in each resample, [replicate].
        """
        if self.count < 2:
            return None
        return percentiles(values, (1 - self.level) / 2)

    def intervals(self, values: Floats) -> list[Interval | None]:
        """Pointwise: [replicate, point] -> an interval for each point."""
        return [self.interval(values[:, i]) for i in range(values.shape[1])]

    @property
    def caveat(self) -> str | None:
        """What weakens the intervals, in words; None: nothing known."""
        if self.count < 2:
            return "one document of one window: there is nothing to resample, so no intervals"
        if self.unit == "window":
            return "one document: its windows were resampled as if they were independent; intervals may be too narrow"
        if self.count < FEW_CLUSTERS:
            return f"{self.count} documents only: intervals may be too narrow"
        return None

    def describe(self) -> dict[str, Any]:
        """The `statistics` of report.json."""
        return {
            "method": "paired percentile bootstrap of token-weighted means",
            "unit": self.unit,
            "clusters": self.count,
            "replicates": self.replicates,
            "level": self.level,
            "seed": self.seed,
            "note": self.caveat,
        }


def percentiles(values: Floats, tail: float) -> Interval:
    """The interval that leaves out a share `tail` of the values at either end."""
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def expanded_tail(level: float, clusters: int) -> float:
    """Share to leave out at either end so that percentile intervals over few clusters hold what they promise.

    The percentile interval of a mean is that of a normal distribution with the variance divided by n. The expanded one has
    the length of Student's interval: Phi(-sqrt(n / (n - 1)) t), with the quantile t of n - 1 degrees of freedom.

    Example:
        >>> [round(expanded_tail(0.95, clusters), 4) for clusters in (5, 20, 1000)]
        [0.001, 0.0159, 0.0248]
    """
    quantile = float(stdtrit(clusters - 1, (1 + level) / 2))
    return float(ndtr(-math.sqrt(clusters / (clusters - 1)) * quantile))


def half_width(interval: Interval | None) -> float:
    """Half the width of an interval; 0 without one.

    Example:
        >>> half_width((1.0, 1.5)), half_width(None)
        (0.25, 0.0)
    """
    return 0.0 if interval is None else (interval[1] - interval[0]) / 2
