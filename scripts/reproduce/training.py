"""The paper's protocol (Sec. 6.2): a base is trained, MoE blocks are put in and drawn anew, and they alone are trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from hf_moe_lmc.runtime.progress import quiet_transformers

from .data import Images, Text, batches
from .models import PaperGPT, PaperGPTConfig, PaperModel, PaperViT, PaperViTConfig, gated
from .settings import INIT_STD, Recipe, Setting, Size

GRADIENT_CLIP = 1.0
WARMUP = 20
EVERY = 10  # steps between looks at the clock


class OutOfTime(Exception):
    """The time that was given is over; what is finished is on disk."""


def on(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model, moved there."""
    nn.Module.to(model, device)
    return model


def check(deadline: float) -> None:
    """Raises OutOfTime after `deadline`, seconds of time.time()."""
    if time.time() > deadline:
        raise OutOfTime


def base_model(setting: Setting, size: Size, data: Images | Text) -> PreTrainedModel:
    """The model that is trained first, from seed 0: the paper's with dense layers only, a real class with all its experts."""
    torch.manual_seed(0)
    if setting.kind != "paper":
        assert isinstance(data, Text)
        return real_class(setting, size, data.vocabulary)
    return paper_model(setting, size, data, moe=())


def paper_model(setting: Setting, size: Size, data: Images | Text, moe: tuple[int, ...]) -> PaperModel:
    """The paper's model for this data, with MoE blocks in the layers `moe`."""
    common: dict[str, Any] = {
        "hidden_size": size.hidden,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": size.heads,
        "dense_size": size.dense,
        "expert_size": size.expert,
        "moe_layers": moe,
        **gated(setting.gating, setting.experts),
    }
    if isinstance(data, Text):
        return PaperGPT(PaperGPTConfig(vocab_size=data.vocabulary, **common))
    channels, rows, columns = data.train.shape[1:]
    if rows != columns:
        raise SystemExit(f"images of {rows} x {columns}; give --image-size to make them square")
    patch = max(2, rows // 8)
    return PaperViT(PaperViTConfig(image_size=rows, channels=channels, patch_size=patch, classes=data.classes, **common))


def real_class(setting: Setting, size: Size, vocabulary: int) -> PreTrainedModel:
    """A small model of one of transformers' own classes; `mixtral_dense` is Mixtral with all experts on."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "initializer_range": INIT_STD,
    }
    n, units = setting.experts, size.expert
    if setting.kind.startswith("mixtral"):
        top_k = n if setting.kind == "mixtral_dense" else 2
        mixtral = MixtralConfig(**common, intermediate_size=units, num_local_experts=n, num_experts_per_tok=top_k)
        mixtral.update({"output_router_logits": True, "router_aux_loss_coef": 0.02})
        return MixtralForCausalLM(mixtral)
    if setting.kind == "qwen2_moe":
        qwen = Qwen2MoeConfig(
            **common, intermediate_size=size.dense, moe_intermediate_size=units, shared_expert_intermediate_size=units,
            num_experts=n, num_experts_per_tok=2,
        )  # fmt: skip
        qwen.update({"output_router_logits": True, "router_aux_loss_coef": 0.02})
        return Qwen2MoeForCausalLM(qwen)
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **common, intermediate_size=size.dense, moe_intermediate_size=units, n_routed_experts=n, num_experts_per_tok=2,
            n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=32, kv_lora_rank=32,
            qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, routed_scaling_factor=1.0,
        )
    )  # fmt: skip


def blocks(model: PreTrainedModel, layers: Sequence[int]) -> list[nn.Module]:
    """The feed-forward networks of some layers."""
    return [model.get_submodule(f"model.layers.{layer}.mlp") for layer in layers]


def with_fresh_blocks(base: PreTrainedModel, setting: Setting, size: Size, data: Images | Text, seed: int) -> PreTrainedModel:
    """The base with MoE blocks in their first state: weights normal with INIT_STD, biases 0."""
    if setting.kind == "paper":
        model: PreTrainedModel = paper_model(setting, size, data, setting.moe)
        state, layers = base.state_dict(), tuple(f"model.layers.{layer}.mlp." for layer in setting.moe)
        kept = {name: value for name, value in state.items() if not name.startswith(layers)}
        missing, unexpected = model.load_state_dict(kept, strict=False)
        assert not unexpected and all(name.startswith(layers) for name in missing)
    else:
        model = real_class(setting, size, int(base.config.vocab_size))
        model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in blocks(model, setting.moe):
            for name, parameter in block.named_parameters():
                drawn = torch.empty(parameter.shape).normal_(std=INIT_STD, generator=generator)
                parameter.copy_(torch.zeros_like(drawn) if name.endswith("bias") else drawn)
    return model


def train(
    model: PreTrainedModel,
    data: Images | Text,
    recipe: Recipe,
    *,
    seed: int,
    layers: Sequence[int] | None,
    device: str,
    deadline: float,
    progress: Callable[[int], object] = lambda step: None,
) -> float:
    """Trains in place; with `layers`, the MoE blocks of these alone. Returns the mean loss of the last 20 steps, nats.

    Raises:
        OutOfTime: after `deadline`.
    """
    on(model, device).train()
    model.requires_grad_(layers is None)
    for block in blocks(model, layers or ()):
        block.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=WARMUP)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, recipe.steps - WARMUP), eta_min=recipe.learning_rate / 10
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP])
    losses = []
    stream = batches(data, recipe.batch, torch.Generator().manual_seed(seed))
    for step in range(1, recipe.steps + 1):
        if step % EVERY == 0:
            check(deadline)
        inputs, labels = (part.to(device) for part in next(stream))
        named = {"pixel_values" if isinstance(data, Images) else "input_ids": inputs}
        loss = model(**named, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        progress(step)
    on(model, "cpu").eval()
    return float(torch.stack(losses[-20:]).mean())


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Writes a checkpoint under the names that the parameters have in memory; it appears whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    with quiet_transformers():
        model.save_pretrained(part, save_original_format=False)
    part.rename(folder)
