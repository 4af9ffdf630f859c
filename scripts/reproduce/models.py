"""The paper's models, small: a GPT-2-like decoder and a ViT whose feed-forward networks are MoEs in chosen layers.

Experts are one-hidden-layer ReLU networks with biases, E(x) = B ReLU(A x + u) + v, under an affine gate. `gating` is
`dense` (Eq. 2: softmax over all experts), `sparse` (Eq. 3: softmax over the two largest scores) or `shared` (App. D.3:
sparse, and one more expert that is always on).

The package reads them by FAMILY: a family is data, and these models are no case of their own in it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, ImageClassifierOutput

from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.registry import register

GATINGS = ("dense", "sparse", "shared")
BALANCE = 0.02  # weight of the load-balancing loss of a sparse gate

FAMILY = MoEFamily(
    name="paper_moe",
    model_types=("paper_moe_gpt", "paper_moe_vit"),
    router="softmax",
    units="relu",
    weights={
        "mlp.router.weight": "router: expert model",
        "mlp.router.bias": "router_bias: expert",
        "mlp.experts.up": "up: expert unit model",
        "mlp.experts.up_bias": "up_bias: expert unit",
        "mlp.experts.down": "down: expert model unit",
        "mlp.experts.down_bias": "down_bias: expert model",
        "mlp.shared_expert.up.weight": "shared_up: shared model",
        "mlp.shared_expert.up.bias": "shared_up_bias: shared",
        "mlp.shared_expert.down.weight": "shared_down: model shared",
        "mlp.shared_expert.down.bias": "shared_down_bias: model",
    },
    sizes={"expert": "num_experts", "unit": "expert_size", "shared": "num_shared * expert_size", "model": "hidden_size"},
    moe_layers="layer in moe_layers",
    when=dict.fromkeys(("shared_up", "shared_up_bias", "shared_down", "shared_down_bias"), "num_shared"),
)


class PaperConfig(PreTrainedConfig):
    """Sizes of either model; `moe_layers` lists the layers whose feed-forward network is an MoE."""

    def __init__(
        self,
        hidden_size: int = 64,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        dense_size: int = 256,
        expert_size: int = 128,
        num_experts: int = 4,
        num_experts_per_tok: int = 4,
        num_shared: int = 0,
        moe_layers: tuple[int, ...] = (),
        **others: Any,
    ) -> None:
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = hidden_size, num_hidden_layers, num_attention_heads
        self.dense_size, self.expert_size = dense_size, expert_size
        self.num_experts, self.num_experts_per_tok, self.num_shared = num_experts, num_experts_per_tok, num_shared
        self.moe_layers = list(moe_layers)
        super().__init__(**others)


class PaperGPTConfig(PaperConfig):
    model_type = "paper_moe_gpt"

    def __init__(self, vocab_size: int = 1024, max_position_embeddings: int = 512, **others: Any) -> None:
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        super().__init__(**{"tie_word_embeddings": False, **others})


class PaperViTConfig(PaperConfig):
    model_type = "paper_moe_vit"

    def __init__(self, image_size: int = 8, channels: int = 1, patch_size: int = 2, classes: int = 10, **others: Any) -> None:
        self.image_size, self.channels, self.patch_size, self.classes = image_size, channels, patch_size, classes
        super().__init__(**others)


def gated(gating: str, experts: int) -> dict[str, int]:
    """What a configuration says of a gating with so many experts; `topN` is a sparse gate of N experts."""
    if gating.startswith("top"):
        return {"num_experts": experts, "num_experts_per_tok": int(gating[3:]), "num_shared": 0}
    top_k = experts if gating == "dense" else min(2, experts)
    return {"num_experts": experts, "num_experts_per_tok": top_k, "num_shared": int(gating == "shared")}


class Experts(nn.Module):
    """All experts of a block; each takes every token, since the models are small.

    Weights: up [expert, unit, model], up_bias [expert, unit], down [expert, model, unit], down_bias [expert, model].
    """

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        n, h, d = config.num_experts, config.expert_size, config.hidden_size
        self.up, self.up_bias = nn.Parameter(torch.empty(n, h, d)), nn.Parameter(torch.empty(n, h))
        self.down, self.down_bias = nn.Parameter(torch.empty(n, d, h)), nn.Parameter(torch.empty(n, d))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of all experts. x: [token, model]; weights: [token, expert]."""
        n, h, d = self.up.shape
        hidden = F.linear(x, self.up.view(n * h, d), self.up_bias.flatten()).relu().view(-1, n, h) * weights[:, :, None]
        return hidden.flatten(1) @ self.down.transpose(1, 2).reshape(n * h, d) + weights @ self.down_bias


class MLP(nn.Module):
    """A dense feed-forward network; with `act` ReLU, a shared expert."""

    def __init__(self, model: int, units: int, act: str) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(model, units), nn.Linear(units, model), getattr(F, act)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class MoE(nn.Module):
    """An MoE block (Eq. 2, Eq. 3, App. D.3). `balance` is the load-balancing loss of the last forward pass."""

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        self.top_k, self.count = config.num_experts_per_tok, config.num_experts
        self.router, self.experts = nn.Linear(config.hidden_size, config.num_experts), Experts(config)
        if config.num_shared:
            self.shared_expert = MLP(config.hidden_size, config.num_shared * config.expert_size, "relu")
        self.has_shared, self.balance = bool(config.num_shared), torch.zeros(())

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.flatten(0, -2)
        scores = self.router(x)
        if self.top_k < self.count:
            kept = scores.topk(self.top_k, dim=-1)
            weights = torch.zeros_like(scores).scatter(1, kept.indices, kept.values.softmax(dim=-1))
            self.balance = self.count * ((weights > 0).float().mean(dim=0) * scores.softmax(dim=-1).mean(dim=0)).sum()
        else:
            weights = scores.softmax(dim=-1)
        out = self.experts(x, weights)
        if self.has_shared:
            out = out + self.shared_expert(x)
        return out.view(hidden.shape)


class Layer(nn.Module):
    """A pre-norm transformer layer, as in GPT-2 and ViT."""

    def __init__(self, config: PaperConfig, index: int, causal: bool) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp: nn.Module = MoE(config) if index in config.moe_layers else MLP(d, config.dense_size, "gelu")

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.ln_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Trunk(nn.Module):
    """The layers of either model, under the name `model`."""

    def __init__(self, config: PaperConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, index, causal) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def balance(self) -> Tensor:
        """The load-balancing losses of the last forward pass, summed over the layers with a sparse gate."""
        found = [layer.mlp.balance for layer in self.layers if isinstance(layer.mlp, MoE)]
        return torch.stack(found).sum() if found else torch.zeros(())


class PaperModel(PreTrainedModel):
    """What both models share: a forward pass in three parts, so that what paths have in common is computed once."""

    model: Trunk
    head: nn.Linear
    base_model_prefix = "model"

    def _init_weights(self, module: nn.Module) -> None:
        """Normal with the standard deviation 0.02; biases 0, norms 1."""
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                nn.init.constant_(parameter, float(name == "weight"))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)

    def embed(self, inputs: Tensor) -> Tensor:
        """[batch, place, model]"""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def through(self, hidden: Tensor, layers: range) -> Tensor:
        for index in layers:
            hidden = self.model.layers[index](hidden)
        return hidden

    def everything(self, inputs: Tensor) -> Tensor:
        return self.logits(self.through(self.embed(inputs), range(len(self.model.layers))))

    def with_balance(self, loss: Tensor) -> Tensor:
        return loss + BALANCE * self.model.balance().to(loss.device) if self.training else loss


class PaperGPT(PaperModel):
    """A GPT-2-like decoder: learned positions, LayerNorm, GELU in the dense layers."""

    config_class = PaperGPTConfig

    def __init__(self, config: PaperGPTConfig) -> None:
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.model = Trunk(config, causal=True)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def embed(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.tokens(inputs) + self.places(torch.arange(inputs.shape[1], device=inputs.device))
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.head(self.model.norm(hidden))
        return out

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **others: Any) -> CausalLMOutput:
        logits = self.everything(input_ids)
        loss = None
        if labels is not None:
            loss = self.with_balance(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
        return CausalLMOutput(loss=loss, logits=logits)


class PaperViT(PaperModel):
    """A ViT: patches, a class token, learned positions."""

    config_class = PaperViTConfig

    def __init__(self, config: PaperViTConfig) -> None:
        super().__init__(config)
        side, count = config.patch_size, (config.image_size // config.patch_size) ** 2
        self.patches = nn.Linear(config.channels * side * side, config.hidden_size)
        self.places = nn.Embedding(count + 1, config.hidden_size)
        self.model = Trunk(config, causal=False)
        self.head = nn.Linear(config.hidden_size, config.classes)
        self.post_init()

    def embed(self, inputs: Tensor) -> Tensor:
        """inputs: [image, channel, row, column]"""
        side = self.config.patch_size
        rows = F.unfold(inputs, side, stride=side).transpose(1, 2)
        out: Tensor = F.pad(self.patches(rows), (0, 0, 1, 0)) + self.places.weight
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.head(self.model.norm(hidden[:, 0]))
        return out

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **others: Any) -> ImageClassifierOutput:
        logits = self.everything(pixel_values)
        loss = None if labels is None else self.with_balance(F.cross_entropy(logits, labels))
        return ImageClassifierOutput(loss=loss, logits=logits)


@cache
def register_models() -> None:
    """Makes the family known to the package, and both models to transformers' Auto classes; once in a process."""
    register(FAMILY)
    for config_class, model_class, auto in (
        (PaperGPTConfig, PaperGPT, AutoModelForCausalLM),
        (PaperViTConfig, PaperViT, AutoModelForImageClassification),
    ):
        AutoConfig.register(config_class.model_type, config_class)
        auto.register(config_class, model_class)
