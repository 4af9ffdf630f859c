"""Which files `from_pretrained` takes for the weights of a model: by their names, or because another file names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

CONFIG = "config.json"
EXPLICIT = "transformers_weights"  # a key of config.json: the file, or index, to take before any other
NUMBERED = re.compile(r"model-\d+-of-\d+\.safetensors")
# A variant (model.fp16.safetensors) is taken by those who ask for it.
_WEIGHTS = re.compile(
    r"model(-\d+-of-\d+)?(\.[^/]+?)?(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?(\.[^/]+?)?(-\d+-of-\d+)?\.bin"
)
_INDEX = re.compile(r"(model\.safetensors|pytorch_model\.bin)\.index(\.[^/]+)?\.json")
_NAMED = re.compile(r".*\.(safetensors|bin|safetensors\.index\.json)")
_NEVER = re.compile(r"(original|onnx)/.*|(.*/)?adapter_[^/]*")
_ANOTHER_LAYOUT = re.compile(r"(consolidated|tf_model|flax_model)[^/]*|[^/]+\.gguf", re.IGNORECASE)


def weight_files(files: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The weights of a model among `files`, indices included.

    Adapters, GGUF files and what lies in `original/` or `onnx/` are none of them, whatever names them.

    Args:
        read: the JSON object in one of the files.

    Example:
        >>> files = ["model.safetensors.index.json", "part-1.safetensors", "symmetry.safetensors", "model.gguf"]
        >>> weight_files(files, lambda file: {"weight_map": {"lm_head.weight": "part-1.safetensors"}})
        ['model.safetensors.index.json', 'part-1.safetensors']
    """
    found = {file for file in files if is_weights(file)}
    explicit = read(CONFIG).get(EXPLICIT) if CONFIG in files else None
    named = {explicit} if isinstance(explicit, str) else set()
    for index in [file for file in found | named if file in files and file.endswith(".json")]:
        weight_map = read(index).get("weight_map")
        if isinstance(weight_map, dict):
            named |= {file for file in weight_map.values() if isinstance(file, str)}
    named = {file for file in named if file in files and _NAMED.fullmatch(file) and not _NEVER.fullmatch(file)}
    return sorted(found | named)


def is_weights(file: str) -> bool:
    """Whether a file is weights, or an index of weights, by its name alone."""
    return bool(_WEIGHTS.fullmatch(file) or _INDEX.fullmatch(file))


def other_layouts(files: Collection[str]) -> list[str]:
    """Files beside which hold whole models for other programs."""
    return sorted(file for file in files if _ANOTHER_LAYOUT.fullmatch(file))
