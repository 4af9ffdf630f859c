"""config.json as it is written: what of it matters, what a copy must not pass on, what no model can mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from hf_moe_lmc.errors import CheckpointError, Faults, shown, worded

# Differences in these say nothing about the function that the weights compute, or (`vocab_size`) are told by the tables.
COSMETIC_CONFIG = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "name_or_path", "num_nextn_predict_layers", "output_router_logits", "pad_token_id", "router_aux_loss_coef", "torch_dtype",
    "transformers_version", "use_cache", "_attn_implementation", "_experts_implementation", "attention_dropout",
    "aux_loss_alpha", "seq_aux", "pretraining_tp", "ep_size", "vocab_size",
}  # fmt: skip

# Absent, these are on in some classes.
ON_BY_DEFAULT = {"tie_word_embeddings", "norm_topk_prob"}

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


class Absent(Enum):
    """The value of a key that `with_changes` takes out."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


def with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with other values: where a key stands, in the whole or in the text model's; else in the text model's.

    A key whose value is ABSENT is taken out wherever it stands.

    Example:
        >>> with_changes({"text_config": {"vocab_size": 5}}, {"vocab_size": 7})
        {'text_config': {'vocab_size': 7}}
    """
    whole = dict(config)
    text = dict(whole["text_config"]) if isinstance(whole.get("text_config"), Mapping) else None
    for key, value in changes.items():
        places = [place for place in (whole, text) if place is not None and key in place]
        if value is ABSENT:
            for place in places:
                del place[key]
            continue
        for place in places or [whole if text is None else text]:
            place[key] = value
    return whole if text is None else {**whole, "text_config": text}


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
            found = shown(value) if abs(value) < 1 << 64 else "a number of more than 64 bits"
            faults.add(CheckpointError(f"{where}: {shown(key)} is {found}, expected at most {limit}; correct it"))
    faults.check()


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What may change what the weights compute, nested ones by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in COSMETIC_CONFIG:
            continue
        if isinstance(value, Mapping):
            found |= settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differing(a: Mapping[str, Any], b: Mapping[str, Any], *, only_common: bool = False) -> list[str]:
    """Settings that differ and may matter, in words. Whether one is off, null or absent is no difference.

    Args:
        only_common: both configurations are as written, where what one leaves out may be the default that the other states:
            what stands in one of them only is named together, in one line.
    """
    of_a, of_b = settings(a), settings(b)
    common = of_a.keys() & of_b.keys()
    found = [
        f"config.json: {shown(key)} is {worded(of_a.get(key))} in A and {worded(of_b.get(key))} in B; "
        "the path and a merge take A's"
        for key in sorted(common if only_common else of_a.keys() | of_b.keys())
        if not _alike(key, of_a.get(key), of_b.get(key))
    ]
    only_a, only_b = (sorted(key for key in one.keys() - common if not _alike(key, one[key], None)) for one in (of_a, of_b))
    alone = [
        f"only in {side}: {', '.join(map(shown, keys[:5]))}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for side, keys in (("A", only_a), ("B", only_b))
        if keys
    ]
    if only_common and alone:
        found.append(f"config.json: {'; '.join(alone)}; the path and a merge take A's")
    return found


def _alike(key: str, one: Any, other: Any) -> bool:
    off = (None,) if key.rpartition(".")[2] in ON_BY_DEFAULT else (None, False)
    return bool(one == other) or all(any(value is each for each in off) for value in (one, other))
