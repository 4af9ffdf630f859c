"""Which repair a merge gets, and on which text it is fitted and guarded: a value that checks itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hf_moe_lmc.errors import InputError, refuse_idle
from hf_moe_lmc.perplexity.text import GivenText, Text, TextOptions

RepairName = Literal["none", "norms", "crossover", "ridge", "crossover+ridge", "regmean", "auto"]
FITTED = ("ridge", "crossover+ridge", "regmean")  # what cannot be had without text
Line = Literal["aligned", "naive"]  # the straight line that a repair starts from
TEXTS = ("calibration", "calibration_a", "calibration_b")


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """What a merge has in place of the point of the straight line.

    Attributes:
        repair: `none`; `norms` or `crossover`, which need no text; `ridge`, `crossover+ridge` or `regmean`, which are fitted
            on text; `auto`, whichever of these is best on text. With a text each is accepted only where it is better there.
        calibration: a text, or several, as `TextOptions.text` has them: of both models.
        calibration_a, calibration_b: in its place a text of each model's own domain.
        calibration_tokens: tokens to read of each of these texts.

    Raises:
        InputError: another repair, text without effect, one of `calibration_a` and `calibration_b` alone, or no text for a
            repair that needs one.

    Example:
        >>> RepairOptions(repair="norms").is_calibrated, RepairOptions(repair="ridge", calibration="held_out.txt").is_calibrated
        (False, True)
        >>> RepairOptions(repair="ridge")
        Traceback (most recent call last):
        hf_moe_lmc.errors.InputError: --repair ridge is fitted on text: give it --calibration TEXT, or --calibration-a TEXT \
and --calibration-b TEXT
    """

    repair: RepairName = "none"
    calibration: GivenText = ()
    calibration_a: GivenText = ()
    calibration_b: GivenText = ()
    calibration_tokens: int = 32768

    def __post_init__(self) -> None:
        if self.repair not in get_args(RepairName):
            raise InputError(f"repair {self.repair!r}: expected one of {', '.join(get_args(RepairName))}")
        if self.calibration_tokens < 1:
            raise InputError(f"calibration-tokens {self.calibration_tokens}: expected at least 1")
        given: dict[str, GivenText | None] = {name: getattr(self, name) or None for name in TEXTS}
        if self.repair == "none":
            refuse_idle(given, "--repair is none", "give --repair auto, which takes the best repair on this text")
        if given["calibration"] and (given["calibration_a"] or given["calibration_b"]):
            raise InputError(
                "--calibration is the text of both models, --calibration-a and --calibration-b of one each; choose"
            )
        if bool(given["calibration_a"]) != bool(given["calibration_b"]):
            there, lacks = ("a", "b") if given["calibration_a"] else ("b", "a")
            raise InputError(
                f"--calibration-{there} was given without --calibration-{lacks}: give a text of each model's domain"
            )
        if self.repair in FITTED and not self.is_calibrated:
            raise InputError(
                f"--repair {self.repair} is fitted on text: give it --calibration TEXT, or --calibration-a TEXT and "
                "--calibration-b TEXT"
            )
        for text in given.values():
            if text is not None:
                TextOptions(text=text)

    @property
    def is_calibrated(self) -> bool:
        """Whether there is text to fit and to decide on."""
        return any(getattr(self, name) for name in TEXTS)

    @property
    def does_nothing(self) -> bool:
        """Whether the merge stays on the straight line: nothing was asked for, or `auto` has no text to decide on."""
        return not self.is_calibrated and self.repair in ("none", "auto")

    def texts(self) -> tuple[Text, ...]:
        """The text of both models, or that of A and that of B. Reads files.

        Raises:
            InputError: a file is missing, empty or no text.
        """
        return tuple(TextOptions(text=getattr(self, name)).source() for name in TEXTS if getattr(self, name))


def line_of(*, align: bool) -> Line:
    """The straight line that a merge is on or starts from, as its path and its merges are called: `naive` where B is as it is.

    Example:
        >>> line_of(align=True), line_of(align=False)
        ('aligned', 'naive')
    """
    return "aligned" if align else "naive"


def repair_options(given: Mapping[str, Any]) -> RepairOptions | None:
    """The repair that the keywords of a verb ask for; None: none.

    Raises:
        InputError: as RepairOptions; or options without effect.
    """
    found = {field.name: given[field.name] for field in fields(RepairOptions) if given[field.name] is not None}
    if not found:
        return None
    options = RepairOptions(**found)
    if not options.is_calibrated:
        refuse_idle({"calibration_tokens": given["calibration_tokens"]}, "there is no calibration text")
    return None if options.repair == "none" else options
