"""Repaired merges beside the straight line that they have left: one more path of a report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.path.added import OtherMerges
from hf_moe_lmc.path.endpoints import Point
from hf_moe_lmc.path.evaluation import Evaluator, Merged
from hf_moe_lmc.perplexity.least import LeastLoss
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.perplexity.verdict import MIDPOINT
from hf_moe_lmc.repair.widened import Widening
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.verbs.as_stored import Storing
from hf_moe_lmc.verbs.measuring import Subject
from hf_moe_lmc.verbs.repairing import ENDS, Repaired, Repairing
from hf_moe_lmc.writing.workspace import Workspace

PATH = "repaired"
CALIBRATED = (0.25, 0.5, 0.75)  # where a repair that is fitted is measured along a path, besides the t of the least loss


def with_repaired(
    subject: Subject,
    report: BarrierReport,
    path: str,
    symmetry: ModelSymmetry,
    repaired: Mapping[float, Repaired],
    workspace: Workspace | None,
    storing: Storing | None = None,
) -> tuple[BarrierReport, OtherMerges]:
    """The report with the path of repaired merges. Where a repair was refused, the merge is that of the straight line.

    Args:
        path: that the merges are repairs of, to B in the coordinates of `symmetry`.
        repaired: by t.
        storing: how an output stores them; None: nothing is written.
    """
    records = [repaired[t].record for t in sorted(repaired)]
    main = repaired.get(MIDPOINT, next(iter(repaired.values()))).record
    report = replace(report, repair=main if len(records) == 1 else {**main, "points": [_in_short(one) for one in records]})
    accepted = {t: one for t, one in repaired.items() if one.accepted}
    refused = {*repaired, *ENDS} - accepted.keys()
    if not accepted:
        return _with_path(replace(report, decides=path), path, {}, repaired, passes=0), OtherMerges(refused=refused)
    storing = storing or Storing(subject.pair, subject.evaluator, None)
    streams = {(PATH, t): storing.merge(symmetry, t, one.merging) for t, one in accepted.items()}
    facts = {"symmetry": digest(symmetry), "path": path, "repairs": {str(t): one.facts() for t, one in accepted.items()}}
    merged, points = Merged(streams, {**facts, **storing.facts()}), [Point(PATH, t) for t in accepted]
    scores, cost = subject.evaluator.score(
        {path: symmetry}, points, merged=merged, progress=workspace, told="evaluating repaired merges"
    )
    found = {t: (scores.losses[i], scores.right[i]) for i, t in enumerate(accepted)}
    return _with_path(report, path, found, repaired, passes=cost.passes), OtherMerges(merged, refused=refused)


def with_widened(
    subject: Subject,
    report: BarrierReport,
    path: str,
    symmetry: ModelSymmetry,
    widening: Widening,
    t: Sequence[float],
    workspace: Workspace | None,
) -> tuple[BarrierReport, OtherMerges]:
    """The report with the path of widened merges, which are models of another size.

    Args:
        t: of the merges.
    """
    b, options, windows = subject.pair.b.checkpoint, subject.evaluator.options, subject.evaluator.windows
    found, models, passes = {}, {}, 0
    for at in [at for at in t if at not in ENDS]:
        model = models[at] = widening.model(symmetry.layers, at, f"{b.resume_key()} {digest(symmetry)}")
        evaluator = Evaluator(model, model, windows, options)
        scores, cost = evaluator.score(
            {"naive": model.identity()}, [Point("naive", 0.0)], progress=workspace, told="evaluating widened merges"
        )
        found[at], passes = (scores.losses[0], scores.right[0]), passes + cost.passes
    return _with_path(report, path, found, t, passes=passes), OtherMerges(models=models, refused=ENDS)


def _with_path(
    report: BarrierReport, path: str, found: Mapping[float, tuple[Tensor, Tensor]], repaired: Collection[float], *, passes: int
) -> BarrierReport:
    """A report with the path of repaired merges: what was found, and where there is nothing the path that they are repairs of.

    Args:
        found: losses and right answers, each float64 [window], by t.
    """
    measured = (report.losses[path], report.right[path])
    rows = {t: tuple(values[i] for values in measured) for i, t in enumerate(report.t) if t in repaired or t in ENDS}
    rows |= {t: pair for t, pair in found.items() if t in report.t}
    every = [rows[t] for t in sorted(rows)]
    losses, right = (torch.stack([pair[i] for pair in every]) for i in (0, 1))
    halfway: dict[str, Any] = {}
    for i, name in enumerate(("halfway", "halfway_right") if MIDPOINT in repaired else ()):
        standing = getattr(report, name)
        if standing:
            halfway[name] = {**standing, PATH: found[MIDPOINT][i] if MIDPOINT in found else standing[path]}
    added = {
        t: one if t in found or path not in one.stored else replace(one, stored={**one.stored, PATH: one.stored[path]})
        for t, one in report.added.items()
    }
    return replace(
        report,
        losses={**report.losses, PATH: losses},
        right={**report.right, PATH: right},
        repaired_t=tuple(sorted(rows)),
        evaluation={**report.evaluation, "passes": report.evaluation["passes"] + passes},
        added=added,
        **halfway,
    )


def _in_short(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("t", "chosen", "accepted", "sentence", "difference") if key in record}


def repaired_t(repairing: Repairing, report: BarrierReport, path: str) -> list[float]:
    """At which t of a measured path repairs are made: everywhere, or where each has to be fitted, at some of them."""
    inner = [t for t in report.t if t not in ENDS]
    if repairing.calibration is None:
        return sorted({*inner, MIDPOINT})
    least = LeastLoss(report.t, report.losses[path], report.means).chosen
    return sorted({MIDPOINT, *(t for t in inner if t in CALIBRATED or t == least)})
