"""How sure the numbers of a path are: a paired bootstrap over the documents of the text.

Tokens of one document are not independent, so whole documents are resampled. All points of all paths see the same resample
(the errors of neighbouring points are nearly equal, and what they share drops out of differences), and each mean is weighted
by token. Intervals are percentile intervals. With one document only, its windows are resampled in its place, which takes
them to be independent and may claim too much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Interval = tuple[float, float]

FEW = 10  # clusters; with fewer, percentile intervals are too narrow
AT_ONCE = 1 << 22  # entries of the table of draws that are in memory at a time


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of the clusters (documents, or windows of the only one).

    Attributes:
        documents: document of each window.
        tokens: scored tokens of each window.
        replicates, level, seed: of the resampling; the same seed gives the same resamples for every path.
    """

    documents: tuple[int, ...]
    tokens: tuple[int, ...]
    replicates: int = 2000
    level: float = 0.95
    seed: int = 0

    @property
    def unit(self) -> str:
        return "document" if len(set(self.documents)) > 1 else "window"

    @cached_property
    def clusters(self) -> NDArray[np.int64]:
        """Cluster of each window, numbered from 0."""
        if self.unit == "window":
            return np.arange(len(self.documents))
        return np.unique(np.array(self.documents), return_inverse=True)[1]

    @property
    def count(self) -> int:
        """Clusters to draw from."""
        return int(self.clusters.max()) + 1

    def sums(self, losses: Floats) -> Floats:
        """Adds up the windows of each cluster: [point, window] -> [point, cluster]."""
        found = np.zeros((len(losses), self.count))
        np.add.at(found.T, self.clusters, losses.T)
        return found

    def means(self, losses: Floats) -> Floats:
        """Token-weighted mean loss of each resample at each point: [replicate, point], nats per token.

        Args:
            losses: summed over each window, [point, window], nats.
        """
        of_clusters = self.sums(losses)
        tokens = self.sums(np.array(self.tokens, dtype=np.float64)[None])[0]
        finite = np.asarray(np.isfinite(of_clusters).all(axis=1))
        parts = [
            np.where(finite, draws @ np.where(finite[:, None], of_clusters, 0).T, np.nan) / (draws @ tokens)[:, None]
            for draws in self._draws()
        ]
        return np.concatenate(parts)

    def _draws(self) -> Iterator[Floats]:
        """How often each cluster was drawn, [some replicates, cluster], with replacement."""
        generator = np.random.default_rng(self.seed)
        size = max(1, AT_ONCE // self.count)
        for first in range(0, self.replicates, size):
            rows = min(size, self.replicates - first)
            drawn = generator.integers(0, self.count, (rows, self.count))
            flat = (drawn + self.count * np.arange(rows)[:, None]).ravel()
            yield np.bincount(flat, minlength=rows * self.count).reshape(rows, self.count).astype(np.float64)

    def interval(self, values: Floats) -> Interval | None:
        """Percentile interval of a statistic over the resamples; None where there was but one cluster to draw.

        Args:
            values: of each resample, [replicate].
        """
        if self.count < 2:
            return None
        tail = (1 - self.level) / 2
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    def intervals(self, values: Floats) -> list[Interval | None]:
        """Pointwise: [replicate, point] -> an interval for each point."""
        return [self.interval(values[:, i]) for i in range(values.shape[1])]

    @property
    def caveat(self) -> str | None:
        """What weakens the intervals here, in words."""
        if self.count < 2:
            return "one document of one window: there is nothing to resample, so no intervals"
        if self.unit == "window":
            return "one document: its windows were resampled as if they were independent; intervals may be too narrow"
        if self.count < FEW:
            return f"{self.count} documents only: intervals may be too narrow"
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "method": "paired percentile bootstrap of token-weighted means",
            "unit": self.unit,
            "clusters": self.count,
            "replicates": self.replicates,
            "level": self.level,
            "seed": self.seed,
            "note": self.caveat,
        }


def half_width(interval: Interval | None) -> float:
    """Of an interval, 0 without one."""
    return 0.0 if interval is None else (interval[1] - interval[0]) / 2
