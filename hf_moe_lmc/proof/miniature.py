"""Tiny random models of any MoE architecture that transformers knows.

A miniature has the class and the switches of the original, and other sizes. So whatever holds for the original's computation
can be tried on it within a second: which axes may be permuted, and which tensors move along.
"""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_moe_lmc.moe.model_class import foreign, model_class_of, text_reader
from hf_moe_lmc.proof.sizes import TOKEN_ID
from hf_moe_lmc.proof.small_config import parts, shrink


def miniature(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of the same class with the same switches.

    Raises:
        FamilyError: as `shrink` and `build`.
    """
    return build(shrink(config), seed)


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in which every part of an MoE block shows in the output.

    The class is the first that transformers maps the configuration's class to, in this order: causal language model,
    image-text-to-text, multimodal, sequence-to-sequence, token classification, base model.

    Args:
        config: A miniature; a large configuration would allocate the large model.
        seed: Different seeds give different weights; the global random state is left alone.

    Returns:
        The float32 model in eval mode.

    Raises:
        FamilyError: transformers has no model for the configuration, or its class rejects it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _constructed(config)
        with torch.no_grad():
            names: dict[int, str] = {}
            state = model.state_dict()
            for name, tensor in state.items():
                # tied weights are drawn once, as the embedding that they are
                address = tensor.data_ptr()
                names[address] = name if _EMBEDDING.search(name) else names.get(address, name)
            for name in names.values():
                _draw(name, state[name], config)
    return model.train(False)


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration of any size on the meta device: names and shapes without values.

    Raises:
        FamilyError: as `build`.
    """
    with torch.device("meta"):
        return _constructed(config)


def _constructed(config: PreTrainedConfig) -> PreTrainedModel:
    model_class: Any = model_class_of(config)
    with foreign(model_class, "cannot be built from its configuration"):
        model: PreTrainedModel = model_class._from_config(copy.deepcopy(config), dtype=torch.float32)
    return model


_ROUTER = re.compile(r"(.*\.)?(gate|router|router_gate)(\.(wg|gate|layer|classifier|proj|router_mlp\.out_proj))?\.weight")
_EMBEDDING = re.compile(r"embed|\bwte\b")
_CHOICE_BIAS = re.compile(r"e_score_correction_bias|expert_bias")
_STATE = re.compile(r"(.*\.)?(A_log|dt_bias|D|A|dt_proj\.bias|slope_rate|inv_freq)")


def _draw(name: str, tensor: Tensor, config: PreTrainedConfig) -> None:
    """Fills one tensor of the state dict, whose freshly initialised value is given."""
    last = name.rsplit(".", 1)[-1]
    if not tensor.is_floating_point():
        if last == "tid2eid":
            # distinct experts per token
            experts = int(config.get_text_config().n_routed_experts)
            tensor.copy_(torch.rand(len(tensor), experts).argsort(dim=1)[:, : tensor.shape[1]])
        return
    if _STATE.fullmatch(name) or (tensor.ndim < 3 and not tensor.isfinite().all()):
        # decay rates stay where the initialisation puts them; experts may come as they lay in memory
        tensor.add_(0.05 * torch.randn_like(tensor))
    elif last == "balancing_biases":
        # the last class skips the block; loading a checkpoint resets its bias to -1 in transformers 5.23 and 5.24
        tensor[:-1].normal_(std=0.02)
    elif _CHOICE_BIAS.search(name):
        tensor.normal_(std=0.15)
    elif tensor.ndim < 2 or "scale" in last or any("norm" in part for part in name.split(".")[-2:]):
        # gains start at one or (where the model adds one) at zero, biases at zero
        tensor.add_(0.15 * torch.randn_like(tensor))
    elif _EMBEDDING.search(name):
        tensor.normal_()
    elif _ROUTER.fullmatch(name):
        # logits of standard deviation 1.5: all experts are chosen now and then, and no gate saturates
        width = 1 if name.endswith("router.proj.weight") else tensor.shape[-1]  # that one's input is scaled down by it
        multiplier = getattr(config.get_text_config(), "output_multiplier", 1.0)
        tensor.normal_(std=1.5 / width**0.5 / multiplier)
    else:
        tensor.normal_(std=0.25)


def outputs(model: PreTrainedModel, tokens: Tensor | None = None) -> Tensor:
    """The model's logits for a few fixed token ids.

    Args:
        model: What `build` made, or another model of the same shape.
        tokens: Ids [texts, tokens]; by default [4, 48] of the ordinary ids, those that no configuration field names.

    Returns:
        Logits, or the last hidden state of a base model, in float32.
    """
    reader = text_reader(model)
    ids = ordinary_tokens(model.config) if tokens is None else tokens
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if "decoder_input_ids" in inspect.signature(reader.forward).parameters:
        # what a decoder starts from may not be left to chance, and some see the encoder through the cache only
        inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)}
    with torch.no_grad(), foreign(type(model), "cannot run on token ids alone"):
        result = reader(**inputs)
    values: Tensor = result.logits if getattr(result, "logits", None) is not None else result.last_hidden_state
    return values.float()


def ordinary_tokens(config: PreTrainedConfig) -> Tensor:
    """Ids [4, 48] that no field of the configuration names."""
    special: set[int] = set()
    for part in parts(config):
        for name, value in vars(part).items():
            if TOKEN_ID.fullmatch(name):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    vocabulary = int(config.get_text_config().vocab_size)
    ordinary = torch.tensor([token for token in range(vocabulary) if token not in special])
    return ordinary[torch.arange(4 * 48).view(4, 48) * 7 % len(ordinary)]
