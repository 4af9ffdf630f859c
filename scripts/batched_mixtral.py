"""Many small Mixtral models trained at once: each tensor of all models in one, so that a GPU is busy although each is tiny.

The computation is that of `MixtralForCausalLM` (`MistralForCausalLM` without experts) in float32; tests compare losses and
gradients. On a GPU all experts run on all tokens, and a router's weight of 0 takes out those that were not chosen. On a CPU
each expert runs on its own tokens, which costs a quarter with two of eight experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MistralConfig, MixtralConfig

from hf_moe_lmc.example.protocol import AUXILIARY_LOSS_WEIGHT, GRADIENT_CLIP

Stack = dict[str, Tensor]  # by the names of a state dict: [model, ...]


@dataclass(frozen=True)
class Recipe:
    """AdamW at a constant rate after a short warm-up, with a branch for each length of training in which the rate decays.

    So a training of many steps passes through all shorter ones (warm-up, stable, decay: arXiv 2404.06395).

    Attributes:
        kept: lengths of training in steps, ascending.
        decay: share of the steps of each branch in which the rate falls to 0, linearly.
    """

    kept: tuple[int, ...]
    learning_rate: float
    decay: float = 0.2
    weight_decay: float = 0.01
    batch: int = 16
    sequence: int = 64
    warmup: int = 20

    def branches_at(self, length: int) -> int:
        """The step at which the branch of a length leaves the trunk."""
        return round((1 - self.decay) * length)

    @property
    def steps(self) -> int:
        """Of the trunk and all branches."""
        return self.branches_at(self.kept[-1]) + sum(length - self.branches_at(length) for length in self.kept)


def stack(states: Sequence[Mapping[str, Tensor]]) -> Stack:
    """The tensors of several models of one shape, each in one tensor [model, ...]."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack(stacked: Stack, index: int) -> dict[str, Tensor]:
    """The state dict of one of the models, on the CPU."""
    return {name: values[index].detach().cpu().clone() for name, values in stacked.items()}


def train_stack(
    stacked: Stack,
    config: MixtralConfig | MistralConfig,
    streams: Sequence[Tensor],
    seeds: Sequence[int],
    recipe: Recipe,
    *,
    device: str,
    keep: Callable[[int, Stack], object],
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Trains all models, each on random windows of its own tokens.

    Args:
        streams: token ids that each model is trained on, [tokens].
        seeds: of the windows of each model.
        keep: called with the length and the models at the end of each branch.
        progress: called after each step.
    """
    parameters = {name: values.to(device).clone().requires_grad_(True) for name, values in stacked.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    trunk = _Run(parameters, _optimizer(parameters, recipe), generators, config, streams, recipe, progress)
    done = 0
    for length in recipe.kept:
        start = recipe.branches_at(length)
        for step in range(done + 1, start + 1):
            trunk.step(min(1.0, step / recipe.warmup))
        done, branch = start, trunk.copy()
        for left in range(length - start, 0, -1):
            branch.step(left / (length - start))
        keep(length, branch.parameters)


def _optimizer(parameters: Stack, recipe: Recipe) -> torch.optim.Optimizer:
    fused = all(parameter.is_cuda for parameter in parameters.values())
    return torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused)


@dataclass(frozen=True)
class _Run:
    """A training at some step: the trunk, or a branch of it."""

    parameters: Stack
    optimizer: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    config: MixtralConfig | MistralConfig
    streams: Sequence[Tensor]
    recipe: Recipe
    progress: Callable[[], object]

    def step(self, rate: float) -> None:
        """One step at a share of the learning rate."""
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * rate
        rows = zip(self.streams, self.generators, strict=True)
        ids = torch.stack([_windows(tokens, self.recipe, generator) for tokens, generator in rows])
        device = next(iter(self.parameters.values())).device
        loss_of(self.parameters, self.config, ids.to(device, non_blocking=True)).sum().backward()
        _clip(list(self.parameters.values()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress()

    def copy(self) -> _Run:
        parameters = {name: value.detach().clone().requires_grad_(True) for name, value in self.parameters.items()}
        optimizer = _optimizer(parameters, self.recipe)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        generators = [torch.Generator().set_state(generator.get_state()) for generator in self.generators]
        return replace(self, parameters=parameters, optimizer=optimizer, generators=generators)


def _windows(tokens: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - recipe.sequence, (recipe.batch, 1), generator=generator)
    return tokens[starts + torch.arange(recipe.sequence)]


def _clip(parameters: Sequence[Tensor]) -> None:
    """Clips the gradient of each model for itself."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).square().sum(dim=1) for gradient in gradients]).sum(dim=0).sqrt()
    factor = (GRADIENT_CLIP / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


def loss_of(stacked: Stack, config: MixtralConfig | MistralConfig, ids: Tensor) -> Tensor:
    """What training lowers: the loss of the next token, and of experts the balancing loss; [model], nats per token.

    Args:
        ids: int64 [model, batch, sequence].
    """
    models, batch, length = ids.shape
    x = stacked["model.embed_tokens.weight"][torch.arange(models, device=ids.device)[:, None], ids.flatten(1)]
    chosen, likely = [], []
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): values
            for name, values in stacked.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        x = x + _attention(own, config, _norm(x, own["input_layernorm.weight"], config), batch, length)
        inner = _norm(x, own["post_attention_layernorm.weight"], config)
        if "mlp.gate.weight" in own:
            output, of_tokens, probabilities = _experts(own, routed(config), inner)
            chosen.append(of_tokens)
            likely.append(probabilities)
        else:
            gate, up = _linear(inner, own["mlp.gate_proj.weight"]), _linear(inner, own["mlp.up_proj.weight"])
            output = _linear(functional.silu(gate) * up, own["mlp.down_proj.weight"])
        x = x + output
    logits = _linear(_norm(x, stacked["model.norm.weight"], config), stacked["lm_head.weight"])
    logits = logits.view(models, batch, length, -1)[:, :, :-1]
    losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, :, 1:].reshape(-1), reduction="none")
    loss = losses.view(models, -1).mean(dim=1)
    if not chosen:
        return loss
    share, probability = torch.stack(chosen).mean(dim=0), torch.stack(likely).mean(dim=0)
    return loss + AUXILIARY_LOSS_WEIGHT * routed(config).num_local_experts * (share * probability).sum(dim=1)


def routed(config: MixtralConfig | MistralConfig) -> MixtralConfig:
    """The configuration of a model that has experts."""
    assert isinstance(config, MixtralConfig)
    return config


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x, weight.transpose(1, 2))


def _norm(x: Tensor, weight: Tensor, config: MixtralConfig | MistralConfig) -> Tensor:
    return weight[:, None] * (x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + config.rms_norm_eps))


def _attention(own: Stack, config: MixtralConfig | MistralConfig, x: Tensor, batch: int, length: int) -> Tensor:
    models, heads = len(x), config.num_attention_heads
    query, key, value = (
        _linear(x, own[f"self_attn.{role}_proj.weight"]).view(models * batch, length, heads, -1).transpose(1, 2)
        for role in "qkv"
    )
    half = query.shape[-1] // 2
    assert config.rope_parameters is not None
    theta = float(config.rope_parameters["rope_theta"] or 0.0)
    frequency = theta ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(length, device=x.device)[:, None] * frequency
    cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)
    query, key = (y * cos + torch.cat([-y[..., half:], y[..., :half]], dim=-1) * sin for y in (query, key))
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return _linear(mixed.transpose(1, 2).reshape(models, batch * length, -1), own["self_attn.o_proj.weight"])


def _experts(own: Stack, config: MixtralConfig, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output [model, token, width]; the share of tokens of each expert and its mean probability, [model, expert]."""
    probabilities = _linear(x, own["mlp.gate.weight"]).softmax(dim=-1)
    best, places = probabilities.topk(config.num_experts_per_tok, dim=-1)
    weights = torch.zeros_like(probabilities).scatter(-1, places, best / best.sum(dim=-1, keepdim=True))
    run = all_experts if x.is_cuda else chosen_experts
    output = run(x, weights, own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"])
    return output, (weights.detach() > 0).float().mean(dim=1), probabilities.mean(dim=1)


def all_experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of the experts, each run on every token.

    Args:
        x: [model, token, width].
        weights: the router's, [model, token, expert], 0 where an expert was not chosen.
        gate_up: [model, expert, 2 x units, width].
        down: [model, expert, width, units].
    """
    models, tokens, width = x.shape
    _, experts, _, units = down.shape
    both = _linear(x, gate_up.reshape(models, experts * 2 * units, width))
    gate, up = both.view(models, tokens, experts, 2, units).unbind(dim=3)
    hidden = functional.silu(gate) * up * weights[..., None]
    joined = down.transpose(1, 2).reshape(models, width, experts * units)
    return _linear(hidden.view(models, tokens, experts * units), joined)


def chosen_experts(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `all_experts`, each expert run on the tokens that chose it."""
    models, experts = down.shape[:2]
    outputs = [torch.zeros_like(of_model) for of_model in x]
    for model, expert in product(range(models), range(experts)):
        rows = weights[model, :, expert].nonzero().squeeze(-1)
        gate, up = functional.linear(x[model, rows], gate_up[model, expert]).chunk(2, dim=-1)
        output = functional.linear(functional.silu(gate) * up, down[model, expert])
        outputs[model] = outputs[model].index_add(0, rows, output * weights[model, rows, expert, None])
    return torch.stack(outputs)
