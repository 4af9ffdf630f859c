"""config.json as written: the settings that matter, the switches that a copy drops, the numbers that are refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_moe_lmc.errors import CheckpointError, Faults, shown

# Differences in these say nothing about the function that the weights compute.
COSMETIC_CONFIG = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "name_or_path", "num_nextn_predict_layers", "output_router_logits", "pad_token_id", "router_aux_loss_coef", "torch_dtype",
    "transformers_version", "use_cache", "_attn_implementation", "_experts_implementation", "attention_dropout",
    "aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size",
}  # fmt: skip

# What makes transformers fetch or run code from elsewhere: modules of a repository, kernels from the Hub, pipelines.
FOREIGN_SWITCHES = {
    "auto_map", "custom_pipelines", "custom_generate", "trust_remote_code", "attn_implementation", "_attn_implementation",
    "_attn_implementation_internal", "_attn_implementation_autoset", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "use_kernels",
}  # fmt: skip

# Layers, experts and the like, and classes: transformers makes lists as long as it is told.
COUNT_LIMIT, LABEL_LIMIT = 10_000, 100_000
_COUNTS = re.compile(r".*(layers?|experts?|blocks?|groups?|heads?|stages?|codebooks?|(labels?))")


def without_foreign_switches(value: Any) -> Any:
    """A JSON value without the switches to foreign code, at every level: for config.json and the other configurations."""
    if isinstance(value, Mapping):
        return {key: without_foreign_switches(inner) for key, inner in value.items() if key not in FOREIGN_SWITCHES}
    if isinstance(value, list):
        return [without_foreign_switches(inner) for inner in value]
    return value


def check_counts(where: str, config: Mapping[str, Any]) -> None:
    """Refuses numbers of layers, experts and the like that no model has, before anything of that length is made.

    Raises:
        CheckpointError: one fault for each.
    """
    faults = Faults()
    for key, value in _entries(config):
        match = _COUNTS.fullmatch(key.rpartition(".")[2])
        limit = LABEL_LIMIT if match and match[2] else COUNT_LIMIT
        if match and type(value) is int and abs(value) > limit:
            number = shown(value) if abs(value) < 1 << 64 else "a number of more than 64 bits"
            faults.add(CheckpointError(f"{where}: {shown(key)} is {number}, expected at most {limit}; correct it"))
    faults.check()


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that may change what the weights compute. Nested ones have dotted keys."""
    result: dict[str, Any] = {}
    for key, value in config.items():
        if key in COSMETIC_CONFIG:
            continue
        if isinstance(value, Mapping):
            result |= settings(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def differing(a: Mapping[str, Any], b: Mapping[str, Any], *, only_common: bool = False) -> list[str]:
    """Settings that differ, as lines of text.

    Args:
        only_common: for configurations as written, where one may leave out a default that the other states. Keys that only
            one of them has are then named together, in one line.
    """
    settings_a, settings_b = settings(a), settings(b)
    common = settings_a.keys() & settings_b.keys()
    lines = [
        f"config.json: {shown(key)} is {_short(settings_a.get(key))} in A and {_short(settings_b.get(key))} in B; "
        "the path and a merge take A's"
        for key in sorted(common if only_common else settings_a.keys() | settings_b.keys())
        if settings_a.get(key) != settings_b.get(key)
    ]
    alone = [
        f"only in {side}: {', '.join(map(shown, keys[:5]))}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for side, keys in (("A", sorted(settings_a.keys() - common)), ("B", sorted(settings_b.keys() - common)))
        if keys
    ]
    if only_common and alone:
        lines.append(f"config.json: {'; '.join(alone)}; the path and a merge take A's")
    return lines


def _short(value: Any) -> str:
    return shown(repr(value))
