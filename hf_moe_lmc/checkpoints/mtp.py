"""Multi-token prediction: layers beside a model's own that draft further tokens, and that its forward pass never reads.

They follow the last layer (DeepSeek-V3, GLM-4.5), or stand under a prefix of their own (Qwen3-Next, MiMo). transformers drops
them when it loads, so what it saves has none; the configuration goes on counting them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Tensors under a prefix of their own: mtp.fc.weight, model.mtp.layers.0.., model.mtp_block.0.., llm.mtp...
OWN_PREFIX = re.compile(r"(?:[^.]+\.)*?mtp(?:_[^.]+)?\..+")
# What a layer that follows the last one holds, and no layer of the model.
MARKS = re.compile(r"(?:.*\.)?(?:eh_proj|enorm|hnorm|shared_head|embed_tokens)\..+")
ONLY_EXTRA = "only a layer for multi-token prediction has (eh_proj)"  # in words
# What configurations call the number of these layers.
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers", "num_mtp_modules")


def has_own_prefix(name: str) -> bool:
    """Whether a tensor stands under a prefix for multi-token prediction.

    Example:
        >>> has_own_prefix("model.mtp.layers.0.mlp.up_proj.weight"), has_own_prefix("model.layers.61.eh_proj.weight")
        (True, False)
    """
    return "mtp" in name and OWN_PREFIX.fullmatch(name) is not None


def uncounted(config: Mapping[str, Any], counts: tuple[str, ...] = COUNTS) -> dict[str, Any]:
    """Changes that make config.json count no layers for multi-token prediction.

    Example:
        >>> uncounted({"text_config": {"mtp_num_hidden_layers": 1}})
        {'mtp_num_hidden_layers': 0}
    """
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, Mapping) else [config]
    return {key: 0 for key in counts if any(place.get(key) for place in places)}
