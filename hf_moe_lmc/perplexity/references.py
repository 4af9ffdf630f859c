"""A merge beside what it has to be compared with: both parents, other merges and the ensemble, on each text and on their mean.

The share of the naive barrier that is left says nothing about use: whoever returns the better parent leaves none of it. So
every merge stands beside its parents here, each by itself, and differences have paired intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.perplexity.bootstrap import Interval
from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.windows import Windows

PARENTS = ("a", "b")
MERGES = ("naive", "aligned", "repaired", "ensemble")  # what is compared with the parents
REPAIRED = "repaired"  # a merge that has left the straight line; a path of these
MODELS = (*PARENTS, *MERGES)
KINDS = ("logits", "probabilities")  # what is averaged in the ensembles of both parents
BY_TEXT = "by_text"  # where the lower ensemble is another on another text
MEASURES = ("accuracy", "cloze")  # shares of right answers


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
    """One figure of the models on one text, or on the mean of the texts, and the differences of merges from the parents.

    Attributes:
        values: by the names of MODELS; None: not measured. Losses are in nats per token.
        differences: of each measured merge, from `a`, `b` and, where it is another merge, `naive`.
        higher: the figure is the share of right answers, of which more is better.

    Example:
        >>> losses = {"a": 3.0, "b": 2.5, "naive": 4.0, "aligned": 2.6, "repaired": None, "ensemble": None}
        >>> found = Comparison(losses, {"aligned": {"b": Difference(0.1, (0.08, 0.12))}})
        >>> found.better, found.worse, found.parents, found.to_better("aligned").value
        ('b', 'a', 2.75, 0.1)
        >>> Comparison({"a": 0.5, "b": 0.25}, {}, higher=True).better
        'a'
    """

    values: Mapping[str, float | None]
    differences: Mapping[str, Mapping[str, Difference]]
    higher: bool = False

    def loss(self, model: str) -> float:
        """The figure of a model, a loss in nats per token unless `higher`; nan where it was not measured."""
        found = self.values[model]
        return math.nan if found is None else found

    @property
    def better(self) -> str:
        """The better parent, `a` where both are equal. One whose figure is not finite is the worse one."""
        worst = -math.inf if self.higher else math.inf
        a, b = (value if math.isfinite(value) else worst for value in map(self.loss, PARENTS))
        return "b" if (b > a if self.higher else b < a) else "a"

    @property
    def worse(self) -> str:
        """The other parent."""
        return "a" if self.better == "b" else "b"

    @property
    def parents(self) -> float:
        """Mean of both parents."""
        return (self.loss("a") + self.loss("b")) / 2

    def to_better(self, merge: str) -> Difference:
        """The figure of a merge less that of the better parent."""
        return self.differences[merge][self.better]

    def to_dict(self) -> dict[str, Any]:
        """One text, or the mean, of `references` in report.json."""
        return {
            **self.values,
            "parents": self.parents,
            "better": self.better,
            "differences": {
                merge: {name: difference.to_dict() for name, difference in found.items()}
                | {"better": self.to_better(merge).to_dict()}
                for merge, found in self.differences.items()
            },
        }


@dataclass(frozen=True, eq=False)
class Shares:
    """Right answers of the models, counted in units: windows of predicted tokens, or single questions.

    Attributes:
        models: by the names of MODELS, float64 [unit]; what is missing was not measured.
        ensembles: by KINDS, float64 [unit]; empty: not measured.
        means: of the texts, over these units.
    """

    models: Mapping[str, Tensor]
    ensembles: Mapping[str, Tensor]
    means: TextMeans


@dataclass(frozen=True, eq=False)
class Beside:
    """What stands beside the losses of parents and merges, at the same t.

    Attributes:
        ensembles: losses of the two parents' ensembles by KINDS, float64 [window], nats, summed over each window.
        shares: by the words of MEASURES.
    """

    ensembles: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Mapping[str, Shares] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class References:
    """Losses of two parents and of their merges at one t, by text and on the unweighted mean of the texts.

    Of the two ensembles, `ensemble` is on each text the one of the lower loss, and its right answers are of the same one.

    Attributes:
        t: of the merges, and the weight of B in the ensembles; 0 is A, 1 is B.
        models: by the names of MODELS, float64 [window], nats, summed over each window: `a` and `b` are each parent by
            itself, under its own configuration and over its own vocabulary. What is missing was not measured.
        means: of the texts.
        beside: right answers and ensembles.

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
    beside: Beside = field(default_factory=Beside)

    @property
    def several(self) -> bool:
        """Whether there are several texts."""
        return len(self.means.names) > 1

    @property
    def scopes(self) -> list[tuple[str, str | None]]:
        """Each text by its name, then, where there are several, their mean: its title, and what `means` calls it."""
        return [*((name, name) for name in self.means.names), *([("mean", None)] if self.several else [])]

    @cached_property
    def texts(self) -> dict[str, Comparison]:
        """Losses on each text, by its name."""
        return {name: self._losses(name) for name in self.means.names}

    @cached_property
    def mean(self) -> Comparison:
        """Losses on the unweighted mean of the texts."""
        return self._losses(None) if self.several else next(iter(self.texts.values()))

    @cached_property
    def ensemble_of(self) -> dict[str, str]:
        """Which of the ensembles `ensemble` is on each text, one of KINDS; empty: not measured."""
        measured = self.beside.ensembles
        if not measured:
            return {}
        losses = np.stack([measured[kind].numpy() for kind in KINDS])
        by_text = {name: np.nan_to_num(self.means.of(name, losses), nan=np.inf) for name in self.means.names}
        return {name: KINDS[int(values.argmin())] for name, values in by_text.items()}

    def shares(self, measure: str, text: str | None) -> Comparison | None:
        """Right answers on a text, or with None on the mean of the texts; None where they were not counted.

        Args:
            measure: one of MEASURES.
        """
        found = self.beside.shares.get(measure)
        if found is None:
            return None
        models = dict(found.models)
        if found.ensembles:
            models["ensemble"] = self._lower(found.ensembles, found.means)
        return _compared(text if self.several else self.means.names[0], found.means, models, higher=True)

    def _losses(self, text: str | None) -> Comparison:
        models = dict(self.models)
        if self.beside.ensembles:
            models["ensemble"] = self._lower(self.beside.ensembles, self.means)
        return _compared(text, self.means, models)

    def _lower(self, ensembles: Mapping[str, Tensor], means: TextMeans) -> Tensor:
        """In each unit, that of the ensemble which is taken on its text."""
        found = ensembles[KINDS[0]].clone()
        for text, kind in self.ensemble_of.items():
            own = torch.from_numpy(means.members[text])
            found[own] = ensembles[kind][own]
        return found

    def _on(self, text: str | None) -> dict[str, Any]:
        """One text, or the mean, of `references` in report.json."""
        losses, kinds = (self.mean if text is None else self.texts[text]), self.ensemble_of
        taken = set(kinds.values()) if text is None else {kinds[text]} if kinds else set()
        both = {kind: float(self.means.of(text, value.numpy()[None])[0]) for kind, value in self.beside.ensembles.items()}
        shares = {measure: self.shares(measure, text) for measure in MEASURES}
        return {
            **losses.to_dict(),
            "ensemble_of": BY_TEXT if len(taken) > 1 else next(iter(taken), None),
            "ensembles": both or None,
            **{measure: found and found.to_dict() for measure, found in shares.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """The `references` of report.json."""
        return {"t": self.t, "texts": {name: self._on(name) for name in self.means.names}, "mean": self._on(None)}


def _compared(text: str | None, means: TextMeans, models: Mapping[str, Tensor], *, higher: bool = False) -> Comparison:
    """One figure of some models on a text, or with None on the mean of the texts; float64 [unit] by model."""
    values = dict(zip(models, means.of(text, np.stack([each.numpy() for each in models.values()])).tolist(), strict=True))
    pairs = [
        (merge, other)
        for merge in MERGES
        for other in (*PARENTS, "naive")
        if merge in models and other in models and other != merge
    ]
    differences: dict[str, dict[str, Difference]] = {}
    for (merge, other), found in zip(pairs, differences_on(text, means, models, pairs), strict=True):
        differences.setdefault(merge, {})[other] = found
    return Comparison({name: values.get(name) for name in MODELS}, differences, higher)


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


def references(models: Mapping[str, Tensor], windows: Windows, *, t: float, beside: Beside | None = None) -> References:
    """See `References`; what was not measured may be missing.

    A repaired merge needs nothing but its losses under the name `repaired`.

    Raises:
        KeyError: a model of another name than those of MODELS, or a parent is missing.
    """
    if strange := models.keys() - set(MODELS):
        raise KeyError(f"unknown models {', '.join(sorted(strange))}")
    ordered = {name: models[name] for name in MODELS if name in models or name in PARENTS}
    return References(t, ordered, TextMeans(windows), beside or Beside())
