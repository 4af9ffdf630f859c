"""The embedded default: small models, their barriers, a merge that is worth having. No network, no accelerator.

First what users have: a dense model, upcycled to two Mixtrals, one then trained on prose and one on code. Their merge is below
both on the mean of the domains. Then two pairs of the paper's protocol, which share everything but their first MoE block:

- independent: the block was reinitialised with two seeds. Alignment removes most of the barrier.
- shuffled: both blocks grew from one initialisation, and B was then moved by a random symmetry. Alignment undoes the
  shuffling and removes nearly all of the barrier.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


def demo(
    output: str | os.PathLike[str],
    *,
    resume: bool = True,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Trains, measures and merges. Takes about four minutes of one core.

    Figures differ between machines: training is chaotic, so that a difference in the last bit of a sum grows, and the text is
    that of the Python installation. On one machine they repeat. OMP_NUM_THREADS changes them, too.

    Args:
        output: a new or empty folder: text/, checkpoints/, reports of the three pairs, merge/, summary.json and demo.json.
        resume: continue after the last stage that an earlier call finished (the default). Where it finished all of them, it is
            only told again.
        overwrite: `output` may be what an earlier demo wrote; it is replaced when the new one is whole.
        tell: called with lines that tell the story as it goes.

    Returns:
        The content of report.json for the pairs `upcycled`, `independent` and `shuffled`.

    Raises:
        OutputError: `output` is in use, holds something else, or cannot be written.

    Example:
        >>> reports = demo("demo", tell=print)  # doctest: +SKIP
        >>> reports["upcycled"]["references"]["mean"]["differences"]["aligned"]["better"]["value"] < 0  # doctest: +SKIP
        True
    """
    tell("loading torch and transformers, which takes some seconds")
    from hf_moe_lmc.example.stages import run

    return run(output, resume=resume, overwrite=overwrite, tell=tell)
