"""A point of the path as a transformers model, loaded from tensors that are interpolated as they are read."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from hf_moe_lmc.alignment import download, load_symmetry, open_models
from hf_moe_lmc.errors import CheckpointError, InputError, listing
from hf_moe_lmc.evaluation import compute_device
from hf_moe_lmc.interpolation import check_t
from hf_moe_lmc.model import MoEModel
from hf_moe_lmc.model_class import language_model_of
from hf_moe_lmc.progress import quiet_transformers
from hf_moe_lmc.skeleton import warn_of_unused
from hf_moe_lmc.streams import ModelStream, interpolated, refuse_quantised, whole
from hf_moe_lmc.symmetry import ModelSymmetry


@dataclass(frozen=True)
class StreamedTensor:
    """One tensor of a stream as the loader of transformers takes it: nothing is read until it is indexed with `...`."""

    stream: ModelStream
    name: str

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return whole(self.stream, self.name)


def load_interpolated(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    symmetry: str | os.PathLike[str] | ModelSymmetry | None,
    t: float,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> PreTrainedModel:
    """A point of the path as an ordinary transformers model, for `generate()` or an evaluation harness; nothing is written.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        symmetry: what takes B to A's coordinates, as `align` finds it; None takes B as it is.
        t: 0 is A, 1 is B.
        dtype: of the model; by default that of most of A's weights.
        device: put all of it there; by default accelerate's device map spreads it over GPUs, CPU and disk.

    Returns:
        The model in eval mode; its weights equal those of the merge that `merge` writes, loaded in `dtype`.

    Raises:
        InputError: the inputs do not fit, or t is not between 0 and 1.
    """
    check_t(t)
    folder = tempfile.mkdtemp(prefix="hf_moe_lmc-")  # what the device map puts on disk lives as long as the model
    try:
        with ExitStack() as stack:
            model_a, model_b = open_models(a, b, stack, ignore_extra_layers=True)
            refuse_quantised(model_a, model_b)
            language_model_class(model_a)
            given = load_symmetry(symmetry, model_b) if symmetry is not None else model_b.identity()
            download(model_a, model_b, given=given if symmetry is not None else None)
            stream = interpolated(model_a, model_b, given.layers, t)
            loaded = load_point(stream, dtype=dtype or _usual_dtype(model_a), device=device, offload_folder=Path(folder))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(loaded, shutil.rmtree, folder, ignore_errors=True)
    return loaded.train(False)


def _usual_dtype(model: MoEModel) -> torch.dtype:
    """The floating-point dtype that most bytes of a checkpoint are in."""
    sizes: dict[torch.dtype, int] = {}
    for info in model.checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


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
    model_class: Any = language_model_class(model)
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
    _check_loaded(model.checkpoint.name, model_class, info)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def placement(device: str | None) -> str | dict[str, str]:
    """The device map to load with: everything on `device`, or as accelerate sees fit."""
    return {"": device} if device else "auto"


def language_model_class(model: MoEModel) -> type[PreTrainedModel]:
    """The class of transformers that predicts the next token of a text with this model, composite ones included.

    Raises:
        InputError: there is none, so that perplexity has no meaning for it.
    """
    found = language_model_of(model.config)
    if found is not None:
        return found
    raise InputError(
        f"{model.checkpoint.name}: transformers has no language model of {type(model.config).__name__} that reads a text from "
        "left to right, so it has no perplexity; align, apply and merge work without one"
    )


@contextmanager
def _quiet_sequential_loading() -> Iterator[None]:
    """No progress bars of the loader, and no threads that read ahead of it: they could hold the model twice."""
    variable = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with quiet_transformers():
            yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _check_loaded(name: str, model_class: type[PreTrainedModel], info: Mapping[str, Any]) -> None:
    problems = [f"{key}: not in the checkpoint" for key in sorted(info["missing_keys"])]
    problems += [f"{key}: another shape" for key in sorted(map(str, info["mismatched_keys"]))]
    problems += [f"{key}: {error}" for key, error in dict(info.get("conversion_errors") or {}).items()]
    problems += [str(message) for message in info.get("error_msgs") or []]
    if problems:
        raise CheckpointError(f"{name}: transformers cannot load all of {model_class.__name__}:\n{listing(problems)}")
    warn_of_unused(name, model_class, info["unexpected_keys"])


def implementations(model: PreTrainedModel, device: str | None) -> dict[str, Any]:
    """What a report says of where and with which kernels a model ran."""
    return {
        "device": [str(compute_device(device))],
        "attention_implementation": model.config._attn_implementation,
        "experts_implementation": model.config._experts_implementation,
    }
