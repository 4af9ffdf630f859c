"""Which repair a merge gets, chosen on one half of the calibration text and accepted on the other.

The first half is cut once more, by document: candidates are fitted on FITTED of it and compared by their loss on the rest. The
best one is fitted again, on all of the first half. It is accepted where its loss on the second half lies below that of the
merge on the straight line with a paired interval that excludes 0; else that merge stays. With a text of each parent's own
domain, both losses are unweighted means over the two texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.perplexity.by_text import TextMeans
from hf_moe_lmc.perplexity.references import Difference
from hf_moe_lmc.repair.calibrated_run import Calibrated
from hf_moe_lmc.repair.fitted import Fitted
from hf_moe_lmc.repair.halves import cut, deciding, halves_of, part_of
from hf_moe_lmc.repair.methods import ALIGNED, Method, methods_of
from hf_moe_lmc.repair.options import Line
from hf_moe_lmc.repair.sites import UnsuitedError
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.writing.results import ResultFolder
from hf_moe_lmc.writing.spans import Interpolated, TensorSource
from hf_moe_lmc.writing.streams import ModelStream

COMPARED, SKIPPED = "compared", "skipped.json"  # files of an earlier call
FITTED = 2 / 3  # of the first half, by tokens


@dataclass(frozen=True)
class Choice:
    """Which repair was taken, and all that was tried.

    Attributes:
        method: the best candidate; ALIGNED where none was better on the first half.
        accepted: whether the merge gets it.
        difference: its loss on the second half less that of the merge on the straight line, nats per token; None: not
            measured.
        fitted: its weights; None: nothing was fitted.
        record: the `repair` of report.json.
        line: what the merge on the straight line is called.
    """

    method: Method
    accepted: bool
    difference: Difference | None
    fitted: Fitted | None
    record: dict[str, Any] = field(default_factory=dict)
    line: Line = "aligned"

    @property
    def sentence(self) -> str:
        """What came of it, in words."""
        tried, line = len(self.record["tried"]), f"the {self.line} merge"
        if self.difference is None:
            one = self.record["tried"][0]["method"] if tried == 1 else f"none of {tried} candidates"
            was = "was not below" if tried == 1 else "was below"
            return f"{one} {was} {line} on the first half of the calibration text; {line} stays"
        value, interval = self.difference.value, self.difference.interval
        if self.accepted:
            assert interval is not None
            below = f"{-value:.4f} nats per token [{-interval[1]:.4f}, {-interval[0]:.4f}] below {line}"
            return f"{self.method} was taken: {below}, on calibration text that it was not fitted on"
        brackets = "" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]"
        found = f"not clearly below {line}, {value:+.4f} nats per token{brackets} from it on calibration text"
        return f"{self.method} was refused: {found}; {line} stays"

    def stream(self, run: Calibrated) -> ModelStream:
        """The merge as a checkpoint: repaired where that was accepted, else the one on the straight line."""
        outside: TensorSource = Interpolated(run.a.checkpoint, run.b.checkpoint, (run.t,))
        layers = run.layers(self.method.start if self.accepted else ALIGNED.start)
        if self.accepted and self.fitted is not None:
            layers, outside = self.fitted.layers(layers), self.fitted.outside_of(run.a, outside)
        return ModelStream(run.a, dict(layers), outside)


def choose(
    run: Calibrated, repair: str, folder: ResultFolder, methods: Sequence[Method] | None = None, line: Line = "aligned"
) -> Choice:
    """Chooses a repair for a merge, and fits it.

    Args:
        repair: as `--repair` has it.
        folder: takes the fitted weights; what an earlier call has left there is continued from.
        methods: the candidates; None: those of `repair`.
        line: what the merge on the straight line is called.

    Raises:
        InputError: as `halves_of`; more tokens than memory allows.
        UnsuitedError: no candidate can be fitted to this family, and none needs no text.
    """
    windows = run.calibration.windows
    first, second = halves_of(windows)
    fit, compare = cut(windows, first, FITTED)
    methods = methods or methods_of(repair)
    losses_of, skipped = _tried(run, methods, repair, fit, compare, folder)
    candidates = [method for method in losses_of if method != ALIGNED]
    found_losses = torch.stack(list(losses_of.values()))
    means = TextMeans(part_of(windows, compare))
    losses = means.of(None, found_losses.numpy())
    best = min(range(len(losses)), key=lambda i: (not math.isfinite(losses[i]), losses[i], i))
    method = (ALIGNED, *candidates)[best]
    record: dict[str, Any] = {
        "asked": repair,
        "t": run.t,
        "tokens": {"fitted": _tokens(run, fit), "compared": _tokens(run, compare), "accepted": _tokens(run, second)},
        "compared": {line: float(losses[0])},
        "tried": [_entry(one, float(loss), float(losses[0])) for one, loss in zip(candidates, losses[1:], strict=True)],
        "skipped": skipped,
        "chosen": line if method == ALIGNED else str(method),
    }
    if method == ALIGNED:
        found = Choice(method, False, None, None, {**record, "accepted": False}, line)
    else:
        found = accept(run, method, first, second, folder, record, line)
    note(f"repair: {found.sentence}")
    return found


def _tried(
    run: Calibrated, methods: Sequence[Method], repair: str, fit: Sequence[int], compare: Sequence[int], folder: ResultFolder
) -> tuple[dict[Method, Tensor], dict[str, str]]:
    """Losses of the merge on the straight line and of the candidates, on windows that they were not fitted on.

    Returns:
        The losses, and why some candidates were not tried.

    Raises:
        UnsuitedError: this family allows none of them.
    """
    if COMPARED in folder.names():
        stored = folder.read(COMPARED)
        known = [method for method in (ALIGNED, *methods) if str(method) in stored]
        return {method: stored[str(method)] for method in known}, _words(folder)
    skipped: dict[str, str] = {}
    try:
        if any(method.fit is not None for method in methods):
            run.check_sites()
        candidates = [ALIGNED, *methods]
        outcome = run.run(candidates, fit, compare)
    except UnsuitedError as error:
        left = [method for method in methods if method.fit is None]
        if not left or repair != "auto":
            raise
        skipped = {method.name: str(error) for method in methods if method.fit is not None}
        candidates = [ALIGNED, *left]
        outcome = run.run(candidates, fit, compare)
    found = dict(zip(candidates, outcome.losses, strict=True))
    _keep(folder, found, skipped)
    return found, skipped


def _keep(folder: ResultFolder, found: Mapping[Method, Tensor], skipped: Mapping[str, str]) -> None:
    """Leaves the losses of all candidates for a call that continues after a stop."""
    with folder.new(SKIPPED) as path:
        path.write_text(json.dumps(dict(skipped)), encoding="utf-8")
    folder.write(COMPARED, {str(method): losses.contiguous() for method, losses in found.items()})


def _words(folder: ResultFolder) -> dict[str, str]:
    """Why some methods were not tried, as an earlier call found it."""
    words: dict[str, str] = json.loads(folder.path(SKIPPED).read_text(encoding="utf-8"))
    return words


def accept(
    run: Calibrated,
    method: Method,
    first: Sequence[int],
    second: Sequence[int],
    folder: ResultFolder,
    record: dict[str, Any],
    line: Line = "aligned",
) -> Choice:
    """Fits the chosen method on the first half, and compares it with the merge on the straight line on the second."""
    fitted = None if method.fit is None else Fitted(ResultFolder(folder.folder / method.name))
    outcome = run.run([ALIGNED, method], first, second, {} if fitted is None else {method: fitted})
    decisive, few = deciding(run.calibration.windows, second)
    means = TextMeans(decisive)
    difference = compared(means, outcome.losses)
    accepted = difference.sign() < 0
    of_texts = {name: means.of(name, outcome.losses.numpy()).tolist() for name in means.names}
    record = {
        **record,
        "accepted": accepted,
        "loss": dict(zip((line, "repaired"), means.of(None, outcome.losses.numpy()).tolist(), strict=True)),
        "texts": {name: {line: straight, "repaired": repaired} for name, (straight, repaired) in of_texts.items()},
        "difference": difference.to_dict(),
        "layers": outcome.fits[1],
        "clusters": {name: means.clusters(name) for name in means.names},
    }
    if few:
        record["note"] = (
            f"{', '.join(few)}: too few documents to resample, so windows were, as if they were independent; the interval may "
            "be too narrow"
        )
    return Choice(method, accepted, difference, fitted, record, line)


def compared(means: TextMeans, losses: Tensor) -> Difference:
    """The second model's loss less the first's, on the unweighted mean of the texts, with a paired interval.

    Args:
        losses: float64 [2, window], nats, summed over each window.
    """
    values, resampled = means.of(None, losses.numpy()), means.resampled(None, losses.numpy())
    differences = resampled[:, 1] - resampled[:, 0]
    interval = means.expanded_interval(None, differences) if bool(np.isfinite(differences).all()) else None
    return Difference(float(values[1] - values[0]), interval)


def _tokens(run: Calibrated, numbers: Sequence[int]) -> int:
    return sum(len(run.calibration.windows.rows[i]) for i in numbers)


def _entry(method: Method, loss: float, straight: float) -> dict[str, Any]:
    return {
        "method": method.name,
        **({} if method.strength is None else {"lambda": method.strength}),
        "loss": loss,
        "difference": loss - straight,
    }
