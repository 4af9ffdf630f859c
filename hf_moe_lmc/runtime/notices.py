"""Warnings that point at the line outside this package that called it, and notes, which need no attention."""

from __future__ import annotations

import logging
import sys
import warnings
from types import FrameType

from hf_moe_lmc.errors import MoELMCWarning

PACKAGE = __name__.partition(".")[0]
NOTES = logging.getLogger(PACKAGE)
NOTES.setLevel(logging.INFO)


def note(message: str) -> None:
    """Tells what a user may want to know and nobody has to mind, such as that a stopped call continues.

    It goes to the logger `hf_moe_lmc`, as INFO. The command line prints it.
    """
    NOTES.info(message)


def warn(message: str) -> None:
    """Warns (MoELMCWarning), at the caller of the outermost function of this package.

    Who enters or leaves a context calls it through contextlib, which is passed over.
    """
    level = outermost = 1
    frame: FrameType | None = sys._getframe(0)
    inside = True
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        inside = name.partition(".")[0] == PACKAGE or (inside and name == "contextlib")
        if inside:
            outermost = level
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MoELMCWarning, stacklevel=outermost + 1)
