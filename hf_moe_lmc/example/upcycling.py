"""Upcycling: an MoE model made of a dense one, whose experts all begin as its MLP (arXiv 2212.05055), with noise between them.

Drop-Upcycling (arXiv 2502.19261) draws a share of the hidden units of every expert anew, each expert its own, so that experts
differ from the start. Two models that were upcycled from one dense model and then trained apart are what alignment is for:
their experts have no common order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

NOISE = 0.05  # of the copies, relative to the standard deviation of each matrix
_MLP = ("gate", "up", "down")


def dense_config(config: MixtralConfig) -> MistralConfig:
    """The dense model that has an MLP where a Mixtral has its experts.

    Example:
        >>> from hf_moe_lmc.example.protocol import small_mixtral
        >>> dense_config(small_mixtral(hidden_size=64, layers=2, intermediate_size=256)).intermediate_size
        256
    """
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
        "max_position_embeddings", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rms_norm_eps", "rope_parameters",
        "sliding_window",
    )  # fmt: skip
    return MistralConfig(**{name: getattr(config, name) for name in kept})


def upcycle(
    dense: MistralForCausalLM, config: MixtralConfig, *, seed: int, noise: float = NOISE, redrawn: float = 0.0
) -> MixtralForCausalLM:
    """A Mixtral whose experts are copies of the dense model's MLPs, with noise and routers of its own.

    Args:
        config: of the MoE; all but its experts has to be as in the dense model.
        seed: of noise, routers and drawn units; everything else is the dense model's.
        noise: standard deviation of what is added to each matrix of each expert, relative to that matrix's own.
        redrawn: share of the hidden units of each expert that are drawn anew, with mean and standard deviation of the matrix:
            Drop-Upcycling takes 0.5.

    Example:
        >>> from hf_moe_lmc.example.protocol import small_mixtral
        >>> config = small_mixtral(hidden_size=32, layers=1, intermediate_size=16)
        >>> dense = MistralForCausalLM(dense_config(config))
        >>> ids = torch.arange(8)[None]
        >>> copies = upcycle(dense, config, seed=0, noise=0.0)  # copies without noise compute what the dense model does
        >>> torch.testing.assert_close(copies(ids).logits, dense(ids).logits)
    """
    generator = torch.Generator().manual_seed(seed)
    model = MixtralForCausalLM(config)
    state, experts, units = dict(dense.state_dict()), config.num_local_experts, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}.mlp"
        mlp = {role: state.pop(f"{at}.{role}_proj.weight") for role in _MLP}
        own = {role: torch.stack([_noisy(mlp[role], noise, generator) for _ in range(experts)]) for role in _MLP}
        count = round(redrawn * units)
        if count:
            for expert in range(experts):
                drawn = torch.randperm(units, generator=generator)[:count]
                own["gate"][expert, drawn] = _like(mlp["gate"], (count, config.hidden_size), generator)
                own["up"][expert, drawn] = _like(mlp["up"], (count, config.hidden_size), generator)
                own["down"][expert][:, drawn] = _like(mlp["down"], (config.hidden_size, count), generator)
        state[f"{at}.experts.gate_up_proj"] = torch.cat([own["gate"], own["up"]], dim=1)
        state[f"{at}.experts.down_proj"] = own["down"]
        router = torch.empty(experts, config.hidden_size)
        state[f"{at}.gate.weight"] = router.normal_(std=config.initializer_range, generator=generator)
    model.load_state_dict(state)
    return model


def _noisy(matrix: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return matrix + noise * matrix.std() * torch.randn(matrix.shape, generator=generator)


def _like(matrix: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal numbers with the mean and standard deviation of a matrix."""
    return matrix.mean() + matrix.std() * torch.randn(shape, generator=generator)
