"""What was measured on a path, and the comparison of two paths. Losses are in nats."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from hf_moe_lmc.perplexity import curve as curves
from hf_moe_lmc.perplexity.bootstrap import Bootstrap, Floats, Interval
from hf_moe_lmc.perplexity.curve import NEGLIGIBLE, BarrierCurve
from hf_moe_lmc.perplexity.windows import Windows

Span = tuple[int, int]  # first and last of neighbouring decoder layers


@dataclass(frozen=True, eq=False)
class PathResult:
    """The losses along one path, the barrier on it, and their intervals.

    Attributes:
        t: the grid, ascending from 0 to 1.
        losses: float64 [point, window], nats, summed over the scored tokens of each window.
        windows: what was evaluated on.
        bootstrap: resamples of the windows' documents; shared by all paths of a measurement, which makes them paired.
        right: scored tokens of each window that are the model's first choice, float64 [point, window]; None: not counted.

    Example:
        >>> import torch
        >>> windows = Windows((torch.arange(5), torch.arange(5)), (0, 1), context=5, bos=False, tokens_read=10)
        >>> losses = torch.tensor([[4, 8], [12, 20], [4, 8]], dtype=torch.float64)  # 4 tokens are scored in each window
        >>> path = PathResult((0.0, 0.5, 1.0), losses, windows, Bootstrap((0, 1), (4, 4)))
        >>> path.curve.nll, path.curve.barrier, path.barrier_interval
        ((1.5, 4.0, 1.5), 2.5, (2.0, 3.0))
    """

    t: tuple[float, ...]
    losses: Tensor
    windows: Windows
    bootstrap: Bootstrap
    right: Tensor | None = None

    @cached_property
    def curve(self) -> BarrierCurve:
        """Mean losses, weighted by token, nats per token."""
        means = self.losses.sum(dim=1) / self.windows.scored.sum()
        return BarrierCurve(self.t, tuple(means.tolist()))

    @cached_property
    def resampled(self) -> Floats:
        """Mean losses in each resample, float64 [replicate, point], nats per token."""
        return self.bootstrap.means(self.losses.numpy())

    @cached_property
    def barrier_interval(self) -> Interval | None:
        """Nats per token; None without anything to resample."""
        return self.bootstrap.interval(curves.barrier(self.t, self.resampled))

    @cached_property
    def area_interval(self) -> Interval | None:
        """Nats per token; None without anything to resample."""
        return self.bootstrap.interval(curves.area(self.t, self.resampled))

    @cached_property
    def nll_interval(self) -> list[Interval | None]:
        """Pointwise, for each point, nats per token; None without anything to resample."""
        return self.bootstrap.intervals(self.resampled)

    @cached_property
    def excess_interval(self) -> list[Interval | None]:
        """Of the excess over the line between the ends, each resample over its own line: pointwise, nats per token.

        Errors that the points share cancel, as in the barrier's interval. (0, 0) at the ends; None without anything to
        resample.
        """
        return self.bootstrap.intervals(curves.excess(self.t, self.resampled))

    @property
    def bits_per_byte(self) -> list[float] | None:
        """Of the scored text, at each point; None where its bytes are not known."""
        if self.windows.bytes_scored is None:
            return None
        return (self.losses.sum(dim=1) / (math.log(2) * sum(self.windows.bytes_scored))).tolist()

    @property
    def accuracy(self) -> list[float] | None:
        """Share of the scored tokens that are the model's first choice, at each point; None: not counted."""
        return None if self.right is None else (self.right.sum(dim=1) / self.windows.scored.sum()).tolist()

    def to_dict(self) -> dict[str, Any]:
        """One of the `paths` of report.json."""
        curve = self.curve
        return {
            "t": list(curve.t),
            "nll": list(curve.nll),
            "perplexity": list(curve.perplexity),
            "excess": list(curve.excess),
            "barrier": curve.barrier,
            "barrier_t": curve.barrier_t,
            "area": curve.area,
            "window_nll": (self.losses / self.windows.scored).tolist(),
            "barrier_interval": self.barrier_interval,
            "area_interval": self.area_interval,
            "nll_interval": self.nll_interval,
            "excess_interval": self.excess_interval,
            "barrier_worse_end": curve.barrier_worse_end,
            "barrier_perplexity_ratio": curve.perplexity_ratio,
            "bits_per_byte": self.bits_per_byte,
            "accuracy": self.accuracy,
        }

    def to_layers_dict(self, span: Span) -> dict[str, Any]:
        """One entry of `layerwise` in report.json."""
        first, last = span
        return {
            **({"layer": first} if first == last else {"layers": [first, last]}),
            "barrier": self.curve.barrier,
            "barrier_interval": self.barrier_interval,
            "t": list(self.curve.t),
            "nll": list(self.curve.nll),
        }


@dataclass(frozen=True)
class Summary:
    """Comparison of the aligned path with the naive one, as in report.json. All are None without a naive path.

    Attributes:
        aligned_percent_of_naive: aligned barrier in percent of the naive one; None where that is below NEGLIGIBLE.
        endpoint_change: L(B') - L(B), nats per token; alignment should leave it at rounding level.
        relabelling_floor: |endpoint_change| in a dtype narrower than float32, nats per token. Relabelling experts alone
            changes losses by so much, so smaller differences mean nothing. None in float32.
        difference: naive barrier - aligned barrier, nats per token.
        difference_interval: from paired resamples; None without anything to resample.
    """

    aligned_percent_of_naive: float | None = None
    endpoint_change: float | None = None
    relabelling_floor: float | None = None
    difference: float | None = None
    difference_interval: Interval | None = None

    @classmethod
    def of(cls, aligned: PathResult, naive: PathResult | None, *, narrow: bool) -> Summary:
        """Compares two paths of one measurement; `narrow`: the models ran in less than float32."""
        if naive is None:
            return cls()
        barrier, naive_barrier = aligned.curve.barrier, naive.curve.barrier
        change = aligned.curve.nll[-1] - naive.curve.nll[-1]
        resampled = [curves.barrier(path.t, path.resampled) for path in (naive, aligned)]
        return cls(
            aligned_percent_of_naive=100 * barrier / naive_barrier if naive_barrier >= NEGLIGIBLE else None,
            endpoint_change=change,
            relabelling_floor=abs(change) if narrow else None,
            difference=naive_barrier - barrier,
            difference_interval=aligned.bootstrap.interval(resampled[0] - resampled[1]),
        )

    def to_dict(self) -> dict[str, Any]:
        """The `summary` of report.json."""
        return asdict(self)
