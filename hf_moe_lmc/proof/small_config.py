"""Small configurations of any MoE architecture that transformers knows: the same class and switches, other sizes.

Rules give each field its small size by its name; layers are chosen so that every kind of them occurs.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_moe_lmc.errors import FamilyError

Values = dict[str, Any]

# No two sizes of a block coincide with the number of experts, so that every axis is known by its length.
WIDTH = 32
UNITS = 24
SHARED_UNITS = 40
DENSE_UNITS = 48
EXPERTS = 12
GROUPS = 4
TOP_GROUPS = 2
TOP_EXPERTS = 3
VOCABULARY = 128
HEADS = 4
LAYERS_AT_MOST = 6

# What code raises that meets values which it was not made for: rules a configuration of a kind that nobody has seen,
# a class of transformers sizes that its checkpoints never have.
MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# An original id below this stays; the rest is numbered down from the end of the vocabulary.
_KEPT_IDS = 96

_EXPERT_COUNT = re.compile(r"(num|moe_num|num_local|n_routed)_experts|num_routed_experts")
_EXPERT_UNITS = re.compile(r"moe_intermediate_size|expert_ffn_hidden_size")
_LAYER_COUNT = re.compile(r"(num_hidden_|n_|num_|(num_)?encoder_|(num_)?decoder_|conf_num_hidden_)?layers|n_layer|depth")
TOKEN_ID = re.compile(r"(.*_)?token_(id|ids|index)|codec_.*_id")
# Lists of layer numbers; `ple_layer_ids` counts from one.
_INDEX_LIST = re.compile(r"mlp_only_layers|moe_layers|(ple|local)_layer_ids|.*_(indexes|indices)")
# Lists with an entry per layer that may be longer than the model (entries of multi-token prediction at the end).
_LAYER_LIST = re.compile(r"(mlp_)?layer_types|layers_block_type|indexer_types|swiglu_limits(_shared)?|compress_ratios")
_MOE_KINDS = ("sparse", "moe", "hash_moe")
# Layer kinds that follow from the layer's number; such layers cannot be chosen freely, only cut after.
_PERIODS = ("attn_layer_period", "expert_layer_period")
# Keys that must not survive: the miniature is float32 and of this machine.
_DROPPED = (
    "quantization_config", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path",
    "linear_attn_config",  # sizes of the original, which the class has already spread over fields of its own
)  # fmt: skip


class _Sizes:
    """The original's values, for rules that depend on other fields of the same (sub)configuration."""

    def __init__(self, config: PreTrainedConfig, values: Values) -> None:
        self.values = values
        # A Hub config may carry foreign fields that the class does not read.
        declared = {field.name for field in dataclasses.fields(config)}
        self.own_expert_units = any(_EXPERT_UNITS.fullmatch(name) and name in declared for name in values)
        self.has_experts = any(_EXPERT_COUNT.fullmatch(name) for name in values)

    def first(self, *names: str) -> Any:
        """The first of these fields that is set."""
        return next((self.values[name] for name in names if self.values.get(name)), None)

    def of_layer(self, own: Values) -> _Sizes:
        """The same with the fields that a layer overrides."""
        layer = copy.copy(self)
        layer.values = self.values | own
        return layer

    def rotary_factor(self) -> float:
        """The smallest share of the head that is rotated."""
        return min(_factors(self.values.get("rope_parameters")), default=self.values.get("partial_rotary_factor") or 1.0)


def _factors(rope: Any) -> Iterator[float]:
    if isinstance(rope, Mapping):
        for name, value in rope.items():
            if name == "partial_rotary_factor" and value:
                yield value
            yield from _factors(value)


def _units(value: int, sizes: _Sizes) -> int:
    """`intermediate_size` is the experts' where they have no field of their own."""
    return UNITS if sizes.has_experts and not sizes.own_expert_units else DENSE_UNITS


def _key_value_heads(value: int, sizes: _Sizes) -> int:
    heads = sizes.first("num_attention_heads", "n_heads", "num_heads")
    return HEADS if value == heads else min(value, 2)


def _sliding_heads(value: int, sizes: _Sizes) -> int:
    return HEADS if value == sizes.first("num_attention_heads") else 2 * HEADS


def _head_dim(value: int, sizes: _Sizes) -> int:
    rotated = sizes.values.get("qk_rope_head_dim")
    if rotated and sizes.values.get("qk_nope_head_dim"):
        # the parts of a latent head keep their proportions: sums of them and rotated shares are stored as well
        return max(8, round(value / int(rotated)) * 8)
    # a quarter of 16 leaves no room for three sections of positions
    return 32 if sizes.rotary_factor() < 0.5 else 16


def _groups(value: int, sizes: _Sizes) -> int:
    return GROUPS if value > 1 else value


def _top_groups(value: int, sizes: _Sizes) -> int:
    groups = int(sizes.first("n_group", "num_expert_group") or 1)
    if groups == 1:
        return 1
    return TOP_GROUPS if value < groups else GROUPS


Size = int | Callable[[int, _Sizes], int]


def _at_most(limit: int) -> Callable[[int, _Sizes], int]:
    return lambda value, sizes: min(value, limit)


# The first rule whose pattern matches the whole name applies to every positive int of that field, also inside lists.
# Zero, None and booleans are switches and stay.
_RULES: list[tuple[str, Size]] = [
    # experts
    (_EXPERT_COUNT.pattern, EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts", _at_most(TOP_EXPERTS)),
    (r"n_group|num_expert_group", _groups),
    (r"topk_group", _top_groups),
    (r"zero_expert_num", 4),
    (r"(n|num|moe_num)_shared_experts?", _at_most(2)),
    (_EXPERT_UNITS.pattern, UNITS),
    (r".*shared_(experts?_)?intermediate_size|share_expert_dims?", SHARED_UNITS),
    (r"intermediate_size|ffn_hidden_size|d_ff|((en|de)coder_)?ffn_dim", _units),
    (r".*(intermediate_size|ffn_hidden_size|intermediate_size_mlp)|mlp_dim|projection_hidden_dim", DENSE_UNITS),
    (r"moe_hidden_size|moe_latent_size|router_hidden_size", 16),
    # attention
    (r"num_sliding_attention_heads|num_attention_heads_per_layer", _sliding_heads),
    (r"(.*_)?num_(global_)?(key_value|kv)_heads|kv_n_heads|.*_kv_heads", _key_value_heads),
    (r"linear_num_key_heads", 2),
    (r"heads_per_ngram", _at_most(8)),
    (r".*(num|n|num_attention|attention|value|linear_num)_heads", HEADS),
    (r"(global_|swa_|qk_|qk_nope_)?head_dim|kv_channels|d_kv", _head_dim),
    (r"(swa_)?qk_rope_head_dim|linear_head_dim|rotary_dim", 8),
    (r".*head_dim|mamba_d_head|d_rel", 16),
    (r".*lora_rank", 16),
    (r"hc_lowrank|gated_norm_rank|laurel_rank", 8),
    (r"o_groups", _at_most(2)),
    (r"rel_extent", 64),
    # state spaces
    (r"mamba_dt_rank", 4),
    (r"mamba_d_state|ssm_state_size", 16),
    (r"n_groups|mamba_n_groups", _at_most(2)),
    # vocabulary and positions
    (r"ngram_vocab_size_base", VOCABULARY),
    (r"split_ngram_parts", 4),
    (r"(.*_)?(vocab_size|vocab_size_per_layer_input|codebook_size)", VOCABULARY),
    (r"hidden_size_per_layer_input", 8),
    (r"num_position_embeddings|position_embedding_size", 16),
    # images and sound: towers are built, not run
    (r"image_size", 16),
    (r"patch_size|pos_emb_(height|width)", _at_most(4)),
    (r"(n|num)_mel_bins|feature_size", _at_most(16)),
    # layers that follow from others
    (r"num_sparse_(en|de)coder_layers|(en|de)coder_sparse_step|n_layers_per_attn_res_block", _at_most(2)),
    # what is left is as wide as the residual stream
    (r"(.*_)?hidden_sizes?|d_model|(.*_)?embed_dim|(downsample|output)_channels", WIDTH),
    (r"(.*_)?(in|out|input|output|decoder)_(dim|size)", WIDTH),
]
_COMPILED = [(re.compile(pattern), size) for pattern, size in _RULES]

# What the rules cannot know, by model type.
_OVERRIDES: dict[str, Values] = {
    # experts are pairs of keys: a square number
    "doge": {"num_experts": 16},
}

# Fields that a class leaves empty although its model cannot be built, or routes nothing, without them; checkpoints have
# them. Lists are repeated for all layers. Parts without a model type go by their class.
_UNSET: dict[str, Values] = {
    "DbrxAttentionConfig": {"rope_theta": 10000.0, "clip_qkv": 8.0},
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma_text": {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [22, 22, 20]}},
    "glm4v_moe_text": {"rope_parameters": {"mrope_section": [8, 12, 12]}},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 768},
    "qwen4_exp_text": {
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 128,
        "indexer_budget": 2048,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {"sliding_window": 512},
    "unlimited_ocr_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense", "sparse"]},
}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny configuration of the same class with the same switches.

    Args:
        config: The configuration of an MoE model of any size; composite ones are shrunk with all their parts.

    Returns:
        A new configuration; `config` itself is not changed.

    Raises:
        FamilyError: The configuration has no experts, or its class rejects the small sizes.
    """
    if not any(_moe(part) for part in parts(config)):
        raise FamilyError(
            f"{type(config).__name__} (model type {config.model_type!r}) has no experts. Expected: a configuration of a "
            "Mixture-of-Experts model. Check the model, or switch its MoE blocks on."
        )
    try:
        return type(config)(**_shrunk(config, _Ids()))
    except (*MISFITS, StrictDataclassError) as error:
        raise FamilyError(
            f"No miniature of {type(config).__name__} (model type {config.model_type!r}) can be made: {error}"
        ) from error


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and all that it contains."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _moe(config: PreTrainedConfig) -> bool:
    values = _values(config)
    if values.get("enable_moe_block") is False or values.get("is_moe") is False:
        return False
    return any(_EXPERT_COUNT.fullmatch(name) and value for name, value in values.items())


def _values(config: PreTrainedConfig) -> Values:
    """The original's fields, completed where the class leaves them empty."""
    values = config.to_dict()
    for name, default in _UNSET.get(config.model_type or type(config).__name__, {}).items():
        if isinstance(default, dict) and isinstance(values.get(name), dict):
            values[name] = default | values[name]
        elif values.get(name) is None:
            layers = int(values.get("num_hidden_layers") or 0)
            values[name] = (default * layers)[:layers] if isinstance(default, list) else default
    return values


class _Ids:
    """New token ids: distinct ones stay distinct, in all parts of a configuration."""

    def __init__(self) -> None:
        self.new: dict[int, int] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self(entry) for entry in value]
        if not isinstance(value, int) or isinstance(value, bool) or value < _KEPT_IDS:
            return value
        return self.new.setdefault(value, max(VOCABULARY - 1 - len(self.new), _KEPT_IDS))


def _shrunk(config: PreTrainedConfig, ids: _Ids) -> Values:
    values = _values(config)
    sizes = _Sizes(config, values)
    result: Values = {}
    for name, value in values.items():
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            result[name] = _shrunk(part, ids)
        elif name in _DROPPED:
            continue
        elif TOKEN_ID.fullmatch(name):
            result[name] = ids(value)
        elif name == "per_layer_config":
            result[name] = {
                int(layer): {key: _resized(key, entry, sizes.of_layer(own)) for key, entry in own.items()}
                for layer, own in value.items()
            }
        else:
            result[name] = _resized(name, value, sizes)
    _cut(values, result, _moe(config))
    _fit_rotary(result)
    result.update(_OVERRIDES.get(config.model_type, {}))
    return result


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _resized(name: str, value: Any, sizes: _Sizes) -> Any:
    size = next((size for pattern, size in _COMPILED if pattern.fullmatch(name)), None)
    if size is None:
        return copy.deepcopy(value)
    if isinstance(value, (list, tuple)):
        return [_resized(name, entry, sizes) for entry in value]
    if not _is_size(value):
        return value
    return size(value, sizes) if callable(size) else size


def _cut(values: Values, result: Values, sparse: bool) -> None:
    """Reduces `result` to a few representative layers of `values`."""
    counts = [name for name, value in values.items() if _LAYER_COUNT.fullmatch(name) and _is_size(value)]
    if any("coder" in name for name in counts):
        # encoder and decoder: every second layer is sparse after the rules
        result.update(dict.fromkeys(counts, 4 if sparse else 2))
        return
    total = values[counts[0]] if counts else len(values.get("layers_block_type") or ())
    if not total:
        return
    layers = [_features(values, layer, total) for layer in range(total)]
    routed = [sparse and _is_moe(values, layer) for layer in range(total)]
    if sparse and not any(routed):
        raise ValueError("it has experts, but no layer that uses them")
    chosen = _choose(layers, routed)
    if any((values.get(name) or 1) > 1 for name in _PERIODS):
        chosen = list(range(max(chosen) + 1))
    if sources := values.get("kv_source_layers"):
        chosen = sorted([*chosen, *({sources[layer] for layer in chosen} - set(chosen))])
    place: dict[int, int] = {}
    for position, layer in enumerate(chosen):
        place.setdefault(layer, position)
    moe = [position for position, layer in enumerate(chosen) if _is_moe(values, layer)]
    dense = [position for position in range(len(chosen)) if position not in moe]

    result.update(dict.fromkeys(counts, len(chosen)))
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


def _features(values: Values, layer: int, total: int) -> tuple[tuple[str, str], ...]:
    """Everything that tells kinds of layers apart."""
    found: dict[str, Any] = {"moe": _is_moe(values, layer)}
    for name, value in values.items():
        if name == "per_layer_config":
            own = {int(key): entry for key, entry in value.items()}.get(layer, {})
            found[name] = sorted(own)
        elif name == "kv_source_layers" and value:
            found[name] = value[layer] == layer
        elif _is_index_list(name, value):
            found[name] = layer + int(name == "ple_layer_ids") in value
        elif _is_layer_list(name, value, total):
            # many different numbers are sizes or strengths, and only whether there is one makes a kind
            few = len({str(entry) for entry in value}) <= 3
            found[name] = value[layer] if few or not isinstance(value[layer], (int, float)) else bool(value[layer])
        elif name == "num_kv_shared_layers" and value:
            found[name] = layer >= total - value
        elif name == "attn_layer_period":
            found[name] = layer % value == values["attn_layer_offset"]
    return tuple((name, str(value)) for name, value in found.items())


def _choose(layers: Sequence[tuple[tuple[str, str], ...]], moe: Sequence[bool]) -> list[int]:
    """As few layers as possible such that every kind occurs, and two MoE layers (two layers at least)."""
    first: dict[Any, int] = {}
    for layer, features in enumerate(layers):
        first.setdefault(features, layer)
    if len(first) > LAYERS_AT_MOST:
        # too many combinations: every feature by itself
        first = {}
        seen: set[tuple[str, str]] = set()
        for layer, features in enumerate(layers):
            if not seen.issuperset(features):
                seen.update(features)
                first[features] = layer
    chosen = set(first.values())
    for wanted in ([layer for layer, routed in enumerate(moe) if routed], range(len(layers))):
        # the later layers are the ordinary ones
        spare = [layer for layer in reversed(wanted) if layer not in chosen]
        while spare and len(chosen.intersection(wanted)) < 2:
            chosen.add(spare.pop())
    routed = [layer for layer in chosen if moe[layer]]
    # a lone MoE layer is taken twice
    return sorted([*chosen, *(routed if len(routed) == 1 else ())])


def _fit_rotary(result: Values) -> None:
    """Sections and factors per frequency must match the smaller heads."""
    heads = next((result[name] for name in ("num_attention_heads", "n_heads", "num_heads") if result.get(name)), HEADS)
    size = result.get("qk_rope_head_dim") or result.get("head_dim") or WIDTH // heads

    def fit(rope: Any, factor: float) -> None:
        if not isinstance(rope, dict):
            return
        factor = rope.get("partial_rotary_factor") or factor
        frequencies = int(size * factor) // 2
        for name, value in rope.items():
            if name == "mrope_section":
                # the sections of height and width must be equal
                section = (frequencies + 1) // len(value)
                rope[name] = [section] * (len(value) - 1) + [frequencies - section * (len(value) - 1)]
            elif name in ("long_factor", "short_factor"):
                rope[name] = value[:frequencies]
            else:
                fit(value, factor)

    for name in ("rope_parameters", "rope_scaling"):
        fit(result.get(name), result.get("partial_rotary_factor") or 1.0)
