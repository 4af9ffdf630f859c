"""Small configurations of any MoE architecture that transformers knows: the same class and switches, other sizes.

Each field takes its small size from a rule for its name (`sizes`). Layers are chosen so that every kind of them occurs
(`layer_choice`). Token ids are numbered anew, and rotary embeddings fit the smaller heads.

Worked example: of DeepSeek-V3 with 61 layers of 256 experts, 3 layers of 12 experts remain, in 4 groups of which 2 are chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.proof.layer_choice import keep_few_layers
from hf_moe_lmc.proof.sizes import EXPERT_COUNT, HEADS, TOKEN_ID, VOCABULARY, WIDTH, OriginalFields, Values, resized

# What rules and constructors raise on values that they were not made for.
REJECTIONS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

# An original id below this stays; the rest is numbered down from the end of the vocabulary.
_KEPT_IDS = 96

# Keys that must not survive: the miniature is float32 and of this machine.
_DROPPED = (
    "quantization_config", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path",
    "linear_attn_config",  # sizes of the original, which the class has already spread over fields of its own
)  # fmt: skip


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


def shrink(config: PreTrainedConfig, scale: int = 1) -> PreTrainedConfig:
    """A tiny configuration of the same class with the same switches.

    Args:
        config: The configuration of an MoE model of any size; composite ones are shrunk with all their parts.
        scale: What widths are multiplied by: those of the residual stream, of experts and of dense layers.

    Returns:
        A new configuration; `config` itself is not changed.

    Raises:
        FamilyError: The configuration has no experts, or its class rejects the small sizes.
    """
    if not has_experts(config):
        raise FamilyError(
            f"{type(config).__name__} (model type {config.model_type!r}) has no experts. Expected: a configuration of a "
            "Mixture-of-Experts model. Check the model, or switch its MoE blocks on."
        )
    try:
        return type(config)(**_shrunk(config, _Ids(), scale))
    except (*REJECTIONS, StrictDataclassError) as error:
        raise FamilyError(
            f"No miniature of {type(config).__name__} (model type {config.model_type!r}) can be made: {error}"
        ) from error


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether a configuration, or one that it contains, is of a Mixture-of-Experts model."""
    return any(_has_experts(part) for part in parts(config))


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The configuration and all that it contains."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _has_experts(config: PreTrainedConfig) -> bool:
    values = _values(config)
    if values.get("enable_moe_block") is False or values.get("is_moe") is False:
        return False
    return any(EXPERT_COUNT.fullmatch(name) and value for name, value in values.items())


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


def _shrunk(config: PreTrainedConfig, ids: _Ids, scale: int) -> Values:
    values = _values(config)
    fields = OriginalFields(config, values, scale)
    result: Values = {}
    for name, value in values.items():
        part = vars(config).get(name)
        if isinstance(part, PreTrainedConfig):
            result[name] = _shrunk(part, ids, scale)
        elif name in _DROPPED:
            continue
        elif TOKEN_ID.fullmatch(name):
            result[name] = ids(value)
        elif name == "per_layer_config":
            result[name] = {
                int(layer): {key: resized(key, entry, fields.of_layer(overridden)) for key, entry in overridden.items()}
                for layer, overridden in value.items()
            }
        else:
            result[name] = resized(name, value, fields)
    keep_few_layers(values, result, _has_experts(config))
    _fit_rotary(result, WIDTH * scale)
    result.update(_OVERRIDES.get(config.model_type, {}))
    return result


def _fit_rotary(result: Values, width: int) -> None:
    """Sections and factors per frequency must match the smaller heads."""
    heads = next((result[name] for name in ("num_attention_heads", "n_heads", "num_heads") if result.get(name)), HEADS)
    size = result.get("qk_rope_head_dim") or result.get("head_dim") or width // heads

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
