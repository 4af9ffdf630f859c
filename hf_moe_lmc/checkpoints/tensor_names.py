"""What names and shapes of tensors say of how a model was saved: wrapped, without its head, with an adapter, not gathered."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.errors import CheckpointError, Faults, shown

RENAME = "or rename the tensors (safetensors.torch: load_file, save_file)"
# Part of a name -> the wrapper that left it, and what to save instead.
_WRAPPERS = {
    "_orig_mod": ("compiled (torch.compile)", "model._orig_mod"),
    "_fsdp_wrapped_module": ("wrapped in FSDP", "the model through accelerator.save_model or a full state dict of FSDP"),
    "_flat_param": ("wrapped in FSDP", "the model through accelerator.save_model or a full state dict of FSDP"),
    "flat_param": ("wrapped in FSDP", "the model through accelerator.save_model or a full state dict of FSDP"),
    "_checkpoint_wrapped_module": ("wrapped for activation checkpointing", "the model without the wrapper"),
    "_forward_module": ("wrapped by Lightning", "the model inside the wrapper"),
    "module": ("wrapped in DistributedDataParallel, DataParallel or DeepSpeed", "model.module"),
}
_ADAPTER = re.compile(
    r"base_model\.model\..*"
    r"|.*\.(?:lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save|ia3_l|boft_[RS]|oft_[RS]"
    r"|vera_lambda_[bd]|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)(?:\..*)?"
)
# The parts of a decoder where its base class is saved alone: `model.` would stand before them.
_BASE = re.compile(r"(?:language_model\.)?(?:embed_tokens|embed_in|embed|wte|embeddings)\.weight")
_BASE_LAYER = re.compile(r"(?:language_model\.)?(?:layers|blocks)\.\d+\..+")
_PREFIXES = {"embeddings.weight": "backbone.", "wte.weight": "transformer."}  # where it is another
SENTENCES = "modules.json"  # of an embedding model, which has no head


def check_names(name: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuses tensors that transformers would not find in a model loaded from them, and those without elements.

    Raises:
        CheckpointError: one fault for each way in which the model was saved wrongly, with a tensor and the way out.
    """
    faults = Faults()
    if adapted := [one for one in tensors if _ADAPTER.fullmatch(one)]:
        faults.add(
            CheckpointError(
                f"{name}: {_some(adapted)} of an adapter (LoRA and the like) that is not merged into the weights; load base "
                "model and adapter with peft, and save what merge_and_unload returns"
            )
        )
    for part, (how, instead) in _WRAPPERS.items():
        if wrapped := _wrapped(part, tensors):
            fault = (
                f"{name}: {_some(wrapped)} with '{part}.' in the name: the model was saved {how}; transformers finds none of "
            )
            faults.add(CheckpointError(f"{fault}them. Save {instead} with save_pretrained, {RENAME}"))
    # a matrix without rows or columns is what some models have, such as those without shared experts
    hollow = [one for one, info in tensors.items() if info.dtype.is_floating_point and info.shape == (0,)]
    if hollow:
        faults.add(
            CheckpointError(
                f"{name}: {_some(hollow)} without elements (shape {list(tensors[hollow[0]].shape)}): the model was saved under "
                "DeepSpeed ZeRO-3 or FSDP without gathering its weights. Save it again from the trainer's checkpoint with "
                "zero_to_fp32.py, or train with stage3_gather_16bit_weights_on_model_save"
            )
        )
    faults.check()


def check_whole(name: str, names: Collection[str], files: Collection[str]) -> None:
    """Refuses the base class of a model that has a head; embedding models, which have none, pass.

    Args:
        files: of the checkpoint.

    Raises:
        CheckpointError: naming a tensor, and the way out.
    """
    if SENTENCES in files or not is_base(names):
        return
    first = next(one for one in names if _BASE_LAYER.fullmatch(one))
    headless = not any(one.startswith("lm_head.") for one in names)
    why = "only the base class was saved, without the head, which transformers would fill with random numbers"
    why = why if headless else "they are those of the base class"
    prefix = next((_PREFIXES[one] for one in names if one in _PREFIXES), "model.")
    raise CheckpointError(
        f"{name}: the names lack '{prefix}' ({shown(first)}): {why}. Save the whole model (AutoModelForCausalLM) with "
        f"save_pretrained; if the head is tied or at hand, put '{prefix}' before all names but those of the head "
        "(safetensors.torch: load_file, save_file)"
    )


def is_base(names: Collection[str]) -> bool:
    """Whether these are the tensors of a decoder's base class alone, as its `save_pretrained` names them."""
    return (
        any(_BASE.fullmatch(one) for one in names)
        and any(_BASE_LAYER.fullmatch(one) for one in names)
        and not any(one.startswith(("model.", "backbone.", "transformer.", "head.")) for one in names)
    )


def _wrapped(part: str, names: Collection[str]) -> list[str]:
    """Names that hold a part; `module`, which other names may hold, must begin all of them."""
    if part == "module":
        return list(names) if names and all(one.startswith("module.") for one in names) else []
    return [one for one in names if part in one.split(".")]


def _some(names: Iterable[str]) -> str:
    found = list(names)
    return f"{len(found)} tensors ({shown(found[0])}, ...)" if len(found) > 1 else f"a tensor ({shown(found[0])})"
