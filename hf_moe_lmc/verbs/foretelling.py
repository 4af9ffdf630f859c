"""What `align`, `merge` and `barrier` say of the lineage of two models before anything is fetched: from their routers alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.lineage.judging import judged_by_routers
from hf_moe_lmc.lineage.verdict import sentence
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.registry import families
from hf_moe_lmc.runtime.notices import NOTES, note
from hf_moe_lmc.runtime.processes import process_group


def foretell(a: MoEModel, b: MoEModel) -> None:
    """Notes the verdict of the routers; of models on the Hub, their rows are fetched for it. Nothing where nobody listens."""
    if not _is_heard():
        return
    layers = judged_by_routers(a, b)
    if layers:
        note(f"by their routers, {sentence(layers, None)}")


def foretell_known(a: Checkpoint, b: Checkpoint) -> None:
    """The same of two checkpoints that are about to be downloaded, if they are mixtures of experts of a known family."""
    if not _is_heard() or not all(_is_known(one) for one in (a, b)):
        return
    with suppress(InputError):  # a merge without alignment does not mind
        foretell(read_model(a), read_model(b))


def _is_known(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config
    text = config.get("text_config")
    return any(str(one.get("model_type")) in families() for one in (config, text) if isinstance(one, Mapping))


def _is_heard() -> bool:
    return process_group().is_main and NOTES.hasHandlers()
