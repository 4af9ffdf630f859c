"""Whether the tensors of a checkpoint are exactly those of the class that it is read as."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from hf_moe_lmc.checkpoints.joint import IGNORED
from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.proof.miniature import skeleton


def check_tensors(model: MoEModel) -> None:
    """Raises FamilyError unless the tensors outside the MoE blocks have the names and shapes that the class has, in a layout.

    Those of the blocks have been compared when the model was read; multi-token prediction and buffers do not count.
    """
    checkpoint = model.checkpoint
    found = {
        name: checkpoint.tensors[name].shape for name in model.outside if not (model.is_extra(name) or IGNORED.fullmatch(name))
    }
    problems = min((_differences(model, found, names) for names in _layouts(model)), key=len)
    if problems:
        name, known_as = checkpoint.config.get("model_type"), model.config.model_type
        raise FamilyError(
            f"{checkpoint.name}: model type {name!r} is {known_as!r} of transformers "
            f"only where every tensor fits, and code of its own is never run. What does not fit:\n{listing(problems)}"
        )


def _layouts(model: MoEModel) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes outside the MoE blocks: as on the Hub, and as in memory."""
    whole: Any = skeleton(model.config)
    tied = set(getattr(whole, "all_tied_weights_keys", None) or {})
    state = {name: value for name, value in whole.state_dict().items() if name not in tied}
    whole._weight_conversions = get_model_conversion_mapping(whole)
    layouts = (revert_weight_conversion(whole, dict(state)), state)
    return [{name: tuple(value.shape) for name, value in names.items() if not _in_block(model, name)} for names in layouts]


def _in_block(model: MoEModel, name: str) -> bool:
    for stack, tower in zip(model.family.stacks, model.towers, strict=True):
        match = stack.pattern(tower).fullmatch(name)
        if match and int(match["layer"]) in model.layers and match["rest"].startswith(model.family.block_prefixes):
            return True
    return False


def _differences(model: MoEModel, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    problems = [f"{name}: not in that class" for name in sorted(found.keys() - wanted.keys())]
    problems += [f"missing: {name}" for name in sorted(wanted.keys() - found.keys())]
    return problems + [
        f"{name}: expected shape {list(wanted[name])}, found {list(found[name])}"
        for name in sorted(found.keys() & wanted.keys())
        if found[name] != wanted[name]
    ]
