"""A merge beside what it has to be compared with: both parents, other merges and the ensemble, on each text and on their mean.

The share of the naive barrier that is left says nothing about use: whoever returns the better parent leaves none of it. So
every merge stands beside its parents here, each by itself, and differences have paired intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from hf_moe_lmc.perplexity.bootstrap import Interval
from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.windows import Windows

PARENTS = ("a", "b")
MERGES = ("naive", "aligned", "repaired", "ensemble")  # what is compared with the parents
MODELS = (*PARENTS, *MERGES)
KINDS = ("logits", "probabilities")  # what is averaged in the ensembles of both parents


@dataclass(frozen=True)
class Difference:
    """One model's loss less another's, on the same tokens.

    Attributes:
        value: nats per token; nan where a loss is not finite.
        interval: from paired resamples, expanded for few documents; None with too few of them.

    Example:
        >>> below = Difference(-0.017, (-0.021, -0.012))
        >>> below.sign(), below.sign(floor=0.02), Difference(-0.017, (-0.04, 0.01)).sign(), Difference(-0.017, None).sign()
        (-1, 0, 0, 0)
    """

    value: float
    interval: Interval | None

    def sign(self, floor: float = 0.0) -> int:
        """-1 below, 1 above; 0 where the interval holds 0, where there is none, and where the difference is at most `floor`."""
        if self.interval is None or not abs(self.value) > floor:
            return 0
        low, high = self.interval
        return 1 if low > 0 else -1 if high < 0 else 0

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "interval": self.interval}


@dataclass(frozen=True)
class Comparison:
    """Losses on one text, or on the mean of the texts, and the differences of merges from the parents.

    Attributes:
        losses: by the names of MODELS, nats per token; None: not measured.
        differences: of each measured merge, from `a`, `b` and, where it is another merge, `naive`.

    Example:
        >>> losses = {"a": 3.0, "b": 2.5, "naive": 4.0, "aligned": 2.6, "repaired": None, "ensemble": None}
        >>> found = Comparison(losses, {"aligned": {"b": Difference(0.1, (0.08, 0.12))}})
        >>> found.better, found.worse, found.parents, found.to_better("aligned").value
        ('b', 'a', 2.75, 0.1)
    """

    losses: Mapping[str, float | None]
    differences: Mapping[str, Mapping[str, Difference]]

    def loss(self, model: str) -> float:
        """Nats per token; nan where it was not measured."""
        found = self.losses[model]
        return math.nan if found is None else found

    @property
    def better(self) -> str:
        """The parent of the lower loss, `a` where both are equal. One whose loss is not finite is the worse one."""
        a, b = (loss if math.isfinite(loss) else math.inf for loss in map(self.loss, PARENTS))
        return "b" if b < a else "a"

    @property
    def worse(self) -> str:
        """The other parent."""
        return "a" if self.better == "b" else "b"

    @property
    def parents(self) -> float:
        """Mean loss of both parents, nats per token."""
        return (self.loss("a") + self.loss("b")) / 2

    def to_better(self, merge: str) -> Difference:
        """The loss of a merge less that of the better parent."""
        return self.differences[merge][self.better]

    def to_dict(self) -> dict[str, Any]:
        """One text, or the mean, of `references` in report.json."""
        return {
            **self.losses,
            "parents": self.parents,
            "better": self.better,
            "differences": {
                merge: {name: difference.to_dict() for name, difference in found.items()}
                | {"better": self.to_better(merge).to_dict()}
                for merge, found in self.differences.items()
            },
        }


@dataclass(frozen=True, eq=False)
class References:
    """Losses of two parents and of their merges at one t, by text and on the unweighted mean of the texts.

    Attributes:
        t: of the merges; 0 is A, 1 is B.
        models: by the names of MODELS, float64 [window], nats, summed over each window: `a` and `b` are each parent by
            itself, under its own configuration and over its own vocabulary. What is missing was not measured.
        means: of the texts.

    Example:
        >>> import torch
        >>> windows = Windows(tuple(torch.arange(5) for _ in range(6)), tuple(range(6)), 5, False, 30)
        >>> sums = {"a": [8, 8, 9] * 2, "b": [12] * 6, "aligned": [6, 6, 7] * 2}  # 4 tokens in each window
        >>> models = {name: torch.tensor(losses, dtype=torch.float64) for name, losses in sums.items()}
        >>> found = References(0.5, models, TextMeans(windows)).mean
        >>> found.better, found.to_better("aligned")
        ('a', Difference(value=-0.5, interval=(-0.5, -0.5)))
    """

    t: float
    models: Mapping[str, Tensor]
    means: TextMeans

    @property
    def several(self) -> bool:
        """Whether there are several texts."""
        return len(self.means.names) > 1

    @cached_property
    def texts(self) -> dict[str, Comparison]:
        """On each text, by its name."""
        return {name: self._on(name) for name in self.means.names}

    @cached_property
    def mean(self) -> Comparison:
        """On the unweighted mean of the texts."""
        return self._on(None) if self.several else next(iter(self.texts.values()))

    def _on(self, text: str | None) -> Comparison:
        values = self.means.of(text, np.stack([losses.numpy() for losses in self.models.values()]))
        losses = dict(zip(self.models, values.tolist(), strict=True))
        pairs = [
            (merge, other)
            for merge in MERGES
            for other in (*PARENTS, "naive")
            if merge in self.models and other in self.models and other != merge
        ]
        differences: dict[str, dict[str, Difference]] = {}
        for (merge, other), found in zip(pairs, differences_on(text, self.means, self.models, pairs), strict=True):
            differences.setdefault(merge, {})[other] = found
        return Comparison({name: losses.get(name) for name in MODELS}, differences)

    def to_dict(self) -> dict[str, Any]:
        """The `references` of report.json."""
        return {
            "t": self.t,
            "texts": {name: found.to_dict() for name, found in self.texts.items()},
            "mean": self.mean.to_dict(),
        }


def differences_on(
    text: str | None, means: TextMeans, models: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]
) -> list[Difference]:
    """The loss of the first model of each pair less that of the second, on a text or with None on the mean of the texts."""
    if not pairs:
        return []
    # taken window by window: equal models differ by nothing at all
    windows = np.stack([(models[one] - models[other]).numpy() for one, other in pairs])
    resampled = means.resampled(text, windows)
    return [
        Difference(value, means.expanded_interval(text, resampled[:, i]))
        for i, value in enumerate(means.of(text, windows).tolist())
    ]


def references(models: Mapping[str, Tensor], windows: Windows, *, t: float) -> References:
    """See `References`; what was not measured may be missing.

    Raises:
        KeyError: a model of another name than those of MODELS, or a parent is missing.
    """
    if strange := models.keys() - set(MODELS):
        raise KeyError(f"unknown models {', '.join(sorted(strange))}")
    ordered = {name: models[name] for name in MODELS if name in models or name in PARENTS}
    return References(t, ordered, TextMeans(windows))
