"""Two models brought to one set of tensors outside their MoE blocks, with the configurations that go with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import ABSENT
from hf_moe_lmc.checkpoints.joint import HEAD, join
from hf_moe_lmc.checkpoints.token_ids import TokenIds
from hf_moe_lmc.moe.model import MoEModel


def join_models(a: MoEModel, b: MoEModel, ids: TokenIds) -> tuple[MoEModel, MoEModel, tuple[str, ...]]:
    """The two with checkpoints that hold the same tensors outside, as far as could be helped, and what was done in words."""
    # what A lacks of multi-token prediction has no part in what follows
    b = replace(b, layers={index: layer for index, layer in b.layers.items() if index < b.num_layers or index in a.layers})
    tied_a, tied_b = (bool(getattr(model.text_config, "tie_word_embeddings", False)) for model in (a, b))
    joint = join(
        a.checkpoint,
        b.checkpoint,
        a.outside,
        b.outside,
        ids,
        tied=(tied_a, tied_b),
        is_extra=(a.is_extra, b.is_extra),
        without_extra=a.without_extra(),
    )
    return _on(a, joint.a), _on(b, joint.b), joint.notes


def _on(model: MoEModel, checkpoint: Checkpoint) -> MoEModel:
    """A model on another checkpoint. As in transformers, a head in a file is used, whatever the configuration ties."""
    changes = dict(checkpoint.changes)
    if getattr(model.text_config, "tie_word_embeddings", False) and any(
        HEAD.fullmatch(name) and not model.is_extra(name) for name in checkpoint.tensors
    ):
        changes["tie_word_embeddings"] = False
    if checkpoint is model.checkpoint and not changes:
        return model
    return replace(model, checkpoint=checkpoint, config=_configured(model.config, changes))


def _configured(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    found = copy.deepcopy(config)
    for part in (found, found.get_text_config()):
        for key, value in changes.items():
            if value is not ABSENT and hasattr(part, key):  # what is absent was never read
                setattr(part, key, value)
    return found
