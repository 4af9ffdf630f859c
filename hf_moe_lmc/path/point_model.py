"""A point of the path as a transformers model, loaded from tensors that are interpolated as they are read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from hf_moe_lmc.errors import CheckpointError, listing
from hf_moe_lmc.moe.model_class import foreign, language_model_class
from hf_moe_lmc.path.cost import compute_device
from hf_moe_lmc.path.skeleton import warn_of_unused
from hf_moe_lmc.runtime.progress import quiet_transformers
from hf_moe_lmc.writing.streams import (
    ModelStream,
    whole,
)


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
    with foreign(model_class, "cannot be loaded"), _quiet_sequential_loading():
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
