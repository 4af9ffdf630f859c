"""The sentences of a verdict. Whether something is said as a fact is decided by its interval, elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hf_moe_lmc.perplexity.bootstrap import Interval
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.least import LeastLoss
from hf_moe_lmc.perplexity.references import Comparison, Difference, References

SMALL = 0.01  # nats per token; smaller numbers get a digit more
FLAT = 1e-5  # nats per token: a curve within so much of its line is on it


def capital(sentence: str) -> str:
    """A sentence with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def number(value: float, like: float | None = None, *, sign: bool = False) -> str:
    """A number of nats, with three decimals or, where it or `like` is small, four.

    Example:
        >>> number(0.0171), number(0.0014, sign=True), number(-0.0, sign=True), number(0.002, like=0.5)
        ('0.017', '+0.0014', '+0.0000', '0.002')
    """
    digits = 3 if abs(value if like is None else like) >= SMALL else 4
    rounded = round(value, digits) + 0.0  # no -0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def brackets(interval: Interval | None, like: float, *, sign: bool = False) -> str:
    """An interval in brackets, to follow a number; empty where there is none.

    Example:
        >>> brackets((0.012, 0.021), 0.017), brackets(None, 0.017)
        (' [0.012, 0.021]', '')
    """
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f" [{', '.join(number(end, like, sign=sign) for end in interval)}]"


def place(t: float, interval: Interval | None = None, step: float = 0.0) -> str:
    """A point of a path; `step`: how far the grid's next point is, for an interval that holds one point alone.

    Example:
        >>> place(0.41667, (0.375, 0.5)), place(0.41667, (0.41667, 0.41667), 0.04167), place(0.5)
        ('t = 0.417 [0.375, 0.5]', 't = 0.417 (to one step of the grid, 0.0417)', 't = 0.5')
    """
    if interval is None:
        return f"t = {t:.3g}"
    if interval[0] == interval[1]:
        return f"t = {t:.3g} (to one step of the grid, {step:.3g})"
    return f"t = {t:.3g} [{interval[0]:.3g}, {interval[1]:.3g}]"


def least_loss(least: LeastLoss, references: References, path: str = "aligned") -> str:
    """Where the loss on a path is least."""
    texts = "these texts" if references.several else "this text"
    start = f"Least loss on the {path} path{', on the mean of the texts,' if references.several else ''}"
    if least.index is None:
        return f"No loss on the {path} path is finite."
    assert least.chosen is not None
    if least.undecided:
        return f"{start} at {place(least.chosen)}, chosen on {texts}, but no t of the path can be told from another."
    at = place(least.chosen, least.interval, least.step)
    if least.elsewhere:
        at += f" (or at {', '.join(f'{t:.3g}' for t in least.elsewhere)}, which cannot be told from it)"
    if 0 < least.chosen < 1:
        return f"{start} at {at}, chosen on {texts}."
    end, parents = ("A" if least.chosen == 0 else "B"), references.mean
    measurably = "" if least.interval is None or least.interval[0] == least.interval[1] else "measurably "
    if least.nll[least.index] >= parents.loss(parents.better) - FLAT:
        none = f"no merge is {measurably}better than its better parent, {parents.better.upper()}"
    else:
        none = f"no point between the ends is {measurably}better than this end"
    return f"{start} at its end {end}, {at}, chosen on {texts}: {none}."


def size(found: Difference, *, unit: bool = False) -> str:
    """The size of a difference that is a fact; words around it say its direction.

    Example:
        >>> size(Difference(-0.017, (-0.021, -0.012)), unit=True)
        '0.017 nats per token [0.012, 0.021]'
    """
    interval = found.interval
    if interval is not None and found.value < 0:
        interval = -interval[1], -interval[0]
    return number(abs(found.value)) + (" nats per token" if unit else "") + brackets(interval, found.value)


def open_size(found: Difference, *, unit: bool = False) -> str:
    """A difference that is no fact, with its sign.

    Example:
        >>> open_size(Difference(-0.003, (-0.008, 0.002))), open_size(Difference(-0.003, None))
        ('-0.0030 [-0.0080, +0.0020]', '-0.0030 without an interval')
    """
    if found == Difference(0.0, (0.0, 0.0)):
        return "no difference"
    interval = brackets(found.interval, found.value, sign=True) or " without an interval"
    return number(found.value, sign=True) + (" nats per token" if unit else "") + interval


def of_merge(
    subject: str,
    merge: str,
    standing: str,
    found: Comparison,
    held_out: Mapping[str, Difference] | None,
    *,
    several: bool = False,
) -> str:
    """A merge against both its parents.

    Args:
        subject: what the sentence is about, such as "The merge at t = 0.5".
        standing: one of the STANDINGS.
        held_out: the differences at t chosen by other documents, where they alone make it undecided.
        several: there are several texts.
    """
    better, worse, mean = found.better.upper(), found.worse.upper(), " on the mean of the texts" if several else ""
    if standing == "not_finite":
        bad = [name for name in (merge, "a", "b") if not math.isfinite(found.loss(name))]
        owners = ", ".join("its own" if name == merge else f"that of {name.upper()}" for name in bad)
        return f"{subject} cannot be compared with its parents{mean}: a loss is not finite ({owners})."
    one, other = found.to_better(merge), found.differences[merge][found.worse]
    if standing == "below_both":
        return (
            f"{subject} is below both parents{mean} by {size(one, unit=True)}, measured from the better one, "
            f"which is {better}; below {worse} it is by {size(other)}."
        )
    above = f"{subject} is above the better parent{mean} by {size(one, unit=True)}"
    if standing == "worse_than_either":
        return (
            f"{above}: worse than either, do not merge. The better parent is {better}; above {worse} the merge is by "
            f"{size(other)}."
        )
    if standing == "between":
        return f"{above}: not worth merging. The better parent is {better}; below {worse} the merge is by {size(other)}."
    if standing == "above_better":
        return (
            f"{above}: not worth merging. The better parent is {better}; from {worse} the merge cannot be told apart "
            f"({open_size(other)})."
        )
    if held_out is not None:
        return (
            f"{subject} is below the better parent{mean}, which is {better}, by {size(one, unit=True)} on the text that chose "
            f"t, but not where other documents choose it ({open_size(held_out[found.better])}): the two cannot be told apart."
        )
    start = f"{subject} cannot be told apart from the better parent{mean}, which is {better} ({open_size(one, unit=True)})"
    if other.sign():
        return f"{start}; it is {size(other)} {'below' if other.value < 0 else 'above'} {worse}."
    return f"{start}, nor from {worse} ({open_size(other)})."


def on_mean(sentence: str, several: bool) -> str:
    """A sentence about the mean of the texts, where there are several, with a capital."""
    return f"On the mean of the texts, {sentence}" if several else capital(sentence)


def of_parent(t: float, parent: str, to_other: Difference, *, floor: float, several: bool) -> str:
    """A merge at a given end of the path, which is a parent itself, against the other parent.

    Args:
        parent: the end, `a` or `b`.
        to_other: the loss of that end less that of the other parent.
        floor: nats per token; a difference of at most so much is no finding.
        several: there are several texts.

    Example:
        >>> print(of_parent(0, "a", Difference(-0.2, (-0.25, -0.15)), floor=1e-4, several=False))
        The merge at t = 0 is A itself, no mixture. It is 0.200 nats per token [0.150, 0.250] below B.
    """
    other, sign = ("B" if parent == "a" else "A"), to_other.sign(floor)
    against = f"it is {size(to_other, unit=True)} {'below' if sign < 0 else 'above'} {other}"
    if not sign:
        against = f"it cannot be told apart from {other} ({open_size(to_other, unit=True)})"
    return f"The merge at {place(t)} is {parent.upper()} itself, no mixture. {on_mean(against, several)}."


def none_below(end: float, parent: str, best: float | None, above: Difference | None, *, floor: float, several: bool) -> str:
    """A merge at the t of the least loss, where that is an end of the path and so a parent itself.

    Args:
        end: its t.
        best: t of the least loss between the ends; None: no loss there is finite.
        above: the loss there less that of the end.
        parent, floor, several: as in `of_parent`.

    Example:
        >>> said = none_below(0, "a", 0.25, Difference(0.031, (0.02, 0.04)), floor=1e-4, several=False)
        >>> print(said.replace(": ", ":\\n", 1))
        The merge at t = 0 is A itself. No merge on the path is below A:
        the best one, at t = 0.25, is 0.031 nats per token [0.020, 0.040] above it.
    """
    start, name = f"The merge at {place(end)} is {parent.upper()} itself.", parent.upper()
    if best is None or above is None:
        return f"{start} No loss between the ends of the path is known and finite."
    one = on_mean(f"no merge on the path is below {name}: the best one, at {place(best)},", several)
    if above.sign(floor) > 0:
        return f"{start} {one} is {size(above, unit=True)} above it."
    return f"{start} {one} cannot be told apart from it ({open_size(above, unit=True)})."


def no_barrier(curve: BarrierCurve) -> str | None:
    """Why there is no barrier on a path, in words; None where there is one.

    Example:
        >>> no_barrier(BarrierCurve((0.0, 0.5, 1.0), (3.0, 2.9, 3.2)))
        'the path lies below the line between its ends everywhere'
    """
    inner = curve.excess[1:-1]
    if not math.isfinite(curve.barrier):
        return "unknown, a loss is not finite"
    if all(abs(excess) <= FLAT for excess in inner):
        return "the path keeps to the line between its ends"
    return "the path lies below the line between its ends everywhere" if max(inner) < 0 else None


def of_path(name: str, curve: BarrierCurve, interval: Interval | None) -> str:
    """The barrier on one path, or that there is none.

    Example:
        >>> of_path("naive", BarrierCurve((0.0, 0.5, 1.0), (3.0, 3.7, 3.2)), (0.55, 0.65))
        'naive 0.600 [0.550, 0.650] at t = 0.5'
        >>> of_path("aligned", BarrierCurve((0.0, 0.5, 1.0), (3.0, 2.9, 3.2)), (0.0, 0.0))
        'aligned none, the path lies below the line between its ends everywhere (area -0.100)'
    """
    none, area = no_barrier(curve), curve.area
    if none is not None:
        if not math.isfinite(curve.barrier):
            return f"{name} {none}"
        return f"{name} none, {none}" + (f" (area {number(area, sign=True)})" if area < -FLAT else "")
    found = f"{name} {number(curve.barrier)}{brackets(interval, curve.barrier)} at t = {curve.barrier_t:.3g}"
    return found if area >= 0 else f"{found}, though more of the path lies below the line (area {number(area, sign=True)})"


def of_excess(left: str, curve: BarrierCurve, interval: Interval | None) -> str:
    """How far merges that lie on no straight line are above the line between the losses of the ends.

    Args:
        left: what they are called.

    Example:
        >>> of_excess("repaired", BarrierCurve((0.0, 0.5, 1.0), (3.0, 3.7, 3.2)), (0.55, 0.65))
        'repaired merges: at most 0.600 nats per token [0.550, 0.650] above the line between the ends, at t = 0.5'
        >>> of_excess("widened", BarrierCurve((0.0, 0.5, 1.0), (3.0, 2.9, 3.2)), None)
        'widened merges: below the line between the ends everywhere, at most 0.200 nats per token, at t = 0.5'
    """
    start, inner = f"{left} merges:", curve.excess[1:-1]
    if not math.isfinite(curve.barrier):
        return f"{start} a loss is not finite"
    if not inner or all(abs(excess) <= FLAT for excess in inner):
        return f"{start} on the line between the ends"
    if max(inner) < 0:
        lowest = min(range(len(inner)), key=inner.__getitem__)
        below = f"at most {number(-inner[lowest])} nats per token, at t = {curve.t[1 + lowest]:.3g}"
        return f"{start} below the line between the ends everywhere, {below}"
    found = f"{number(curve.barrier)} nats per token{brackets(interval, curve.barrier)}"
    return f"{start} at most {found} above the line between the ends, at t = {curve.barrier_t:.3g}"


def barriers(found: Mapping[str, tuple[BarrierCurve, Interval | None]]) -> str:
    """The barriers of all straight lines."""
    return f"Barrier in nats per token: {'; '.join(of_path(name, *found[name]) for name in reversed(list(found)))}."


def title(merge_at: float, standing: str, found: Comparison, merge: str, *, texts: int, at_end: str | None) -> str:
    """The verdict in a line that fits above a plot.

    Args:
        texts: how many.
        at_end: the end at which the loss is least; None: it is between the ends, or t was given.
    """
    start, better = f"at {place(merge_at)}", f"the better parent ({found.better.upper()})"
    ending = f"mean of {texts} texts: " if texts > 1 else ""
    if standing == "parent":
        itself = "A" if merge_at == 0 else "B"
        return f"{ending}{start}: {itself} itself" + ("" if at_end is None else ", no merge is below it")
    ending += "" if at_end is None else f"least loss at {at_end}; "
    if standing == "not_finite":
        return f"{ending}{start}: a loss is not finite"
    one, other = found.to_better(merge), found.differences[merge][found.worse]
    either = f"worse than either parent: {size(other if other.value < one.value else one)} nats"
    return (
        ending
        + {
            "below_both": f"{start}: {size(one)} nats below {better}",
            "worse_than_either": f"{start} {either}",
            "between": f"{start}: {size(one)} nats above {better}",
            "above_better": f"{start}: {size(one)} nats above {better}",
            "undecided": f"{start}: not told apart from {better}",
        }[standing]
    )
