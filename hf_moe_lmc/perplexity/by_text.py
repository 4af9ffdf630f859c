"""Mean losses by text and on the mean of the texts, with paired resamples of the documents within each text.

The mean of the texts is not weighted: a text of few tokens counts as much as one of many. Within a text, means are weighted
by token. A resample draws the documents of each text anew, and never exchanges documents between texts (a stratified
bootstrap: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.2). All models get the same
resamples, so that differences between them are paired.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hf_moe_lmc.perplexity.bootstrap import Bootstrap, Floats, Interval, expanded_tail, percentiles
from hf_moe_lmc.perplexity.windows import Windows

FOLDS = 5  # at most, of the documents of a text
DECIDING = 5  # clusters; resamples of fewer reach the true mean too seldom: of 4 equal signs one in 8 is chance


@dataclass(frozen=True, eq=False)
class TextMeans:
    """Means over the windows of each text, and over the texts.

    Where a method takes the name of a text, None stands for the unweighted mean of all texts.

    Attributes:
        windows: what was evaluated on.
        replicates, level, seed: of the resamples, as in `Bootstrap`; the first text has its resamples.

    Example:
        >>> import torch
        >>> rows, texts = tuple(torch.arange(5) for _ in range(3)), ("prose", "prose", "code")
        >>> means = TextMeans(Windows(rows, (0, 0, 1), 5, False, 15, texts=texts))
        >>> losses = np.array([[8.0, 8.0, 4.0]])  # nats of one model; 4 tokens in each window
        >>> [means.of(name, losses).tolist() for name in ("prose", "code", None)]
        [[2.0], [1.0], [1.5]]
    """

    windows: Windows
    replicates: int = 2000
    level: float = 0.95
    seed: int = 0

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the texts, in their order."""
        return tuple(dict.fromkeys(self.windows.text_of))

    @cached_property
    def members(self) -> dict[str, NDArray[np.int64]]:
        """Numbers of the windows of each text."""
        owners = np.array(self.windows.text_of)
        return {name: np.flatnonzero(owners == name) for name in self.names}

    @cached_property
    def bootstraps(self) -> dict[str, Bootstrap]:
        """The resamples of each text; texts are resampled independently."""
        documents, tokens = np.array(self.windows.documents), self.windows.scored.int().numpy()
        return {
            name: Bootstrap(
                tuple(documents[own].tolist()), tuple(tokens[own].tolist()), self.replicates, self.level, self.seed + number
            )
            for number, (name, own) in enumerate(self.members.items())
        }

    def of(self, text: str | None, losses: Floats) -> Floats:
        """Mean loss of each model: float64 [model], nats per token.

        Args:
            losses: float64 [model, window], nats, summed over each window.
        """
        if text is None:
            return np.asarray(np.mean([self.of(name, losses) for name in self.names], axis=0))
        own = self.members[text]
        return np.asarray(losses[:, own].sum(axis=1) / sum(self.bootstraps[text].tokens))

    def resampled(self, text: str | None, losses: Floats) -> Floats:
        """Mean loss of each model in each resample: float64 [replicate, model], nats per token."""
        if text is not None:
            return self.bootstraps[text].means(losses[:, self.members[text]])
        total = np.zeros((self.replicates, len(losses)))
        for name in self.names:
            total += self.resampled(name, losses)
        return total / len(self.names)

    def clusters(self, text: str | None) -> int:
        """How many documents, or windows of the only document, are resampled; of all texts the least."""
        return min(self.bootstraps[name].count for name in ([text] if text is not None else self.names))

    def interval(self, text: str | None, values: Floats) -> Interval | None:
        """Percentile interval of a statistic; None where a text has nothing to resample.

        Args:
            values: the statistic in each resample, [replicate].
        """
        return percentiles(values, (1 - self.level) / 2) if self.clusters(text) > 1 else None

    def expanded_interval(self, text: str | None, values: Floats) -> Interval | None:
        """As `interval`, wider for few documents, see `expanded_tail`: for decisions. None with fewer than DECIDING."""
        clusters = self.clusters(text)
        return percentiles(values, expanded_tail(self.level, clusters)) if clusters >= DECIDING else None

    def folds(self) -> NDArray[np.int64]:
        """Number of the fold of each window: those of a cluster together, the clusters of each text dealt out in turn."""
        found = np.zeros(len(self.windows.rows), dtype=np.int64)
        for name, own in self.members.items():
            bootstrap = self.bootstraps[name]
            found[own] = bootstrap.clusters % min(FOLDS, bootstrap.count)
        return found

    @property
    def caveats(self) -> list[str]:
        """What weakens the intervals, in words, with the names of texts where there are several."""
        by_caveat: dict[str, list[str]] = {}
        for name, bootstrap in self.bootstraps.items():
            caveat = bootstrap.caveat
            if 1 < bootstrap.count < DECIDING:
                kind = "documents" if bootstrap.unit == "document" else "windows of one document"
                caveat = f"{bootstrap.count} {kind} are too few to decide on a difference"
            if caveat is not None:
                by_caveat.setdefault(caveat, []).append(name)
        if len(self.names) == 1:
            return list(by_caveat)
        return [f"{', '.join(names)}: {caveat}" for caveat, names in by_caveat.items()]
