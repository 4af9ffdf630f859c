"""A merge that is measured on a text: at the t that was given, or along the path to find the best one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.perplexity.verdict import MergedAt
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.verbs.earlier_report import PICTURE
from hf_moe_lmc.verbs.measuring import Asked
from hf_moe_lmc.verbs.merge_points import MergePoints, within
from hf_moe_lmc.writing.output import FolderWriter

ENDS = {0.0: "A", 1.0: "B"}


def asked_of_merge(given: Mapping[str, Any], points: MergePoints) -> Asked:
    """What is measured: the whole path where t is to be found, otherwise its ends and the points that are written."""
    if points.best:
        return Asked.of(given, routing=False)
    return Asked.of({**given, "points": 2}, routing=False, at=points.t, halfway=False)


def best_point(report: BarrierReport, path: str) -> float:
    """The t of the least loss on a path, on the unweighted mean of the texts; says it where that is a parent.

    Raises:
        InputError: no loss is finite.
    """
    least = replace(report, merge=MergedAt(0.0, path, chosen=True)).verdict.least
    assert least is not None
    if least.chosen is None:
        raise InputError(f"no loss on the {path} path is finite, so that there is no best t; try --dtype float32, or give -t")
    if least.chosen in ENDS:
        side = ENDS[least.chosen]
        taken = f"{side} in A's coordinates" if side == "B" and path == "aligned" else side
        warn(
            f"the best t is {least.chosen:g}, an end of the path: no merge has a lower loss on this text than {side}. What is "
            f"written is {taken}, no mixture"
        )
    return least.chosen


def write_report(writer: FolderWriter, folder: str, report: BarrierReport) -> Measured:
    """Writes the report of a merge into a folder of the output, and gives what the card says of it.

    There is a plot where t was chosen along the path.
    """
    assert report.merge is not None
    writer.write_text(within(folder, "report.json"), report.to_json())
    writer.write_text(within(folder, "report.md"), report.to_markdown())
    if report.merge.chosen:
        report.plot(writer.path(within(folder, PICTURE)))
    return Measured(
        report=report.to_dict(),
        verdict=report.verdict.sentences,
        t=report.merge.t,
        path=report.merge.path,
        plot=PICTURE if report.merge.chosen else None,
    )
