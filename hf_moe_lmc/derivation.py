"""A family's description, derived from transformers: the only module that relies on how transformers builds its experts."""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.family import MoEFamily


def derive(config: PreTrainedConfig, where: str) -> MoEFamily:
    """The family of a configuration that no data file describes."""
    raise FamilyError(f"{where}: model type {config.model_type!r} has no MoE description here")
