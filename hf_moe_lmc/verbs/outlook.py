"""What each verb would do with two models: its own checks on what has been opened, stopped before anything is fetched."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import ForeignError, InputError, MoELMCWarning
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.comparison import Outlook
from hf_moe_lmc.verbs.inputs import Model, Opener
from hf_moe_lmc.verbs.job import Request
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.verbs.planning import Plan

WORDS = "The text that a barrier is measured on is not known yet, so this one stands for it. "


class SharedOpener(Opener):
    """Opens and recognises each model once, whichever verb asks; what was wrong with it is raised again."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._opened: dict[tuple[str, torch.dtype], Checkpoint] = {}
        self._recognised: dict[int, MoEModel | InputError] = {}

    def open(self, model: Model, dtype: torch.dtype) -> Checkpoint:
        key = os.fspath(model), dtype
        if key not in self._opened:
            self._opened[key] = self._stack.enter_context(super().open(model, dtype))
        return self._opened[key]

    def recognise(self, checkpoint: Checkpoint) -> MoEModel:
        key = id(checkpoint)  # which this value keeps open
        if key not in self._recognised:
            try:
                self._recognised[key] = super().recognise(checkpoint)
            except InputError as error:
                self._recognised[key] = error
        found = self._recognised[key]
        if isinstance(found, InputError):
            raise found
        return found


def outlooks(a: Model, b: Model, opener: SharedOpener) -> tuple[Outlook, ...]:
    """What `align`, `merge`, `merge` without alignment and `barrier` would do with two models.

    The text of a barrier is made up: what depends on its length is not told.
    """
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(WORDS * 4, encoding="utf-8")
        requests: dict[str, Callable[[], Request[Any]]] = {
            "align": lambda: align.request(a, b, "aligned"),
            "merge": lambda: merge.request(a, b, "merged"),
            "merge --no-align": lambda: merge.request(a, b, "merged", align=False),
            "barrier": lambda: barrier.request(a, b, "barrier", text=text),
        }
        return tuple(_outlook(verb, request, opener) for verb, request in requests.items())


def _outlook(verb: str, request: Callable[[], Request[Any]], opener: SharedOpener) -> Outlook:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = None
        reasons: tuple[str, ...] = ()
        try:
            plan = request().plan_beside(opener)
        except InputError as error:
            reasons = tuple(str(fault) for fault in error.faults or (error,))
        except ForeignError as error:
            reasons = (str(error),)
    said = tuple(dict.fromkeys(str(one.message) for one in caught if issubclass(one.category, MoELMCWarning)))
    if plan is None:
        return Outlook(verb, reasons, said)
    return Outlook(verb, (), said, plan, *_seconds(plan))


def _seconds(plan: Plan) -> tuple[float, str]:
    """Seconds of reading, writing and matching at most, and the rates that they are reckoned from."""
    if plan.seconds is not None:
        return plan.seconds + plan.matching_seconds, "at the rates of a short test of this disk and processor"
    moving = (plan.bytes_to_read + plan.bytes_to_write) / plan.write_rate
    return moving + plan.matching_seconds, "once it is here, read as fast as this disk was just written"
