"""The verb `barrier`: the main job."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack

from hf_moe_lmc.matching.alignment import align_models
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.path.measurement import _Measurement, _Options, _spans
from hf_moe_lmc.path.tokenizer import _common_tokenizer, _context
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.perplexity.text import Text, text_source
from hf_moe_lmc.perplexity.windows import cut_windows
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import team, together
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.inputs import download, load_symmetry, open_models
from hf_moe_lmc.writing.output import begin, writing
from hf_moe_lmc.writing.streams import refuse_quantised
from hf_moe_lmc.writing.workplace import Workplace


@together
def barrier(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    split: str = "test",
    column: str = "text",
    points: int = 25,
    naive: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    exact: bool = False,
    context: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    activation_memory: int | None = None,
    layerwise: int = 0,
    layers: str | None = None,
    refine: int = 0,
    routing: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> BarrierReport:
    """Measures the perplexity barrier between two checkpoints, naive and aligned.

    Several processes (torchrun) share the layers to match and the batches of windows; process 0 writes.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        output: a new or empty folder for report.json, report.md, barrier.png, barrier.svg and symmetry.safetensors.
        text: a UTF-8 file or several, each one document, where .jsonl and .parquet files have a document in each row; or
            `dataset`, whose rows are documents.
        dataset_revision: branch, tag or commit of a dataset on the Hub.
        column: where the text of a row stands.
        points: grid points from t = 0 to t = 1, both included.
        naive: evaluate the path to B as it is, too.
        symmetry: a saved or given symmetry instead of matching.
        order, units, exact: as in `align`.
        context: tokens per window, by default 2048 or the model's maximum if that is less.
        stride: tokens of text between the starts of windows, which then overlap, and each is scored only where the one before
            ended; None: no overlap.
        max_tokens: tokens of text to read; None reads everything.
        batch_size: windows per forward pass, by default about 4096 tokens' worth.
        dtype: in which the models run: float32, bfloat16 or float16.
        device: where the layers run; by default a GPU if there is one.
        activation_memory: bytes for the hidden states of all points and windows on their way; the smaller, the more often both
            models are read. By default half of the memory that is free.
        layerwise: inner points of the paths on which some layers alone leave A for their aligned place in B; 0: none, or 5
            where `layers` says which.
        layers: decoder layers for `layerwise`, such as "0-3,8": those of a range together, 8 alone; "each", the default,
            stands for every MoE layer alone.
        refine: how many times the intervals beside the maximum of the aligned curve are halved; both paths get the new points.
            Each time reads both models again.
        routing: record at each point which experts the tokens take; those that `refine` adds cost both ends again.
        resume: continue from what an earlier call with the same inputs and options had done when it was stopped: the layers
            that it had matched, and what had gone through the whole model (see workplace.py and `evaluate`).
        overwrite: `output` may be what this package wrote before; it is replaced when the new one is whole.

    Raises:
        InputError: the inputs do not fit, before anything is written.
    """
    options = _Options(
        matching=WeightMatching(order=order, units=units, exact=exact),
        points=points,
        naive=naive,
        context=context,
        stride=stride,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        activation_memory=activation_memory,
        layerwise=layerwise,
        layers=layers,
        refine=refine,
        routing=routing,
    )
    files = [text] if isinstance(text, str | os.PathLike) else text
    source = text_source(files, dataset, dataset_config, split, column, dataset_revision)
    with ExitStack() as stack:
        model_a, model_b = open_models(
            a,
            b,
            stack,
            output=output,
            symmetry=symmetry,
            each=refuse_quantised,
            overwrite=overwrite,
            ignore_extra_layers=True,
        )
        workplace = begin(output, a, b, stack=stack, resume=resume, overwrite=overwrite)
        return _barrier(model_a, model_b, source, symmetry, options, workplace)


def _barrier(
    a: MoEModel,
    b: MoEModel,
    text: Text,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None,
    options: _Options,
    progress: Workplace | None,
) -> BarrierReport:
    """Checks, downloads, aligns unless a symmetry is given, evaluates, writes."""
    language_model_class(a)
    given = load_symmetry(symmetry, b) if symmetry is not None else None
    spans = _spans(options.layers, a) if options.steps else []
    mates = team()
    windows = cut_windows(
        text.documents(),
        _common_tokenizer(a, b),
        context=_context(a, options.context),
        max_tokens=options.max_tokens,
        stride=options.stride,
    )
    with writing(progress) as writer:
        started = time.perf_counter()
        download(a, b, given=given)
        mates.check_equal({"text": windows.describe()["tokens_sha256"]})
        if given is None:
            alignment = align_models(a, b, options.matching, workplace=progress)
            used, matching = alignment.symmetry, alignment.to_dict()
        else:
            file = None if isinstance(symmetry, ModelSymmetry) or symmetry is None else os.fspath(symmetry)
            used, matching = given, {"symmetry": file, **given.metadata}
        symmetries = {"aligned": used, **({"naive": b.identity()} if options.naive else {})}
        report = _Measurement(a, b, symmetries, windows, options, spans, progress).report(text.describe(), matching, started)
        _warn(report)
        if writer:
            used.save(writer.path("symmetry.safetensors"))
            writer.write_text("report.json", report.to_json())
            writer.write_text("report.md", report.to_markdown())
            report.plot(writer.path("barrier.png"))
    return report


def _warn(report: BarrierReport) -> None:
    """Of what the reader of a report should know."""
    dtype, problem = report.evaluation["dtype"], report.evaluation.get("routing_unavailable")
    for name, values in report.losses.items():
        bad = [f"{report.t[i]:.3g}" for i in (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()]
        if bad:
            advice = "; try --dtype float32" if dtype != "float32" else ""
            warn(f"{name} path: the loss is not finite at t = {', '.join(bad)}{advice}")
    if problem:
        warn(f"{report.a['source']}: the routing cannot be watched: {problem}")
    for warning in report.warnings:
        warn(warning)
