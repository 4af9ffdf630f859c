"""Which points of the path a merge writes, and where in the output each of them stands."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import InputError, worded
from hf_moe_lmc.writing.formats import OutputFormat, format_facts
from hf_moe_lmc.writing.interpolation import check_t, exact
from hf_moe_lmc.writing.location import point_folder
from hf_moe_lmc.writing.output import WHOLE

BEST: Literal["best"] = "best"
T = float | Sequence[float] | Literal["best"]


@dataclass(frozen=True)
class MergePoints:
    """The points that are written, all in one pass over the inputs.

    Attributes:
        t: of each; empty while the best one is still to be found.
        tokenizer: the side whose tokenizer the outputs have.
        format: how they store their weights.
        allow_nonfinite: write weights that are NaN or infinite.
        best: t is, or will be, that of the least loss on a text.
    """

    t: tuple[float, ...]
    tokenizer: str
    format: OutputFormat
    allow_nonfinite: bool
    best: bool = False

    @property
    def folders(self) -> Sequence[str]:
        """Of the output, one for each point; a single point is the output itself."""
        return [point_folder(t) for t in self.t] if len(self.t) > 1 else WHOLE

    def speaker(self, b: Checkpoint) -> Checkpoint | None:
        """Whose tokenizer the outputs have, where it is not A's."""
        return b if self.tokenizer == "b" else None

    def placed(self) -> Iterator[tuple[str, float]]:
        """(folder of the output, t) of each point."""
        return zip(self.folders, self.t, strict=True)

    def facts(self, a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
        """What the shards depend on besides the two checkpoints."""
        layouts = {f"layout_{side}": one.layout_digest() for side, one in (("a", a), ("b", b)) if one.layout_digest()}
        t: float | list[float] = self.t[0] if len(self.t) == 1 else list(self.t)
        return {
            "what": "merge",
            "t": t,
            **({"best": True} if self.best else {}),
            "allow_nonfinite": self.allow_nonfinite,
            **format_facts(self.format, "a"),
            **layouts,
        }


def chosen(t: T) -> tuple[float, ...]:
    """The points that `t` stands for, each once; none for the best one, which is still to be found.

    Raises:
        InputError: no such points, or one of them twice.

    Example:
        >>> chosen(0.3), chosen([0.3, 0.5]), chosen("best")
        ((0.3,), (0.3, 0.5), ())
    """
    several = list(t) if isinstance(t, Sequence) and not isinstance(t, str) else [t]
    if several == [BEST]:
        return ()
    if not several:
        raise InputError("no t was given: expected numbers from 0 (A) to 1 (B), or best")
    if BEST in several:
        raise InputError("t = best stands for one point, which is found by measuring; leave the other t out")
    for one in several:
        if not isinstance(one, Real):
            raise InputError(f"t = {worded(one)}: expected a number from 0 (A) to 1 (B), or best")
        check_t(float(one))
    points = tuple(abs(float(one)) for one in several)  # -0 is 0
    for one in points:
        if points.count(one) > 1:
            raise InputError(f"t = {exact(one)} is given {points.count(one)} times; name each point once")
    return points


def within(folder: str, file: str) -> str:
    """A file in a folder of the output."""
    return posixpath.join(folder, file)
