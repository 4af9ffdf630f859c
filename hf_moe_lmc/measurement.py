"""The main job: the perplexity barrier between two checkpoints, on the naive and on the aligned path."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_moe_lmc.alignment import align_models, begin, download, load_symmetry, open_models, writing
from hf_moe_lmc.curve import BarrierCurve
from hf_moe_lmc.distribution import team, together
from hf_moe_lmc.errors import CheckpointError, InputError, MismatchError
from hf_moe_lmc.evaluation import Cost, Point, evaluate
from hf_moe_lmc.hub import looks_local
from hf_moe_lmc.interpolation import refuse_quantised
from hf_moe_lmc.matching import OrderMethod, check_methods
from hf_moe_lmc.model import MoEModel
from hf_moe_lmc.output import check_output
from hf_moe_lmc.path import implementations, language_model_class
from hf_moe_lmc.perplexity import TOKENS_PER_BATCH, DatasetText, Text, TextFiles, Windows, cut_windows
from hf_moe_lmc.report import BarrierReport, LayerLosses
from hf_moe_lmc.resume import Progress
from hf_moe_lmc.routing import RoutingObserver
from hf_moe_lmc.symmetry import ModelSymmetry
from hf_moe_lmc.units import UnitMethod

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONTEXT = 2048


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
    refine: int = 0,
    routing: bool = True,
    resume: bool = True,
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
        layerwise: inner points of the paths on which one MoE layer alone leaves A for its aligned place in B; 0: none.
        refine: how many times the intervals beside the maximum of the aligned curve are halved; both paths get the new points.
            Each time reads both models again.
        routing: record at each point of the grid which experts the tokens take.
        resume: continue from what an earlier call with the same inputs and options had done when it was stopped: the layers
            that it had matched, and what had gone through the whole model (see resume.py and `evaluate`).

    Raises:
        InputError: the inputs do not fit, before anything is written.
    """
    check_methods(order, units)
    _check_numbers(points=(points, 2), context=(context, 2), stride=(stride, 1), max_tokens=(max_tokens, 1))
    _check_numbers(
        batch_size=(batch_size, 1), activation_memory=(activation_memory, 1), layerwise=(layerwise, 0), refine=(refine, 0)
    )
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    _check_device(device)
    files = [text] if isinstance(text, str | os.PathLike) else text
    source = _text_source(files, dataset, dataset_config, split, column, dataset_revision)
    with ExitStack() as stack:
        progress = begin(output, stack, resume=resume)
        model_a, model_b = open_models(a, b, stack, ignore_extra_layers=True)
        refuse_quantised(model_a, model_b)
        language_model_class(model_a)
        given = load_symmetry(symmetry, model_b) if symmetry is not None else None
        if team().is_main:
            check_output(output, [model_a.checkpoint, model_b.checkpoint])
        tokenizer = _common_tokenizer(model_a, model_b)
        length = _context(model_a, context)
        windows = cut_windows(source.documents(), tokenizer, context=length, max_tokens=max_tokens, stride=stride)
        with writing(output, model_a, model_b) as writer:
            report, used = _measure(
                model_a,
                model_b,
                given,
                windows,
                t=tuple(i / (points - 1) for i in range(points)),
                naive=naive,
                order=order,
                units=units,
                exact=exact,
                batch_size=batch_size or max(1, TOKENS_PER_BATCH // windows.context),
                dtype=dtype,
                device=device,
                activation_memory=activation_memory,
                layerwise=layerwise,
                refine=refine,
                routing=routing,
                progress=progress,
                text=source.describe(),
                symmetry=None if isinstance(symmetry, ModelSymmetry) else symmetry,
            )
            if writer:
                used.save(writer.path("symmetry.safetensors"))
                writer.write_text("report.json", report.to_json())
                writer.write_text("report.md", report.to_markdown())
                report.plot(writer.path("barrier.png"))
    return report


def _measure(
    a: MoEModel,
    b: MoEModel,
    given: ModelSymmetry | None,
    windows: Windows,
    *,
    t: tuple[float, ...],
    naive: bool,
    order: OrderMethod,
    units: UnitMethod,
    exact: bool,
    batch_size: int,
    dtype: str,
    device: str | None,
    activation_memory: int | None,
    layerwise: int,
    refine: int,
    routing: bool,
    progress: Progress | None,
    text: dict[str, Any],
    symmetry: str | os.PathLike[str] | None,
) -> tuple[BarrierReport, ModelSymmetry]:
    """Downloads, aligns unless a symmetry is given, evaluates; everything has been checked."""
    started = time.perf_counter()
    mates = team()
    download(a, b, given=given)
    mates.check_equal({"text": windows.describe()["tokens_sha256"]})
    if given is None:
        alignment = align_models(a, b, order=order, units=units, exact=exact, progress=progress)
        used, matching = alignment.symmetry, alignment.to_dict()
    else:
        used, matching = given, {"symmetry": symmetry and os.fspath(symmetry), **given.metadata}
    ran_with: dict[str, Any] = {}
    symmetries = {"aligned": used, **({"naive": b.identity()} if naive else {})}
    points = _grid(tuple(symmetries), t)
    steps = [(i + 1) / (layerwise + 1) for i in range(layerwise + 1)] if layerwise else []
    moe_layers = [layer for layer in a.layers if layer < a.num_layers]
    points += [Point("aligned", at, frozenset({layer})) for layer in moe_layers for at in steps]
    watching = RoutingObserver(a, points) if routing else None

    def run(points: Sequence[Point], **options: Any) -> tuple[dict[Point, Tensor], Cost]:
        found, cost = evaluate(
            a,
            b,
            symmetries,
            points,
            windows,
            model_class=language_model_class(a),
            dtype=DTYPES[dtype],
            device=device,
            batch_size=batch_size,
            activation_memory=activation_memory,
            progress=progress,
            **options,
        )
        return dict(zip(points, found, strict=True)), cost

    at_point, cost = run(
        points,
        inspect_model=lambda model: ran_with.update(implementations(model, device)),
        observers=[watching] if watching else [],
    )
    if watching:
        everyones = mates.exchange(watching.tallies)
        for number, tallies in enumerate(everyones):
            if number != mates.rank:
                watching.add(tallies)
    grid = t
    for _ in range(refine):
        new = _beside_the_maximum(_curve(at_point, "aligned", t, windows))
        if not new:
            break
        found, again = run([Point(path, at) for path in symmetries for at in new])
        at_point |= found
        cost = replace(cost, passes=cost.passes + again.passes)
        t = tuple(sorted({*t, *new}))
    losses = {path: torch.stack([at_point[_on(path, at)] for at in t]) for path in symmetries}
    _warn_of_losses_that_are_not_finite(losses, t, dtype)
    if refine:
        ran_with["refined_t"] = [at for at in t if at not in grid]
    if watching and watching.problem:
        warnings.warn(f"{a.checkpoint.name}: the routing cannot be watched: {watching.problem}", stacklevel=3)
        ran_with["routing_unavailable"] = watching.problem
    report = BarrierReport(
        a={**a.checkpoint.origin(), "source": a.checkpoint.name},
        b={**b.checkpoint.origin(), "source": b.checkpoint.name},
        evaluation={"text": text, **windows.describe(), "dtype": dtype, "batch_size": batch_size, **ran_with, **vars(cost)},
        matching=matching,
        windows=windows,
        losses=losses,
        t=t,
        seconds=mates.from_main(time.perf_counter() - started),
        layerwise={layer: _layer_alone(layer, steps, at_point) for layer in moe_layers} if layerwise else None,
        routing=watching.rows() if watching and not watching.problem else None,
    )
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=3)
    return report, used


def _grid(paths: Sequence[str], t: Sequence[float]) -> list[Point]:
    """A once, B on each path, then what lies between: observers compare with the ends."""
    ends = [Point("aligned", 0.0), *(Point(path, 1.0) for path in paths)]
    return [*ends, *(Point(path, at) for path in paths for at in t if 0 < at < 1)]


def _on(path: str, t: float) -> Point:
    """The point at which a path is evaluated: A is on both, once."""
    return Point(path if t > 0 else "aligned", t)


def _curve(at_point: Mapping[Point, Tensor], path: str, t: Sequence[float], windows: Windows) -> BarrierCurve:
    tokens = float(windows.scored.sum())
    return BarrierCurve(tuple(t), tuple(float(at_point[_on(path, at)].sum()) / tokens for at in t))


def _beside_the_maximum(curve: BarrierCurve) -> list[float]:
    """The middles of the two intervals beside the largest excess; none where that is at an end or not a number."""
    if not curve.barrier > 0:
        return []
    i = curve.t.index(curve.barrier_t)
    return [(curve.t[i - 1] + curve.t[i]) / 2, (curve.t[i] + curve.t[i + 1]) / 2]


def _layer_alone(layer: int, steps: Sequence[float], at_point: Mapping[Point, Tensor]) -> LayerLosses:
    """The path on which one decoder layer alone is interpolated."""
    points = [Point("aligned", 0.0), *(Point("aligned", at, frozenset({layer})) for at in steps)]
    return LayerLosses((0.0, *steps), torch.stack([at_point[point] for point in points]))


def _warn_of_losses_that_are_not_finite(losses: Mapping[str, Tensor], t: Sequence[float], dtype: str) -> None:
    for name, values in losses.items():
        bad = [f"{t[i]:.3g}" for i in (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()]
        if bad:
            advice = "; try --dtype float32" if dtype != "float32" else ""
            warnings.warn(f"{name} path: the loss is not finite at t = {', '.join(bad)}{advice}", stacklevel=3)


def _check_numbers(**values: tuple[int | None, int]) -> None:
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise InputError(f"{name.replace('_', '-')} {value}: expected at least {least}")


def _check_device(device: str | None) -> None:
    if device == "meta":
        raise InputError("device 'meta' holds no data; choose a real one")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used here: {error}") from error


def _text_source(
    text: Sequence[str | os.PathLike[str]],
    dataset: str | None,
    config: str | None,
    split: str,
    column: str,
    revision: str | None,
) -> Text:
    if bool(text) == (dataset is not None):
        raise InputError("give the text to evaluate on: either text files or one dataset")
    if dataset is None:
        return TextFiles.of(text, column)
    if "/" in dataset and looks_local(dataset) and not Path(dataset).expanduser().exists():
        raise InputError(f"{dataset}: no such folder (it looks like a local path, so the Hub was not asked)")
    if revision is not None and Path(dataset).expanduser().exists():
        raise InputError(f"dataset-revision {revision}: {dataset} is a folder here, which has no revisions; leave it out")
    return DatasetText(dataset, config, split, column, revision)


def _context(model: MoEModel, context: int | None) -> int:
    longest = getattr(model.text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if context is not None and context > longest:
        raise InputError(f"context {context}: {model.checkpoint.name} has positions for {longest} tokens")
    return context or min(DEFAULT_CONTEXT, longest)


def _common_tokenizer(a: MoEModel, b: MoEModel) -> PreTrainedTokenizerBase:
    """A's tokenizer, B's being the same.

    Raises:
        CheckpointError: A has none that transformers can load.
        MismatchError: vocabulary or special tokens differ.
    """
    of_a = _tokenizer(a)
    if of_a is None:
        raise CheckpointError(f"{a.checkpoint.name}: no tokenizer here; copy its files from the model it was made from")
    of_b = _tokenizer(b)
    if of_b is not None and (of_a.get_vocab(), of_a.all_special_ids) != (of_b.get_vocab(), of_b.all_special_ids):
        raise MismatchError(
            f"A ({a.checkpoint.name}) and B ({b.checkpoint.name}) have different tokenizers: their losses cannot be compared"
        )
    return of_a


def _tokenizer(model: MoEModel) -> PreTrainedTokenizerBase | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not set(names) & set(model.checkpoint.source.files()):
        return None
    model.checkpoint.source.fetch(model.checkpoint.side_files())
    folder = model.checkpoint.source.path("config.json").parent
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{model.checkpoint.name}: transformers cannot load its tokenizer ({error})") from error
    return tokenizer
