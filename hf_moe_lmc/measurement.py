"""The main job: the perplexity barrier between two checkpoints, on the naive and on the aligned path."""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe_lmc.alignment import align_models, download, load_symmetry, open_models
from hf_moe_lmc.curve import BarrierCurve
from hf_moe_lmc.distribution import team, together
from hf_moe_lmc.endpoints import Point
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.evaluation import Cost, EvaluationOptions, evaluate
from hf_moe_lmc.matching import OrderMethod, check_methods
from hf_moe_lmc.model import MoEModel
from hf_moe_lmc.output import begin, writing
from hf_moe_lmc.path import implementations, language_model_class
from hf_moe_lmc.perplexity import TOKENS_PER_BATCH, Windows, cut_windows
from hf_moe_lmc.report import BarrierReport, LayerLosses, Span
from hf_moe_lmc.routing import RoutingObserver
from hf_moe_lmc.streams import refuse_quantised
from hf_moe_lmc.symmetry import ModelSymmetry
from hf_moe_lmc.text import Text, text_source
from hf_moe_lmc.units import UnitMethod
from hf_moe_lmc.vocabulary import compare_tokenizers, different, read_vocabulary
from hf_moe_lmc.workplace import Workplace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONTEXT = 2048
LAYERWISE = 5  # inner points where `layers` alone is given


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
    check_methods(order, units)
    options = _Options(
        matching={"order": order, "units": units, "exact": exact},
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
            alignment = align_models(a, b, **options.matching, progress=progress)
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


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What `barrier` was asked for, but for models and text.

    Attributes:
        matching: options of `align_models`.
        others: as in `barrier`.
    """

    matching: dict[str, Any]
    points: int
    naive: bool
    context: int | None
    stride: int | None
    max_tokens: int | None
    batch_size: int | None
    dtype: str
    device: str | None
    activation_memory: int | None
    layerwise: int
    layers: str | None
    refine: int
    routing: bool

    def __post_init__(self) -> None:
        """Raises InputError where a value is out of range."""
        least = {"points": 2, "context": 2, "stride": 1, "max_tokens": 1, "batch_size": 1, "activation_memory": 1}
        for name, lowest in {**least, "layerwise": 0, "refine": 0}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"{name.replace('_', '-')} {value}: expected at least {lowest}")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        _check_device(self.device)

    @property
    def t(self) -> tuple[float, ...]:
        """The grid."""
        return tuple(i / (self.points - 1) for i in range(self.points))

    @property
    def steps(self) -> tuple[float, ...]:
        """Of the paths on which some layers alone leave A: the points behind A; none where these are not measured."""
        inner = self.layerwise or (LAYERWISE if self.layers is not None else 0)
        return tuple((i + 1) / (inner + 1) for i in range(inner + 1)) if inner else ()

    def evaluation(self, model_class: type[PreTrainedModel], context: int) -> EvaluationOptions:
        return EvaluationOptions(
            model_class=model_class,
            batch_size=self.batch_size or max(1, TOKENS_PER_BATCH // context),
            dtype=DTYPES[self.dtype],
            device=self.device,
            activation_memory=self.activation_memory,
        )


@dataclass(frozen=True)
class _Found:
    """What evaluations have found, one after the other.

    Attributes:
        losses: of each window, float64 [window], nats.
        routing: records as in report.json.
        facts: of the model that ran.
        problem: why there is no routing.
    """

    losses: dict[Point, Tensor]
    cost: Cost
    routing: list[dict[str, Any]]
    facts: dict[str, Any]
    problem: str | None

    def __or__(self, later: _Found) -> _Found:
        """With points that were added; the routing at points that both have is that of the first."""
        known = {(row["path"], row["t"]) for row in self.routing}
        rows = [*self.routing, *(row for row in later.routing if (row["path"], row["t"]) not in known)]
        rows.sort(key=lambda row: (row["path"], row["t"], row["layer"], row["module"]))
        cost = replace(self.cost, passes=self.cost.passes + later.cost.passes)
        return _Found(later.losses | self.losses, cost, rows, self.facts, self.problem)


@dataclass(frozen=True)
class _Measurement:
    """One pair of models, one text; everything has been checked.

    Attributes:
        symmetries: of the paths, `aligned` first.
        spans: first and last of the decoder layers that are also interpolated without the others.
    """

    a: MoEModel
    b: MoEModel
    symmetries: Mapping[str, ModelSymmetry]
    windows: Windows
    options: _Options
    spans: Sequence[Span]
    progress: Workplace | None

    def run(self) -> tuple[_Found, tuple[float, ...]]:
        """All points, those that `refine` adds included, and the grid with these."""
        t, options = self.options.t, self.options
        found = self.evaluate([*self.points(t), *(point for span in self.spans for point in self.alone(span))])
        for _ in range(options.refine):
            new = _beside_the_maximum(self.curve(found, t))
            if not new:
                break
            t = tuple(sorted({*t, *new}))
            # the routing at a point is compared with that at the ends, which have to run once more
            added = self.points((0.0, *new, 1.0)) if options.routing else self.points(new)
            found |= self.evaluate(added)
        return found, t

    def points(self, t: Sequence[float]) -> list[Point]:
        """Of all paths: A once, B on each, then what lies between, since observers compare with the ends."""
        ends = [_on(path, at) for at in (0.0, 1.0) if at in t for path in self.symmetries]
        between = [Point(path, at) for path in self.symmetries for at in t if 0 < at < 1]
        return list(dict.fromkeys([*ends, *between]))

    def alone(self, span: Span) -> list[Point]:
        """The path on which some decoder layers go from A to aligned B, without A."""
        layers = frozenset(range(span[0], span[1] + 1))
        return [Point("aligned", at, layers) for at in self.options.steps]

    def evaluate(self, points: Sequence[Point]) -> _Found:
        """Losses, and the routing where it is wanted, at some points."""
        mates, facts = team(), dict[str, Any]()
        watching = RoutingObserver(self.a, points) if self.options.routing else None
        losses, cost = evaluate(
            self.a,
            self.b,
            self.symmetries,
            points,
            self.windows,
            self.options.evaluation(language_model_class(self.a), self.windows.context),
            inspect_model=lambda model: facts.update(implementations(model, self.options.device)),
            observers=[watching] if watching else [],
            progress=self.progress,
        )
        at_point = dict(zip(points, losses, strict=True))
        if watching is None:
            return _Found(at_point, cost, [], facts, None)
        for number, tallies in enumerate(mates.exchange(watching.tallies)):
            if number != mates.rank:
                watching.add(tallies)
        return _Found(at_point, cost, watching.rows(), facts, watching.problem)

    def curve(self, found: _Found, t: Sequence[float]) -> BarrierCurve:
        """The aligned path."""
        tokens = float(self.windows.scored.sum())
        return BarrierCurve(tuple(t), tuple(float(found.losses[_on("aligned", at)].sum()) / tokens for at in t))

    def report(self, text: dict[str, Any], matching: dict[str, Any], started: float) -> BarrierReport:
        """Evaluates, and says what was found."""
        options = self.options
        found, t = self.run()
        losses = {path: torch.stack([found.losses[_on(path, at)] for at in t]) for path in self.symmetries}
        facts = dict(found.facts)
        if options.refine:
            facts["refined_t"] = [at for at in t if at not in options.t]
        if found.problem:
            facts["routing_unavailable"] = found.problem
        evaluation = self.options.evaluation(language_model_class(self.a), self.windows.context)
        numbers = {"dtype": options.dtype, "batch_size": evaluation.batch_size}
        return BarrierReport(
            a={**self.a.checkpoint.origin(), "source": self.a.checkpoint.name},
            b={**self.b.checkpoint.origin(), "source": self.b.checkpoint.name},
            evaluation={"text": text, **self.windows.describe(), **numbers, **facts, **vars(found.cost)},
            matching=matching,
            windows=self.windows,
            losses=losses,
            t=t,
            seconds=team().from_main(time.perf_counter() - started),
            layerwise={span: self.span_losses(span, found) for span in self.spans} if options.steps else None,
            routing=found.routing if options.routing and not found.problem else None,
        )

    def span_losses(self, span: Span, found: _Found) -> LayerLosses:
        points = [Point("aligned", 0.0), *self.alone(span)]
        return LayerLosses(tuple(point.t for point in points), torch.stack([found.losses[point] for point in points]))


def _on(path: str, t: float) -> Point:
    """The point at which a path is evaluated: A is on both, once."""
    return Point(path if t > 0 else "aligned", t)


def _beside_the_maximum(curve: BarrierCurve) -> list[float]:
    """The middles of the two intervals beside the largest excess; none where that is at an end or not a number."""
    if not curve.barrier > 0:
        return []
    i = curve.t.index(curve.barrier_t)
    return [(curve.t[i - 1] + curve.t[i]) / 2, (curve.t[i] + curve.t[i + 1]) / 2]


def _spans(layers: str | None, model: MoEModel) -> list[Span]:
    """First and last of the decoder layers that are interpolated together, from text such as `each,0-3,8`.

    `each` stands for every MoE layer by itself, and so does None.

    Raises:
        InputError: no such layers, or no such text.
    """
    found: list[Span] = []
    for word in ("each" if layers is None else layers).split(","):
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if word.strip() == "each":
            found += [(layer, layer) for layer in model.layers if layer < model.num_layers]
        elif numbers is None:
            raise InputError(f"layers {layers!r}: expected numbers, ranges and `each`, such as 0-3,8 or each,0-3")
        else:
            first, last = int(numbers[1]), int(numbers[2] or numbers[1])
            if not first <= last < model.num_layers:
                raise InputError(
                    f"layers {word.strip()}: {model.checkpoint.name} has decoder layers 0 to {model.num_layers - 1}; a range "
                    "goes from the lower to the higher"
                )
            found.append((first, last))
    return sorted(set(found), key=lambda span: (span[0] < span[1], span))


def _warn(report: BarrierReport) -> None:
    """Of what the reader of a report should know."""
    dtype, problem = report.evaluation["dtype"], report.evaluation.get("routing_unavailable")
    for name, values in report.losses.items():
        bad = [f"{report.t[i]:.3g}" for i in (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()]
        if bad:
            advice = "; try --dtype float32" if dtype != "float32" else ""
            warnings.warn(f"{name} path: the loss is not finite at t = {', '.join(bad)}{advice}", stacklevel=4)
    if problem:
        warnings.warn(f"{report.a['source']}: the routing cannot be watched: {problem}", stacklevel=4)
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=4)


def _check_device(device: str | None) -> None:
    if device == "meta":
        raise InputError("device 'meta' holds no data; choose a real one")
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {device!r} cannot be used here: {error}") from error


def _context(model: MoEModel, context: int | None) -> int:
    longest = getattr(model.text_config, "max_position_embeddings", None) or DEFAULT_CONTEXT
    if context is not None and context > longest:
        raise InputError(f"context {context}: {model.checkpoint.name} has positions for {longest} tokens")
    return context or min(DEFAULT_CONTEXT, longest)


def _common_tokenizer(a: MoEModel, b: MoEModel) -> PreTrainedTokenizerBase:
    """A's tokenizer, B's being the same: what their files could not tell (see `open_models`) is compared once they are loaded.

    Raises:
        CheckpointError: A has none that transformers can load.
        MismatchError: vocabulary or special tokens differ.
    """
    of_a = _tokenizer(a)
    if of_a is None:
        raise CheckpointError(f"{a.checkpoint.name}: no tokenizer here; copy its files from the model it was made from")
    if compare_tokenizers(a.checkpoint, b.checkpoint).complete:
        return of_a
    of_b = _tokenizer(b)
    if of_b is not None and (of_a.get_vocab(), of_a.all_special_ids) != (of_b.get_vocab(), of_b.all_special_ids):
        raise different(a.checkpoint, b.checkpoint, "  vocabulary or special ids, as transformers loads them")
    return of_a


def _tokenizer(model: MoEModel) -> PreTrainedTokenizerBase | None:
    if read_vocabulary(model.checkpoint) is None:
        return None
    model.checkpoint.source.fetch(model.checkpoint.side_files())
    folder = model.checkpoint.source.path("config.json").parent
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{model.checkpoint.name}: transformers cannot load its tokenizer ({error})") from error
    return tokenizer
