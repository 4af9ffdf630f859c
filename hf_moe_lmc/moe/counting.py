"""How many parameters a model has, and how many of them a token uses: from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hf_moe_lmc.checkpoints.joint import HEAD, IGNORED, embedding_of
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.notation import is_expert_role
from hf_moe_lmc.moe.ties import rivals
from hf_moe_lmc.symmetry.banks import FIRST


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Quantised weights count as the weights that they stand for, without their scales. Buffers that no model reads, and the
    copy of tied embeddings, do not count.

    Attributes:
        total: without multi-token prediction.
        active: those that one token uses: all but the routed experts that are not chosen.
        input_embedding: in both; some makers leave it out of the active ones.
        multi_token_prediction: of the layers that predict further tokens, their own embeddings included.
    """

    total: int
    active: int
    input_embedding: int
    multi_token_prediction: int

    def __str__(self) -> str:
        without = "" if self.input_embedding == 0 else f" ({short(self.active - self.input_embedding)} without the embedding)"
        extra = self.multi_token_prediction
        apart = f"; for multi-token prediction {short(extra)} more" if extra else ""
        return f"{short(self.total)}, active per token {short(self.active)}{without}{apart}"


def short(number: int) -> str:
    """A number of parameters as people say it.

    >>> short(46_702_792_704), short(355_000), short(999)
    ('46.7B', '355.0K', '999')
    """
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return str(number)


def is_for_prediction(model: MoEModel, name: str) -> bool:
    """Whether a tensor belongs to multi-token prediction: to a layer after the last, or under a prefix of its own."""
    return model.is_extra(name) or any(part.startswith("mtp") for part in name.split("."))


def ignored_buffers(model: MoEModel) -> tuple[str, ...]:
    """Tensors that older releases saved and no model reads."""
    return tuple(name for name in model.outside if IGNORED.fullmatch(name))


def tied_heads(model: MoEModel) -> tuple[str, ...]:
    """Heads in the file of a model whose configuration says that its head is the input embedding."""
    if not getattr(model.text_config, "tie_word_embeddings", False):
        return ()
    heads = [name for name in model.outside if HEAD.fullmatch(name) and name.endswith(".weight")]
    return tuple(name for name in heads if not is_for_prediction(model, name))


def count_parameters(model: MoEModel, without: tuple[str, ...] = ()) -> Parameters:
    """Counts the parameters of a model.

    Args:
        without: tensors that do not count besides, such as the copy of an embedding.
    """
    left_out = {*ignored_buffers(model), *without}
    stands = {name: info.numel for name, info in model.checkpoint.tensors.items()}
    counts = {name: count for name, count in stands.items() if name not in left_out}
    extra = sum(count for name, count in counts.items() if is_for_prediction(model, name))
    total = sum(counts.values()) - extra
    idle = sum(_idle(layer, model.top_k, stands) for index, layer in model.layers.items() if index not in model.extra_layers)
    embedding = embedding_of(model.checkpoint, model.outside)
    return Parameters(total, total - idle, counts.get(embedding, 0) if embedding else 0, extra)


def _idle(layer: MoELayer, top_k: int, stands: Mapping[str, int]) -> int:
    """Parameters of the routed experts of a layer that a token does not choose; `stands`: those of each tensor."""
    held = dict.fromkeys(layer.banks, 0)
    for claim in layer.claims.values():
        for segment in claim.segments:
            if is_expert_role(claim.spec.segments[segment][0]):
                whole = len(claim.spec.segments) == 1
                sizes = claim.axis_sizes(layer.sizes, segment)
                count = stands[claim.name] if whole else math.prod(sizes)
                held[claim.spec.banks[segment]] = held.get(claim.spec.banks[segment], 0) + count
    idle = 0
    for banks in rivals(layer):
        apart = FIRST not in banks and _router(layer, banks[0]) == _router(layer, FIRST)
        for name in () if apart else banks:  # a bank that is apart with rows in the same router is always chosen
            experts = layer.banks[name].experts
            idle += held[name] * max(0, experts - top_k) // experts
    return idle


def _router(layer: MoELayer, bank: str) -> str:
    return layer.holders[f"{bank}.router" if bank else "router", None][0].name
