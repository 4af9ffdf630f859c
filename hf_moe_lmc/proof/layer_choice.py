"""The layers that a small configuration keeps: as few as possible such that every kind of them occurs.

Worked example: DeepSeek-V3 has 3 dense layers and 58 MoE layers, all alike. Its small configuration keeps one dense layer and
two MoE layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hf_moe_lmc.proof.sizes import TOKEN_ID, Values, is_size

AT_MOST = 6

_LAYER_COUNT = re.compile(r"(num_hidden_|n_|num_|(num_)?encoder_|(num_)?decoder_|conf_num_hidden_)?layers|n_layer|depth")
# Lists of layer numbers; `ple_layer_ids` counts from one.
_INDEX_LIST = re.compile(r"mlp_only_layers|moe_layers|(ple|local)_layer_ids|.*_(indexes|indices)")
# Lists with an entry per layer that may be longer than the model (entries of multi-token prediction at the end).
_LAYER_LIST = re.compile(r"(mlp_)?layer_types|layers_block_type|indexer_types|swiglu_limits(_shared)?|compress_ratios")
_MOE_KINDS = ("sparse", "moe", "hash_moe")
# Layer kinds that follow from the layer's number; such layers cannot be chosen freely, only cut after.
_PERIODS = ("attn_layer_period", "expert_layer_period")

Kind = tuple[tuple[str, str], ...]  # whatever tells kinds of layers apart, by field


def keep_few_layers(values: Values, result: Values, has_experts: bool) -> None:
    """Reduces `result` to a few representative layers of `values`.

    Raises:
        ValueError: there are experts, but no layer that uses them.
    """
    counts = [name for name, value in values.items() if _LAYER_COUNT.fullmatch(name) and is_size(value)]
    if any("coder" in name for name in counts):
        # encoder and decoder: every second layer is sparse after the rules
        result.update(dict.fromkeys(counts, 4 if has_experts else 2))
        return
    total = values[counts[0]] if counts else len(values.get("layers_block_type") or ())
    if total:
        chosen = _chosen(values, total, has_experts)
        result.update(dict.fromkeys(counts, len(chosen)))
        _keep(values, result, chosen, total)


def _chosen(values: Values, total: int, has_experts: bool) -> list[int]:
    """Numbers of the original's layers, in order; a number may be there twice."""
    routed = [has_experts and _is_moe(values, layer) for layer in range(total)]
    if has_experts and not any(routed):
        raise ValueError("it has experts, but no layer that uses them")
    chosen = _one_of_each_kind([_kind(values, layer, total) for layer in range(total)], routed)
    if any((values.get(name) or 1) > 1 for name in _PERIODS):
        chosen = list(range(max(chosen) + 1))
    if sources := values.get("kv_source_layers"):
        chosen = sorted([*chosen, *({sources[layer] for layer in chosen} - set(chosen))])
    return chosen


def _keep(values: Values, result: Values, chosen: Sequence[int], total: int) -> None:
    """Fields of `result` that list or number layers, for the chosen ones alone."""
    place: dict[int, int] = {}
    for position, layer in enumerate(chosen):
        place.setdefault(layer, position)
    moe = [position for position, layer in enumerate(chosen) if _is_moe(values, layer)]
    dense = [position for position in range(len(chosen)) if position not in moe]
    for name, value in result.items():
        if name == "per_layer_config":
            result[name] = {position: value[layer] for position, layer in enumerate(chosen) if layer in value}
        elif name == "kv_source_layers" and value:
            result[name] = [place[value[layer]] for layer in chosen]
        elif _is_index_list(name, value):
            first = int(name == "ple_layer_ids")
            result[name] = [position + first for position, layer in enumerate(chosen) if layer + first in value]
        elif _is_layer_list(name, value, total):
            result[name] = [value[layer] for layer in chosen]
        elif name in ("first_k_dense_replace", "num_dense_layers") and value:
            result[name] = len(dense)
        elif name == "num_kv_shared_layers" and value:
            result[name] = sum(layer >= total - value for layer in chosen)
    if "decoder_sparse_step" in values:
        result.update(decoder_sparse_step=1, mlp_only_layers=dense)
    if "moe_layer_interval" in values:
        result.update(moe_layer_interval=1, moe_layer_start_index=min(moe), moe_layer_end_index=max(moe))


def _is_index_list(name: str, value: Any) -> bool:
    return isinstance(value, (list, tuple)) and _INDEX_LIST.fullmatch(name) is not None


def _is_layer_list(name: str, value: Any, total: int) -> bool:
    if not isinstance(value, (list, tuple)) or TOKEN_ID.fullmatch(name):
        return False
    return len(value) == total or (len(value) > total and _LAYER_LIST.fullmatch(name) is not None)


def _is_moe(values: Values, layer: int) -> bool:
    """Whether this layer of the original has experts, by whichever field says so."""
    kinds = values.get("mlp_layer_types") or [kind for kind in values.get("layers_block_type") or () if "moe" in kind]
    if kinds:
        return (values.get("mlp_layer_types") or values["layers_block_type"])[layer] in _MOE_KINDS
    if values.get("moe_layers") is not None:
        return layer in values["moe_layers"]
    if layer < (values.get("first_k_dense_replace") or values.get("num_dense_layers") or 0):
        return False
    if layer in (values.get("mlp_only_layers") or ()) or (layer + 1) % (values.get("decoder_sparse_step") or 1):
        return False
    if "moe_layer_interval" in values:
        inside = layer in range(values["moe_layer_start_index"], values["moe_layer_end_index"] + 1)
        return inside and not (layer + 1) % values["moe_layer_interval"]
    period = int(values.get("expert_layer_period") or 1)
    return layer % period == int(values.get("expert_layer_offset") or 0) % period


def _kind(values: Values, layer: int, total: int) -> Kind:
    features: dict[str, Any] = {"moe": _is_moe(values, layer)}
    for name, value in values.items():
        if name == "per_layer_config":
            features[name] = sorted({int(key): entry for key, entry in value.items()}.get(layer, {}))
        elif name == "kv_source_layers" and value:
            features[name] = value[layer] == layer
        elif _is_index_list(name, value):
            features[name] = layer + int(name == "ple_layer_ids") in value
        elif _is_layer_list(name, value, total):
            # many different numbers are sizes or strengths, and only whether there is one makes a kind
            few = len({str(entry) for entry in value}) <= 3
            features[name] = value[layer] if few or not isinstance(value[layer], (int, float)) else bool(value[layer])
        elif name == "num_kv_shared_layers" and value:
            features[name] = layer >= total - value
        elif name == "attn_layer_period":
            features[name] = layer % value == values["attn_layer_offset"]
    return tuple((name, str(value)) for name, value in features.items())


def _one_of_each_kind(kinds: Sequence[Kind], moe: Sequence[bool]) -> list[int]:
    """As few layers as possible such that every kind occurs, and two MoE layers (two layers at least)."""
    first: dict[Kind, int] = {}
    for layer, kind in enumerate(kinds):
        first.setdefault(kind, layer)
    if len(first) > AT_MOST:
        # too many combinations: every feature by itself
        first = {}
        seen: set[tuple[str, str]] = set()
        for layer, kind in enumerate(kinds):
            if not seen.issuperset(kind):
                seen.update(kind)
                first[kind] = layer
    chosen = set(first.values())
    for wanted in ([layer for layer, routed in enumerate(moe) if routed], range(len(kinds))):
        # the later layers are the ordinary ones
        spare = [layer for layer in reversed(wanted) if layer not in chosen]
        while spare and len(chosen.intersection(wanted)) < 2:
            chosen.add(spare.pop())
    routed = [layer for layer in chosen if moe[layer]]
    # a lone MoE layer is taken twice
    return sorted([*chosen, *(routed if len(routed) == 1 else ())])
