"""Small random models that are stored as a quantized model is: with its parts, scales, dtypes and quantization_config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_moe_lmc.checkpoints.packed import DECLARATIONS, MODELOPT
from hf_moe_lmc.formats.decoded import DecodedCheckpoint
from hf_moe_lmc.formats.encoding import encoded_like, grain
from hf_moe_lmc.formats.fp8 import Float8
from hf_moe_lmc.formats.integers import Integers
from hf_moe_lmc.formats.protocol import Format, StoredWeight
from hf_moe_lmc.moe.model_class import foreign
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.small_config import shrink
from hf_moe_lmc.proof.stored_like import StoredLike, stored_like

FILE = "model.safetensors"


@dataclass(frozen=True)
class StoredMiniature:
    """Two small models in the storage format of a large one.

    Attributes:
        built: a model of their class and sizes.
        like: how each of their tensors is stored.
        a, b: folders. Integers in A lack their lowest code.
    """

    built: PreTrainedModel
    like: StoredLike
    a: Path
    b: Path


def stored_miniature(checkpoint: DecodedCheckpoint, config: PreTrainedConfig, folder: Path, seed: int = 0) -> StoredMiniature:
    """Two small models that are stored as a checkpoint is; of that, headers are read alone.

    Args:
        config: of the checkpoint.
        folder: for what is written.

    Raises:
        FamilyError: the configuration has no miniature of such widths.
        ForeignError: its class fails.
    """
    small = shrink(config, scale_for(checkpoint.storage.formats))
    built = [build(small, seed), build(small, seed + 1)]
    contents = {original: _saved(built[0], folder / f"plain-{original}", original) for original in (True, False)}
    likes = {
        original: stored_like(checkpoint, checkpoint.storage, {name: tuple(one.shape) for name, one in content.items()})
        for original, content in contents.items()
    }
    original = min(likes, key=lambda one: len(likes[one].missed))  # that of the Hub, if both are as good
    a, like = contents[original], likes[original]
    b = _saved(built[1], folder / "plain-b", original)
    b |= {name: tensor for name, tensor in a.items() if not tensor.is_floating_point()}  # what no merge interpolates
    folders = []
    for number, content in enumerate((a, b)):
        output = folder / f"stored-{'ab'[number]}"
        output.mkdir()
        save_file(_stored(content, like, lowest=number > 0, seed=seed + number), output / FILE, {"format": "pt"})
        small.save_pretrained(output)
        _declare(checkpoint, output)
        folders.append(output)
    return StoredMiniature(built[0], like, *folders)


def scale_for(formats: Iterable[Format]) -> int:
    """What widths of a small model are multiplied by, so that its weights have several groups, or a block and part of one.

    Example:
        >>> scale_for([Float8((128, 128))]), scale_for([Float8((0, 0))])
        (8, 1)
    """
    scale = 1
    for form in formats:
        group = max(form.block) if isinstance(form, Float8) else 2 * grain(form)
        while scale * 16 < group:
            scale *= 2
    return scale


def _saved(built: PreTrainedModel, folder: Path, original: bool) -> dict[str, Tensor]:
    with foreign(type(built), "cannot be saved"):
        built.save_pretrained(folder, save_original_format=original)
    return load_file(folder / FILE)


def _stored(content: Mapping[str, Tensor], like: StoredLike, *, lowest: bool, seed: int) -> dict[str, Tensor]:
    """The tensors on disk of a small model."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, tensor in content.items():
        weight = like.weights.get(name)
        if weight is not None:
            values = _spread(tensor.float(), generator)
            found |= encoded_like(weight, name, values if lowest else _without_lowest(weight, values))
        else:
            dtype = like.dtypes.get(name, tensor.dtype)
            found[name] = tensor.to(dtype) if tensor.is_floating_point() and dtype.is_floating_point else tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _spread(values: Tensor, generator: torch.Generator) -> Tensor:
    """Weights of which each, and each expert's, has a size of its own: between half and twice the given one."""
    count = len(values) if values.ndim > 2 else 1
    factors = torch.exp2(2 * torch.rand(count, generator=generator) - 1)
    return values * factors.view(-1, *[1] * (values.ndim - 1))


def _without_lowest(weight: StoredWeight, values: Tensor) -> Tensor:
    """With the largest value of each group positive, and no negative one as large: no integer becomes the lowest one."""
    if not isinstance(weight.format, Integers):
        return values
    groups = values.unflatten(-1, (-1, weight.format.group or values.shape[-1]))
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))
    groups = groups * torch.where(largest < 0, -1.0, 1.0)
    return torch.where(groups < 0, 0.9 * groups, groups).flatten(-2)


def _declare(checkpoint: DecodedCheckpoint, folder: Path) -> None:
    """Has a folder declare the quantization of a checkpoint, where that does."""
    path = folder / "config.json"
    config, theirs = json.loads(path.read_text(encoding="utf-8")), checkpoint.config
    config |= {key: theirs[key] for key in DECLARATIONS if key in theirs}
    inner = theirs.get("text_config")
    if isinstance(inner, Mapping):
        config.get("text_config", config).update({key: inner[key] for key in DECLARATIONS if key in inner})
    if "transformers_version" not in theirs:  # which implies a quantization for some
        config.pop("transformers_version", None)
    path.write_text(json.dumps(config), encoding="utf-8")
    if checkpoint.storage.quantization.beside:
        shutil.copy(checkpoint.stored.source.path(MODELOPT), folder / MODELOPT)
