"""Is the merge better than what there was, and at which t? The answer as a value, in numbers and in sentences.

`merge_verdict` is for a merge at a given t, `path_verdict` for a path whose t is still to be chosen. Both give references,
which are losses of named models, and what can be said of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.perplexity import curve as curves
from hf_moe_lmc.perplexity import wording
from hf_moe_lmc.perplexity.bootstrap import Interval
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.least import LeastLoss
from hf_moe_lmc.perplexity.references import (
    PARENTS,
    REPAIRED,
    Beside,
    Comparison,
    Difference,
    References,
    differences_on,
    references,
)
from hf_moe_lmc.perplexity.windows import Windows

MIDPOINT = 0.5  # t of the references of a path
LineLosses = tuple[tuple[float, ...], Tensor]  # t ascending, and float64 [point, window]
ROUNDING = 1e-4  # nats per token; smaller differences are no finding in any dtype
STANDINGS = {
    "below_both": "below both parents",
    "between": "above the better parent and below the other",
    "above_better": "above the better parent, not told apart from the other",
    "worse_than_either": "above both parents",
    "undecided": "not told apart from the better parent",
    "parent": "a parent itself, at an end of the path",
    "not_finite": "a loss is not finite",
}


@dataclass(frozen=True)
class MergedAt:
    """The merge that a report is about.

    Attributes:
        t: 0 is A, 1 is B.
        path: that it lies on: `aligned`, or `naive` where B was taken as it is.
        chosen: t is that of the least loss on this text; else it was given.
    """

    t: float
    path: str = "aligned"
    chosen: bool = False


@dataclass(frozen=True, eq=False)
class Verdict:
    """Whether a merge is better than its parents. Losses are in nats per token, on the unweighted mean of the texts.

    Attributes:
        references: losses at the merge's own t, or halfway along a path.
        compared: losses at the t that the sentences name.
        merge: the merge that the sentences are about, one of MERGES.
        floor: nats per token; a difference of at most so much is no finding.
        least: the point of the least loss on the path `searched`; None: t was given.
        paths: the straight lines by name, each on its grid: float64 [point, window], nats summed over each window; empty: t
            was given.
        remarks: further reasons for caution, in words.
        searched: the path of `least`; None: that of `merge`.
        left: what `repaired` is called in words, `repaired` or `widened`.

    Example:
        >>> import torch
        >>> windows = Windows(tuple(torch.arange(5) for _ in range(40)), tuple(range(40)), 5, False, 200)
        >>> level = torch.linspace(8, 12, 40, dtype=torch.float64)  # nats of each window, which has 4 tokens
        >>> models = {"a": level, "b": level + 1, "naive": level + 4, "aligned": level - torch.linspace(0.1, 0.3, 40)}
        >>> verdict = merge_verdict(models, windows, t=0.3)
        >>> verdict.standing, verdict.title
        ('below_both', 'at t = 0.3: 0.050 [0.045, 0.055] nats below the better parent (A)')
    """

    references: References
    compared: References
    merge: str = "aligned"
    floor: float = ROUNDING
    least: LeastLoss | None = None
    paths: Mapping[str, LineLosses] | None = None
    remarks: Sequence[str] = ()
    searched: str | None = None
    left: str = REPAIRED

    @property
    def t(self) -> float:
        """Of the merge that the sentences are about."""
        return self.compared.t

    @property
    def mean(self) -> Comparison:
        """Losses and differences at that t, on the mean of the texts."""
        return self.compared.mean

    @cached_property
    def itself(self) -> str | None:
        """The parent that the merge is: at an end of the path, where the path has that parent as it is by itself.

        None: the merge lies between the ends, or the configuration or vocabulary of the path make the end another model.
        """
        models, end = self.compared.models, {0.0: "a", 1.0: "b"}.get(self.t)
        if end is None or not torch.equal(models[end], models.get("naive", models[self.merge])):
            return None
        rounding = self.floor if self.merge == "aligned" else 0.0  # B in the coordinates of A; a repaired end is another model
        return end if abs(self.mean.differences[self.merge][end].value) <= rounding else None

    @cached_property
    def held_out(self) -> dict[str, Difference] | None:
        """The loss at t chosen on other documents, less that of each parent. See `least`.

        None where t was not chosen, and where the merge is a parent itself.
        """
        if self.least is None or self.least.chosen != self.t or self.least.cross_fitted is None or self.itself:
            return None
        if self.searched not in (None, self.merge):
            return None  # another path has chosen t
        models = {**{side: self.compared.models[side] for side in PARENTS}, "chosen": self.least.cross_fitted}
        found = differences_on(None, self.compared.means, models, [("chosen", side) for side in PARENTS])
        return dict(zip(PARENTS, found, strict=True))

    @property
    def standing(self) -> str:
        """One of STANDINGS. Intervals of the differences decide; `below_both` has to hold for `held_out`, too."""
        standing = self._standing()
        return "undecided" if standing == "below_both" and self._fails_held_out else standing

    def _standing(self) -> str:
        found = self.mean
        if not all(math.isfinite(found.loss(name)) for name in (self.merge, *PARENTS)):
            return "not_finite"
        if self.itself:
            return "parent"
        of_merge = found.differences[self.merge]
        better, worse = (of_merge[side].sign(self.floor) for side in (found.better, found.worse))
        if better < 0 and worse < 0:
            return "below_both"
        if better > 0:
            return {1: "worse_than_either", 0: "above_better", -1: "between"}[worse]
        return "undecided"

    @property
    def _fails_held_out(self) -> bool:
        found = self.held_out
        return found is not None and not all(difference.sign(self.floor) < 0 for difference in found.values())

    @cached_property
    def barriers(self) -> dict[str, tuple[BarrierCurve, Interval | None]]:
        """Curve on the mean of the texts, and interval of its barrier, of each straight line; empty where t was given."""
        found = {}
        means, paths = self.compared.means, self.paths or {}
        for name, (t, losses) in paths.items():
            curve = BarrierCurve(t, tuple(means.of(None, losses.numpy()).tolist()))
            resampled = curves.barrier(curve.t, means.resampled(None, losses.numpy()))
            found[name] = curve, means.interval(None, resampled)
        return found

    @property
    def at_end(self) -> str | None:
        """`A` or `B` where the loss is least at an end of the path: no merge on it is better. Otherwise None."""
        chosen = None if self.least is None else self.least.chosen
        return None if chosen is None else {0.0: "A", 1.0: "B"}.get(chosen)

    @cached_property
    def sentences(self) -> list[str]:
        """The t of the least loss, the merge there against both parents, and the barriers; each where it applies."""
        found = []
        if self.least is not None:
            found = [wording.least_loss(self.least, self.references, self._called(self.searched or self.merge))]
        if self.standing == "parent":
            assert self.itself is not None
            found.append(self._of_parent(self.itself))
        else:
            subject = f"The {f'{self.left} ' if self.merge == REPAIRED else ''}merge at {wording.place(self.t)}"
            held_out = self.held_out if self._standing() == "below_both" and self._fails_held_out else None
            found.append(
                wording.of_merge(subject, self.merge, self.standing, self.mean, held_out, several=self.references.several)
            )
        return [*found, wording.barriers(self.barriers)] if self.barriers else found

    def _called(self, merge: str) -> str:
        return self.left if merge == REPAIRED else merge

    def _of_parent(self, parent: str) -> str:
        """Of a merge that is a parent itself: the best merge between the ends, or where t was given the other parent."""
        about: dict[str, Any] = {"floor": self.floor, "several": self.references.several}
        if self.least is None:
            other = "b" if parent == "a" else "a"
            return wording.of_parent(self.t, parent, self.mean.differences[self.merge][other], **about)
        between = self.least.between
        if between is None:
            return wording.none_below(self.t, parent, None, None, **about)
        models = {"between": self.least.losses[between], "end": self.compared.models[parent]}
        (above,) = differences_on(None, self.compared.means, models, [("between", "end")])
        return wording.none_below(self.t, parent, self.least.t[between], above, **about)

    @property
    def title(self) -> str:
        """One line, to stand above a plot."""
        return wording.title(
            self.t, self.standing, self.mean, self.merge, texts=len(self.compared.means.names), at_end=self.at_end
        )

    @property
    def cautions(self) -> list[str]:
        """What a reader has to know before relying on the sentences, in words."""
        return [*self.compared.means.caveats, *self._above_simpler(), *self.remarks]

    def _above_simpler(self) -> list[str]:
        """Which merges that took less are measurably better."""
        models, simpler = self.compared.models, {"aligned": ["naive"], REPAIRED: ["naive", "aligned"]}
        others = [name for name in simpler.get(self.merge, ()) if name in models]
        found = differences_on(None, self.compared.means, models, [(self.merge, other) for other in others])
        return [
            f"the {self._called(self.merge)} merge at {wording.place(self.t)} is {wording.size(above, unit=True)} above the "
            f"{other} one"
            for other, above in zip(others, found, strict=True)
            if above.sign(self.floor) > 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """The `verdict` of report.json."""
        least, held_out = self.least, self.held_out
        return {
            "sentences": self.sentences,
            "cautions": self.cautions,
            "title": self.title,
            "merge": self.merge,
            "standing": self.standing,
            "floor": self.floor,
            "least": None if least is None else least.to_dict(),
            "held_out": None if held_out is None else {side: found.to_dict() for side, found in held_out.items()},
            "barriers": {
                name: {"barrier": curve.barrier, "interval": interval, "t": curve.barrier_t, "area": curve.area}
                for name, (curve, interval) in self.barriers.items()
            },
            **self.compared.to_dict(),
        }


def merge_verdict(
    models: Mapping[str, Tensor],
    windows: Windows,
    *,
    t: float,
    merge: str = "aligned",
    floor: float = ROUNDING,
    remarks: Sequence[str] = (),
    beside: Beside | None = None,
    left: str = REPAIRED,
) -> Verdict:
    """References and verdict of a merge at its own t.

    Args:
        models: by the names of MODELS, float64 [window], nats, summed over each window. `a` and `b` are the parents, each
            by itself; of the others those that were measured, at this t.
        windows: what was evaluated on; they know their texts.
        t: of the merge; 0 is A, 1 is B.
        merge: the one that was made, `aligned` or `naive`, say.
        floor, remarks, left: as in `Verdict`.
        beside: right answers and ensembles at this t.
    """
    found = references(models, windows, t=t, beside=beside)
    return Verdict(found, found, merge, floor, remarks=remarks, left=left)


def path_verdict(
    paths: Mapping[str, Tensor],
    t: tuple[float, ...],
    windows: Windows,
    *,
    halfway: Mapping[str, Tensor],
    parents: Mapping[str, Tensor] | None = None,
    merge: str = "aligned",
    floor: float = ROUNDING,
    remarks: Sequence[str] = (),
    beside: Mapping[float, Beside] | None = None,
    repaired_t: tuple[float, ...] | None = None,
    left: str = REPAIRED,
) -> Verdict:
    """References and verdict of the paths from A to B.

    Where its loss is least at an end, the sentences compare the merge halfway.

    Args:
        paths: `aligned`, `naive` or both, and `repaired` where a repair was measured: float64 [point, window], nats, summed
            over each window.
        t: the grid, ascending from 0 to 1.
        windows: what was evaluated on; they know their texts.
        halfway: by the names of MERGES, float64 [window]: losses at t = 0.5.
        parents: `a`, `b` or both by themselves, float64 [window], where they are not the ends of the paths.
        merge: the path that decides.
        floor, remarks, left: as in `Verdict`.
        beside: right answers and ensembles, by t: halfway and at the t of the least loss.
        repaired_t: where `repaired` was measured, ends included; None: at `t`.
    """
    grids = {name: repaired_t if name == REPAIRED and repaired_t is not None else t for name in paths}
    ends = {"a": paths[merge][0], "b": paths.get("naive", paths[merge])[-1], **(parents or {})}
    beside = beside or {}
    found = references({**ends, **halfway}, windows, t=MIDPOINT, beside=beside.get(MIDPOINT))
    least = LeastLoss(grids[merge], paths[merge], found.means)
    compared = found
    if least.chosen is not None and 0 < least.chosen < 1:
        chosen = least.chosen
        at_least = {name: losses[grids[name].index(chosen)] for name, losses in paths.items() if chosen in grids[name]}
        here = references({**ends, **at_least}, windows, t=chosen, beside=beside.get(chosen))
        compared = replace(here, means=found.means)
    lines = {name: (grids[name], losses) for name, losses in paths.items() if name != REPAIRED}
    return Verdict(found, compared, merge, floor, least, lines, remarks, left=left)
