"""The small size of each field of a configuration, by the field's name.

A field takes the first rule whose pattern matches its whole name. The rule replaces every positive int of the field, inside
lists as well. Zero, None and booleans are switches and stay. A field without a rule stays as it is.

Worked example: `resized("n_routed_experts", 256, fields)` is 12, and `resized("hidden_act", "silu", fields)` is "silu".
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

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

EXPERT_COUNT = re.compile(r"(num|moe_num|num_local|n_routed)_experts|num_routed_experts")
EXPERT_UNITS = re.compile(r"moe_intermediate_size|expert_ffn_hidden_size")
TOKEN_ID = re.compile(r"(.*_)?token_(id|ids|index)|codec_.*_id")


class OriginalFields:
    """The original's values, for rules that depend on other fields of the same (sub)configuration.

    Attributes:
        scale: what widths are multiplied by: those of the residual stream, of experts and of dense layers.
    """

    def __init__(self, config: PreTrainedConfig, values: Values, scale: int = 1) -> None:
        self.values = values
        self.scale = scale
        # A Hub config may carry foreign fields that the class does not read.
        declared = {field.name for field in dataclasses.fields(config)}
        self.has_expert_units = any(EXPERT_UNITS.fullmatch(name) and name in declared for name in values)
        self.has_experts = any(EXPERT_COUNT.fullmatch(name) for name in values)

    def first(self, *names: str) -> Any:
        """The first of these fields that is set."""
        return next((self.values[name] for name in names if self.values.get(name)), None)

    def of_layer(self, overridden: Values) -> OriginalFields:
        """The same with the fields that a layer overrides."""
        layer = copy.copy(self)
        layer.values = self.values | overridden
        return layer

    def rotary_factor(self) -> float:
        """The smallest share of the head that is rotated."""
        return min(_rotary_factors(self.values.get("rope_parameters")), default=self.values.get("partial_rotary_factor") or 1.0)


def _rotary_factors(rope: Any) -> Iterator[float]:
    if isinstance(rope, Mapping):
        for name, value in rope.items():
            if name == "partial_rotary_factor" and value:
                yield value
            yield from _rotary_factors(value)


def _units(value: int, fields: OriginalFields) -> int:
    """`intermediate_size` is the experts' where they have no field of their own."""
    return fields.scale * (UNITS if fields.has_experts and not fields.has_expert_units else DENSE_UNITS)


def _key_value_heads(value: int, fields: OriginalFields) -> int:
    heads = fields.first("num_attention_heads", "n_heads", "num_heads")
    return HEADS if value == heads else min(value, 2)


def _sliding_heads(value: int, fields: OriginalFields) -> int:
    return HEADS if value == fields.first("num_attention_heads") else 2 * HEADS


def _head_dim(value: int, fields: OriginalFields) -> int:
    rotated = fields.values.get("qk_rope_head_dim")
    if rotated and fields.values.get("qk_nope_head_dim"):
        # the parts of a latent head keep their proportions: sums of them and rotated shares are stored as well
        return max(8, round(value / int(rotated)) * 8)
    # a quarter of 16 leaves no room for three sections of positions
    return 32 if fields.rotary_factor() < 0.5 else 16


def _groups(value: int, fields: OriginalFields) -> int:
    return GROUPS if value > 1 else value


def _top_groups(value: int, fields: OriginalFields) -> int:
    groups = int(fields.first("n_group", "num_expert_group") or 1)
    if groups == 1:
        return 1
    return TOP_GROUPS if value < groups else GROUPS


Size = int | Callable[[int, OriginalFields], int]


def _at_most(limit: int) -> Callable[[int, OriginalFields], int]:
    return lambda value, fields: min(value, limit)


def _scaled(size: int) -> Size:
    return lambda value, fields: fields.scale * size


_RULES: list[tuple[str, Size]] = [
    # experts
    (EXPERT_COUNT.pattern, EXPERTS),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_?k|top_k_experts", _at_most(TOP_EXPERTS)),
    (r"n_group|num_expert_group", _groups),
    (r"topk_group", _top_groups),
    (r"zero_expert_num", 4),
    (r"(n|num|moe_num)_shared_experts?", _at_most(2)),
    (EXPERT_UNITS.pattern, _scaled(UNITS)),
    (r".*shared_(experts?_)?intermediate_size|share_expert_dims?", _scaled(SHARED_UNITS)),
    (r"intermediate_size|ffn_hidden_size|d_ff|((en|de)coder_)?ffn_dim", _units),
    (r".*(intermediate_size|ffn_hidden_size|intermediate_size_mlp)|mlp_dim|projection_hidden_dim", _scaled(DENSE_UNITS)),
    (r"moe_hidden_size|moe_latent_size|router_hidden_size", _scaled(16)),
    # attention
    (r"num_sliding_attention_heads|num_attention_heads_per_layer", _sliding_heads),
    (r"(.*_)?num_(global_)?(key_value|kv)_heads|kv_n_heads|.*_kv_heads", _key_value_heads),
    (r"linear_num_key_heads", 2),
    (r"heads_per_ngram", _at_most(8)),
    (r".*(num|n|num_attention|attention|value|linear_num)_heads", HEADS),
    (r"(global_|swa_|qk_|qk_nope_)?head_dim|kv_channels|d_kv", _head_dim),
    (r"(swa_)?qk_rope_head_dim|linear_head_dim|rotary_dim", 8),
    (r"mamba_d_head", _scaled(16)),
    (r".*head_dim|d_rel", 16),
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
    (r"(.*_)?hidden_sizes?|d_model|(.*_)?embed_dim|(downsample|output)_channels", _scaled(WIDTH)),
    (r"(.*_)?(in|out|input|output|decoder)_(dim|size)", _scaled(WIDTH)),
]
_COMPILED = [(re.compile(pattern), size) for pattern, size in _RULES]


def is_size(value: Any) -> bool:
    """Whether a field counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def resized(name: str, value: Any, fields: OriginalFields) -> Any:
    """The small value of a field, by its rule."""
    size = next((size for pattern, size in _COMPILED if pattern.fullmatch(name)), None)
    if size is None:
        return copy.deepcopy(value)
    if isinstance(value, (list, tuple)):
        return [resized(name, entry, fields) for entry in value]
    if not is_size(value):
        return value
    return size(value, fields) if callable(size) else size
