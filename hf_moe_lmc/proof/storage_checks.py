"""The proof that a storage format carries the order of experts: on a stored miniature, with a control that must fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.formats.protocol import CODES
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.proof.checks import Check, difference, parts, reloaded, write
from hf_moe_lmc.writing.formats import model_moved


def storage_checks(family: MoEFamily, built: PreTrainedModel, stored: Path, folder: Path, seed: int = 0) -> Iterator[Check]:
    """Moves the experts of a small checkpoint in its own format, and compares values and outputs.

    Args:
        built: a model of the class and sizes of the checkpoint.
        stored: the quantized checkpoint, one file.
        folder: for what is written.

    Raises:
        FamilyError: the checkpoint is not quantized.
    """
    with Checkpoint.open(stored) as checkpoint:
        model = read_model(checkpoint, family)
        if model.storage is None:
            raise FamilyError(f"{checkpoint.name}: its weights are plain; expected quantized ones")
        kind = model.storage.kind
        g = parts(model, model.random(torch.Generator().manual_seed(seed)))["expert order"]
        moved = write(model_moved(model, g.layers, "b"), folder / "moved")
        expected = _outputs(built, model, folder / "plain")
        acted = model.acted(g.layers)
        with Checkpoint.open(moved) as other:
            again = read_model(other, family)
            apart = max(_apart(again, model, acted[index], index) for index in model.layers)
            yield Check(f"expert order in {kind}: values", apart, control=False)
            found = difference(_outputs(built, again, folder / "moved-plain"), expected)
            yield Check(f"expert order in {kind}: outputs", found, control=False)
        broken = shutil.copytree(moved, folder / "broken")
        _leave_scales(model, stored, broken)
        with Checkpoint.open(broken) as other:
            wrong = difference(_outputs(built, read_model(other, family), folder / "broken-plain"), expected)
            yield Check(f"experts moved in {kind}, scales left", wrong, control=True)


def _apart(again: MoEModel, model: MoEModel, acted: LayerSource, index: int) -> float:
    """How far the decoded tensors of a written layer are from those of the moved one: 0 where all are carried exactly."""
    layer, apart = model.layers[index], 0.0
    for name in layer.claims:
        expected = torch.cat([layer.assemble(name, piece, acted) for piece in layer.pieces(name)]).float()
        apart = max(apart, float((again.checkpoint.read(name).view(-1).float() - expected.view(-1)).abs().max()))
    return apart


def _outputs(built: PreTrainedModel, model: MoEModel, folder: Path) -> Tensor:
    """What transformers computes with the decoded values."""
    checkpoint = model.checkpoint
    folder.mkdir()
    built.config.save_pretrained(folder)
    tensors = {name: checkpoint.read(name).view(info.shape).clone() for name, info in checkpoint.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return reloaded(built, folder)


def _leave_scales(model: MoEModel, stored: Path, moved: Path) -> None:
    """Gives a moved checkpoint the scales that it had before."""
    assert model.storage is not None
    weights = [weight for name, weight in model.storage.weights.items() if name in model.layer_of]
    left = {part.info.name for weight in weights for role, part in weight.parts.items() if role != CODES}
    for file in moved.glob("*.safetensors"):
        content, before = load_file(file), load_file(stored / file.name)
        save_file({**content, **{name: before[name] for name in left & content.keys()}}, file, {"format": "pt"})
