"""Small checkpoints of published models, made from their real configurations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.reading import read_config
from hf_moe_lmc.proof.miniature import build
from hf_moe_lmc.proof.small_config import shrink
from tests import tiny, zoo

REAL = Path(__file__).parent / "real"


def published(name: str, folder: Path, seed: int) -> Path:
    """A small checkpoint of a published model, under the model type that it is published with."""
    zoo.needs(json.loads((REAL / f"{name}.json").read_text())["model_type"])
    folder.mkdir()
    shutil.copy(REAL / f"{name}.json", folder / "config.json")
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        model_type, config = checkpoint.config["model_type"], read_config(checkpoint)
    small = shrink(config)
    small.get_text_config().vocab_size = tiny.VOCABULARY  # what the text's tokens fit into
    build(small, seed).save_pretrained(folder, save_original_format=True)
    tiny.tokenizer().save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "model_type": model_type}))  # a None says something, too
    return folder
