"""Tiny random checkpoints of every family, made once per session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=6, num_experts_per_tok=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
    ),
    # square experts (unit = model): orientation cannot be told from shapes
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
    "olmoe": lambda: transformers.OlmoeConfig(**COMMON, num_experts=6, num_experts_per_tok=2),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**COMMON, **LATENT_ATTENTION, topk_method="group_limited_greedy"),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**COMMON, **LATENT_ATTENTION),
}
LAYOUTS = ("per-expert", "fused")
TABLE = [(family, layout) for family in CONFIGS for layout in LAYOUTS]
GROUPED = ("deepseek_v2", "deepseek_v3")


def make_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A model with weights large enough that every part of a block shows in the logits; `changes` of its configuration."""
    torch.manual_seed(seed)
    config = CONFIGS[family]()
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.ndim > 1:
                tensor.normal_(std=1.0 if ("gate.weight" in name or "embed" in name) else 0.35)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.3)
    return model


def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens; with `bos` it opens every text with a BOS by itself."""
    special = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def save(model: PreTrainedModel, folder: Path, layout: str, shard: str = "5GB", bos: bool = False) -> Path:
    """Saves with tokenizer, in the Hub's per-expert layout or in the fused one."""
    model.save_pretrained(folder, save_original_format=layout == "per-expert", max_shard_size=shard)
    tokenizer(bos).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(4 * 48).view(4, 48) * 7 % VOCABULARY
    with torch.no_grad():
        return model(ids.to(model.device)).logits.cpu()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever its shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], file: str = "model.safetensors") -> None:
    """Rewrites one shard of a checkpoint after `change` has been at its tensors."""
    content = load_file(folder / file)
    change(content)
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, folder / file, {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    """Sets keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
