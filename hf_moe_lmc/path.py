"""The loss along the interpolation path: every point is a real transformers model, loaded from interpolated tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    PreTrainedModel,
)

from hf_moe_lmc.errors import CheckpointError, InputError, listing
from hf_moe_lmc.evaluation import compute_device
from hf_moe_lmc.model import ModelStream, MoEModel, whole
from hf_moe_lmc.progress import quiet_transformers


@dataclass(frozen=True)
class StreamedTensor:
    """One tensor of a stream as the loader of transformers takes it: nothing is read until it is indexed with `...`."""

    stream: ModelStream
    name: str

    def __getitem__(self, index: EllipsisType) -> Tensor:
        return whole(self.stream, self.name)


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
    _check_loaded(model.checkpoint.name, model_class.__name__, info)
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
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        found: Any = mapping.get(type(model.config), ())
        for model_class in found if isinstance(found, (tuple, list)) else (found,):
            if model_class.config_class is type(model.config):  # some are mapped to their text tower as well
                return cast("type[PreTrainedModel]", model_class)
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


def implementations(model: PreTrainedModel, device: str | None) -> dict[str, Any]:
    """What a report says of where and with which kernels a model ran."""
    return {
        "device": [str(compute_device(device))],
        "attention_implementation": model.config._attn_implementation,
        "experts_implementation": model.config._experts_implementation,
    }
