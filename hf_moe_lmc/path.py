"""The loss along the interpolation path: every point is a real transformers model, loaded from interpolated tensors."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
import transformers
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_moe_lmc.alignment import align_models, load_symmetry, open_models, warn_if_recorded_for_another
from hf_moe_lmc.errors import CheckpointError, InputError, MismatchError, listing
from hf_moe_lmc.hub import looks_local
from hf_moe_lmc.interpolation import interpolated
from hf_moe_lmc.matching import OrderMethod, UnitMethod, check_methods
from hf_moe_lmc.model import ModelStream, MoEModel
from hf_moe_lmc.output import FolderWriter, check_output
from hf_moe_lmc.perplexity import TOKENS_PER_BATCH, DatasetText, Text, TextFiles, Windows, cut_windows, window_losses
from hf_moe_lmc.report import BarrierReport
from hf_moe_lmc.symmetry import ModelSymmetry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_CONTEXT = 2048


@dataclass(frozen=True)
class StreamedTensor:
    """One tensor of a stream as the loader of transformers takes it: nothing is read until it is indexed with `...`."""

    stream: ModelStream
    name: str

    def __getitem__(self, index: EllipsisType) -> Tensor:
        info = self.stream.template.tensors[self.name]
        values: Tensor | None = None
        for first, piece in self.stream.pieces(self.name):
            if values is None:
                values = torch.empty(info.numel, dtype=piece.dtype)
            values[first : first + piece.numel()] = piece.reshape(-1)
        return torch.empty(info.shape, dtype=info.dtype) if values is None else values.view(info.shape)


def load_point(stream: ModelStream, *, dtype: torch.dtype, device: str | None, offload_folder: Path) -> PreTrainedModel:
    """The transformers model of one point of a path, placed by accelerate's device map.

    Values come from the stream in float32 and are cast once, to `dtype`: with `dtype` that of the checkpoint, the weights
    equal those of the written merge. Multi-token-prediction layers are not loaded, as perplexity has no use for them.

    Memory: one model in `dtype`, spread over GPUs, CPU and disk by the device map (everything on `device` if one is
    given), and while loading one fused layer's experts, twice in `dtype` and once in float32.

    Raises:
        CheckpointError: transformers finds no tensor for one of its parameters.
    """
    model = stream.model
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    tensors = {name: StreamedTensor(stream, name) for name in stream.template.tensors if not model.is_extra(name)}
    with _quiet_sequential_loading():
        loaded, info = model_class.from_pretrained(
            None,
            config=model.config,
            state_dict=tensors,
            dtype=dtype,
            device_map=placement(device),
            offload_folder=str(offload_folder),
            output_loading_info=True,
        )
    _check_loaded(model.checkpoint.name, model_class.__name__, info)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def placement(device: str | None) -> str | dict[str, str]:
    """The device map to load with: everything on `device`, or as accelerate sees fit."""
    return {"": device} if device else "auto"


@contextmanager
def _quiet_sequential_loading() -> Iterator[None]:
    """No progress bars of the loader, and no threads that read ahead of it: they could hold the model twice."""
    logging = transformers.utils.logging
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before, bars, verbosity = os.environ.get(variable), logging.is_progress_bar_enabled(), logging.get_verbosity()
    os.environ[variable] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_loaded(name: str, model_class: str, info: Mapping[str, Any]) -> None:
    problems = [f"{key}: not in the checkpoint" for key in sorted(info["missing_keys"])]
    problems += [f"{key}: another shape" for key in sorted(map(str, info["mismatched_keys"]))]
    problems += [f"{key}: {error}" for key, error in dict(info.get("conversion_errors") or {}).items()]
    problems += [str(message) for message in info.get("error_msgs") or []]
    if problems:
        raise CheckpointError(f"{name}: transformers cannot load all of {model_class}:\n{listing(problems)}")
    if info["unexpected_keys"]:
        unused = listing(sorted(info["unexpected_keys"]))
        warnings.warn(f"{name}: {model_class} does not use these tensors:\n{unused}", stacklevel=4)


def evaluate_path(
    a: MoEModel,
    b: MoEModel,
    symmetries: Mapping[str, ModelSymmetry],
    t: Sequence[float],
    windows: Windows,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    batch_size: int,
    inspect_model: Callable[[PreTrainedModel], None] = lambda model: None,
) -> dict[str, Tensor]:
    """Losses of theta_t = (1 - t) A + t (g B) for each of `symmetries` g: {name: float64 [point, window]}, nats.

    A itself (t = 0) is evaluated once for all paths. Each point reads both checkpoints once, from the page cache where
    they fit it.

    Args:
        inspect_model: called with the first model loaded.
    """
    losses = {name: torch.empty(len(t), len(windows.rows), dtype=torch.float64) for name in symmetries}
    points = [(name, i) for name in symmetries for i in range(len(t))]
    at_a: Tensor | None = None
    with tqdm(total=len(points) * len(windows.rows), desc="evaluating the path", unit="window") as progress:
        for name, i in points:
            if t[i] == 0 and at_a is not None:
                losses[name][i] = at_a
                progress.update(len(windows.rows))
                continue
            with tempfile.TemporaryDirectory(prefix="hf_moe_lmc-") as offload_folder:
                stream = interpolated(a, b, symmetries[name], t[i])
                model = load_point(stream, dtype=dtype, device=device, offload_folder=Path(offload_folder))
                if at_a is None:
                    inspect_model(model)
                losses[name][i] = window_losses(model, windows, batch_size=batch_size, progress=progress.update)
                del model
            if t[i] == 0:
                at_a = losses[name][i]
    return losses


def barrier(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    dataset: str | None = None,
    dataset_config: str | None = None,
    split: str = "test",
    column: str = "text",
    points: int = 25,
    naive: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    context: int | None = None,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> BarrierReport:
    """Measures the perplexity barrier between two checkpoints, naive and aligned.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        output: a new or empty folder for report.json, report.md, barrier.png and symmetry.safetensors.
        text: a UTF-8 file or several, each one document; or `dataset`, whose rows are documents.
        points: grid points from t = 0 to t = 1, both included.
        naive: evaluate the path to B as it is, too.
        symmetry: a saved or given symmetry instead of matching.
        context: tokens per window, by default 2048 or the model's maximum if that is less.
        max_tokens: tokens of text to read; None reads everything.
        batch_size: windows per forward pass, by default about 4096 tokens' worth.
        dtype: in which the models run: float32, bfloat16 or float16.
        device: put each model there; by default accelerate's device map spreads it over GPUs, CPU and disk.

    Raises:
        InputError: the inputs do not fit, before anything is written.
    """
    started = time.perf_counter()
    check_methods(order, units)
    _check_numbers(points=(points, 2), context=(context, 2), max_tokens=(max_tokens, 1), batch_size=(batch_size, 1))
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    _check_device(device)
    check_output(output)
    files = [text] if isinstance(text, str | os.PathLike) else text
    source = _text_source(files, dataset, dataset_config, split, column)
    with ExitStack() as stack:
        model_a, model_b = open_models(a, b, stack, ignore_extra_layers=True)
        given = load_symmetry(symmetry, model_b) if symmetry is not None else None
        writer = FolderWriter(output, [model_a.checkpoint, model_b.checkpoint])
        tokenizer = _common_tokenizer(model_a, model_b)
        length = _context(model_a, context)
        windows = cut_windows(source.documents(), tokenizer, context=length, max_tokens=max_tokens)
        with writer:
            for model in (model_a, model_b):
                model.checkpoint.download()
            if given is not None:
                warn_if_recorded_for_another(given, model_b)
            alignment = None if given else align_models(model_a, model_b, order=order, units=units)
            used = alignment.symmetry if alignment else given or model_b.identity()
            batch = batch_size or max(1, TOKENS_PER_BATCH // length)
            implementations: dict[str, Any] = {}
            grid = tuple(i / (points - 1) for i in range(points))
            losses = evaluate_path(
                model_a,
                model_b,
                {"aligned": used, **({"naive": model_b.identity()} if naive else {})},
                grid,
                windows,
                dtype=DTYPES[dtype],
                device=device,
                batch_size=batch,
                inspect_model=lambda model: implementations.update(_implementations(model)),
            )
            _warn_of_losses_that_are_not_finite(losses, grid, dtype)
            report = BarrierReport(
                a={**model_a.checkpoint.origin(), "source": model_a.checkpoint.name},
                b={**model_b.checkpoint.origin(), "source": model_b.checkpoint.name},
                evaluation={
                    "text": source.describe(),
                    **windows.describe(),
                    "dtype": dtype,
                    "batch_size": batch,
                    **implementations,
                },
                matching=alignment.to_dict()
                if alignment
                else {
                    "symmetry": None if isinstance(symmetry, ModelSymmetry) else str(symmetry),
                    **used.metadata,
                },
                windows=windows,
                losses=losses,
                t=grid,
                seconds=time.perf_counter() - started,
            )
            used.save(writer.path("symmetry.safetensors"))
            writer.write_text("report.json", report.to_json())
            writer.write_text("report.md", report.to_markdown())
            report.plot(writer.path("barrier.png"))
    return report


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
    text: Sequence[str | os.PathLike[str]], dataset: str | None, config: str | None, split: str, column: str
) -> Text:
    if bool(text) == (dataset is not None):
        raise InputError("give the text to evaluate on: either text files or one dataset")
    if dataset is None:
        return TextFiles.of(text)
    if "/" in dataset and looks_local(dataset) and not Path(dataset).expanduser().exists():
        raise InputError(f"{dataset}: no such folder (it looks like a local path, so the Hub was not asked)")
    return DatasetText(dataset, config, split, column)


def _context(model: MoEModel, context: int | None) -> int:
    longest = getattr(model.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
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


def _implementations(model: PreTrainedModel) -> dict[str, Any]:
    devices = sorted({str(device) for device in getattr(model, "hf_device_map", {"": model.device}).values()})
    return {
        "device": devices,
        "attention_implementation": model.config._attn_implementation,
        "experts_implementation": model.config._experts_implementation,
    }
