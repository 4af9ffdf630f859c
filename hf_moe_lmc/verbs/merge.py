"""The verb `merge`: points of the interpolation path, each written as a checkpoint, all in one pass over the inputs.

Without alignment nothing has to be known of the model: two checkpoints that hold the same tensors are interpolated as they
are, and transformers is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from hf_moe_lmc.errors import InputError, refuse_idle
from hf_moe_lmc.matching.options import WIDENED, OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.path.options import DType
from hf_moe_lmc.repair.options import RepairName, RepairOptions, repair_options
from hf_moe_lmc.verbs.earlier_report import EarlierReport
from hf_moe_lmc.verbs.inputs import Inputs
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.merge_jobs import Merge, PlainMerge
from hf_moe_lmc.verbs.merge_points import MergePoints, T, chosen
from hf_moe_lmc.verbs.options import OutputOptions, file_name, filled
from hf_moe_lmc.writing.formats import OutputFormat, check_format

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.perplexity.text import GivenText
    from hf_moe_lmc.symmetry.group import ModelSymmetry
    from hf_moe_lmc.verbs.measuring import Asked

RUNNING = ("context", "dtype", "device", "batch_size", "activation_memory")  # without effect unless the models run
MEASURING = (  # nor these unless a text is given
    "dataset_config", "dataset_revision", "split", "column", "join", "stride", "max_tokens", "points", "ensemble", "cloze",
)  # fmt: skip


@verb
def merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    t: T = 0.5,
    *,
    align: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    tokenizer: Literal["a", "b"] = "a",
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    split: str | None = None,
    column: str | None = None,
    join: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    points: int | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    activation_memory: int | None = None,
    ensemble: bool | None = None,
    cloze: int | None = None,
    report: str | os.PathLike[str] | None = None,
    format: OutputFormat = "a",
    widen: bool | None = None,
    repair: RepairName | None = None,
    calibration: GivenText | None = None,
    calibration_a: GivenText | None = None,
    calibration_b: GivenText | None = None,
    calibration_tokens: int | None = None,
    order: OrderMethod | None = None,
    units: UnitMethod | None = None,
    exact: bool | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    resume: bool | None = None,
    overwrite: bool | None = None,
    allow_nonfinite: bool | None = None,
) -> Request[Alignment | None]:
    """Writes the checkpoint theta_t = (1 - t) A + t B' with a model card, in A's layout, dtypes and side files.

    For several t each checkpoint stands in a folder of its own, such as `output/t0.3`. A and B are read once for all of them.

    With a text the merge is measured on it beside its parents and the merge without alignment, and gets report.json and
    report.md. With t = "best" the path is measured first, as `barrier` does. The merge is made where the loss is least, on the
    unweighted mean of the texts, and gets a plot of the path as well.

    `merge.plan` takes the same arguments and returns the Plan: a dry run.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]).
        output: a new or empty folder.
        t: 0 is A, 1 is B; a number, several, or "best" for the one of the least loss on a text.
        align: match B to A first; otherwise B is taken as it is. Two checkpoints with the same tensors are then
            interpolated without a look at what they are, so dense ones, too.
        symmetry: a saved or given symmetry instead of matching.
        tokenizer: whose tokenizer, chat template, generation configuration and special ids the output has, together.
        text, dataset, dataset_config, dataset_revision, split, column, join: what to measure on, as for `barrier`; by default
            nothing is measured.
        context, stride, max_tokens, dtype, device, batch_size, activation_memory: how to measure, as for `barrier`. Models
            run on calibration text with the same context, dtype and device.
        ensemble: measure the ensemble of A and B as well, with the weights 1 - t and t of the merge; by default it is not.
        cloze: questions of each text, at most, of a cloze task made from it, as for `barrier`; by default none.
        points: grid points of the path on which the best t is looked for, both ends included, by default 25.
        report: the folder of an earlier `barrier` between the same two: its figures and its plot go into the card.
        widen: give each expert the hidden units of both: (1 - t) f_A + t f_B' exactly, in a model that grows. Experts are then
            matched by their router rows (order `gate`), unless `order` is given.
        repair: what the merge has in place of the point of the straight line: `norms` or `crossover`, which need no text;
            `ridge`, `crossover+ridge` or `regmean`, fitted on text; `auto`, the best of all on text. With a text the repair is
            written only where it is better than the point of the straight line, on the half of the text that it was not
            fitted on.
        calibration: a text of both models, or several, as `text` has them.
        calibration_a, calibration_b: in its place, a text of each model's own domain.
        calibration_tokens: tokens to read of each of these texts, by default 32,768.
        format: how the output stores its weights: as A does, as B does, or with what A has quantized in bfloat16.
        order, units, exact, push_to_hub, private, license, resume, overwrite, allow_nonfinite: as for `align`.

    Returns:
        The alignment that was computed, or None where there was nothing to compute.

    Raises:
        InputError: the inputs do not fit, before anything is written; or weights are NaN or infinite.
        WriteError: the system refuses to write.

    Example:
        >>> lmc.merge("model-a", "model-b", "merged", t=0.3)  # doctest: +SKIP
        >>> lmc.merge("model-a", "model-b", "merges", t=[0.3, 0.5, 0.7])  # doctest: +SKIP
        >>> lmc.merge("model-a", "model-b", "best", t="best", text="held_out.txt")  # doctest: +SKIP
    """
    given = locals()
    matching = {**given, "order": WIDENED} if widen and order is None else given
    method, options = filled(WeightMatching, matching), filled(OutputOptions, given)
    if tokenizer not in ("a", "b"):
        raise InputError(f"tokenizer {tokenizer!r}: expected a or b")
    check_format(format)
    at = chosen(t)
    written = MergePoints(at, tokenizer, format, options.allow_nonfinite, best=not at)
    if len(at) > 1 and push_to_hub:
        raise InputError(f"--push-to-hub publishes one checkpoint, and {len(at)} t were given; publish its folders with push")
    if symmetry is not None and not align:
        raise InputError("a symmetry was given and alignment was turned off; choose one")
    if symmetry is not None or not align:
        refuse_idle({"order": order, "units": units, "exact": exact or None}, "nothing is matched")
    repairing = repair_options(given)
    if widen and repairing:
        raise InputError(
            f"--widen averages no hidden units, so that --repair {repairing.repair} has nothing to repair; choose one"
        )
    if report is not None and (widen or repairing):
        raise InputError("the report is of the straight line, which --widen and --repair leave; leave --report out")
    asked = _asked(given, written, repairing)
    earlier = None if report is None else EarlierReport.read(report)
    destination = options.destination()
    file = file_name(symmetry) if isinstance(symmetry, (str, os.PathLike)) else ""

    def prepare(inputs: Inputs) -> Job[Alignment | None]:
        plain = None if align or asked or repairing or widen else inputs.plain_pair(a, b)
        if plain:
            if earlier:
                earlier.check_early(*plain[:2])
            return PlainMerge(*plain, written, destination, earlier)
        pair = inputs.pair(a, b, symmetry=symmetry)
        if earlier:
            earlier.check_early(pair.a.checkpoint, pair.b.checkpoint)
        matched = method if align and pair.symmetry is None else None
        subject = None
        if asked:
            from hf_moe_lmc.verbs.measuring import Subject

            subject = Subject.of(pair, asked)
        repaired = None
        if repairing is not None:
            from hf_moe_lmc.verbs.repairing import Repairing

            repaired = Repairing.of(pair, repairing, given)
        if repaired and subject:
            repaired.check_apart(subject.evaluator.windows)
        widening = None
        if widen:
            from hf_moe_lmc.repair.widened import Widening

            widening = Widening.of(pair.a, pair.b, format, by_routers=matched is not None and order is None)
        return Merge(pair, written, matched, not align, destination, file, subject, earlier, repaired, widening)

    return Request(verb="merge", output=output, inputs=(a, b), options=options, prepare=prepare)


plan_merge = merge.plan


def _asked(given: Mapping[str, Any], points: MergePoints, repairing: RepairOptions | None) -> Asked | None:
    """What is to be measured; None: nothing is.

    Raises:
        InputError: options without effect, or of which one cannot go with another.
    """
    if given["text"] is None and given["dataset"] is None:
        if points.best:
            raise InputError("t = best is found by measuring: give it a text with --text or --dataset")
        running = () if repairing and repairing.is_calibrated else RUNNING
        refuse_idle({name: given[name] for name in (*MEASURING, *running)}, "nothing is measured without --text or --dataset")
        return None
    if given["report"] is not None:
        raise InputError("a report was given, and a text to measure on; choose one")
    if not points.best:
        refuse_idle({"points": given["points"]}, "t is given, so that no path is searched")
    from hf_moe_lmc.path.measurement import check_device
    from hf_moe_lmc.verbs.merge_text import asked_of_merge

    check_device(given["device"])
    return asked_of_merge(given, points)
