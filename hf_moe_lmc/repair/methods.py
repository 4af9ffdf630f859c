"""Ways to repair a merge, as values: where a method starts, and what it fits on calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Start = Literal["aligned", "norms", "crossover"]
FitKind = Literal["ridge", "regmean"]

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0)  # lambda of the ridge regression


@dataclass(frozen=True)
class Method:
    """One way to repair a merge.

    Attributes:
        start: `aligned`: the point of the path; `norms`, `crossover`: that of the repair without data.
        fit: what is fitted on calibration text; None: nothing.
        strength: lambda of the ridge regression.

    Example:
        >>> print(Method("crossover", "ridge", 0.1))
        crossover+ridge (lambda 0.1)
    """

    start: Start = "aligned"
    fit: FitKind | None = None
    strength: float | None = None

    def __str__(self) -> str:
        named = [self.start] if self.start != "aligned" or self.fit is None else []
        words = "+".join([*named, *([self.fit] if self.fit else [])])
        return words if self.strength is None else f"{words} (lambda {self.strength:g})"

    @property
    def name(self) -> str:
        """As `--repair` calls it, `aligned` for none."""
        return str(self).partition(" ")[0]


ALIGNED = Method()


def methods_of(repair: str) -> tuple[Method, ...]:
    """The candidates of `--repair`.

    Example:
        >>> [str(method) for method in methods_of("norms")], len(methods_of("ridge")), len(methods_of("auto"))
        (['norms'], 5, 13)
    """
    ridges = tuple(Method("aligned", "ridge", strength) for strength in STRENGTHS)
    crossed = tuple(Method("crossover", "ridge", strength) for strength in STRENGTHS)
    known: dict[str, tuple[Method, ...]] = {
        "norms": (Method("norms"),),
        "crossover": (Method("crossover"),),
        "ridge": ridges,
        "crossover+ridge": crossed,
        "regmean": (Method("aligned", "regmean"),),
    }
    return known[repair] if repair in known else tuple(method for methods in known.values() for method in methods)
