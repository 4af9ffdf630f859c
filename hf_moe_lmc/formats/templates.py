"""What an output has the tensors, shards and configuration of: a checkpoint as it is stored, or as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.configuration import ABSENT
from hf_moe_lmc.checkpoints.extended import ExtendedCheckpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.packed import DECLARATIONS, MODELOPT
from hf_moe_lmc.checkpoints.virtual import laid_out
from hf_moe_lmc.formats.decoded import DecodedCheckpoint, decoded, storage_of
from hf_moe_lmc.formats.protocol import CODES
from hf_moe_lmc.formats.recognition import Storage

PLAIN = torch.bfloat16  # what quantized weights become in a plain output


@dataclass
class Template(Checkpoint):
    """The headers of an output, and the checkpoint that its configuration and side files come from.

    Attributes:
        storage: how its weights are stored; None: they are plain.
        declared_beside: the checkpoint whose hf_quant_config.json goes along; None: there is none.
    """

    storage: Storage | None = field(default=None, kw_only=True)
    declared_beside: Checkpoint | None = field(default=None, kw_only=True)


def output_template(layout: Checkpoint, settings: Checkpoint, *, plain: bool = False) -> Template:
    """The template of an output.

    Args:
        layout: whose tensors and shards it has, as decoded.
        settings: whose configuration and side files it has. Only what it says of quantization is the layout's.
        plain: quantized weights of the layout become PLAIN.
    """
    found = storage_of(layout)
    storage = None if plain else found
    changes = {**settings.changes, **(_entries(layout.config) if storage else dict.fromkeys(DECLARATIONS, ABSENT))}
    if storage is None:
        layout = decoded(layout, PLAIN)
        changes |= {"torch_dtype" if "torch_dtype" in settings.config else "dtype": "bfloat16"} if found else {}
        shards, tensors = layout.shards, layout.tensors
    elif isinstance(layout, DecodedCheckpoint):
        shards, tensors = layout.stored.shards, layout.stored.tensors
    else:
        shards, tensors = {}, {}
        for name, infos in _stored_infos(layout, storage):
            shards[name], placed = laid_out(infos, name)
            tensors |= {info.name: info for info in placed}
    beside = layout if storage and storage.quantization.beside else None
    return Template(settings.source, settings.config, shards, tensors, changes=changes, storage=storage, declared_beside=beside)


def _entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration declares of quantization, wherever it does; ABSENT where it says nothing."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    return {key: config.get(key) or inner.get(key) or ABSENT for key in DECLARATIONS}


def _stored_infos(layout: Checkpoint, storage: Storage) -> Iterator[tuple[str, list[TensorInfo]]]:
    """Shards of a checkpoint that was extended, with quantized weights in their parts wherever their shape is the same."""
    stored = layout.stored
    assembled = layout.assembled if isinstance(layout, ExtendedCheckpoint) else {}
    kept = {name for name in storage.weights if name in layout.tensors and name not in assembled}
    known = {*storage.owner, *storage.cache}
    codes = {storage.weights[name].parts[CODES].info.name: name for name in storage.weights.keys() - kept}
    new = [info for name, info in layout.tensors.items() if name not in stored.tensors and name not in storage.weights]
    for number, shard in enumerate(stored.shards.values()):
        infos = []
        for name in shard.tensors:
            if storage.owner.get(name) in kept or name in storage.cache:
                infos.append(stored.tensors[name])
            elif codes.get(name) in layout.tensors:  # a table that has other rows now
                infos.append(replace(layout.tensors[codes[name]], dtype=PLAIN))
            elif name in layout.tensors and name not in known:
                infos.append(layout.tensors[name])
        yield shard.name, infos + (new if number == len(stored.shards) - 1 else [])


def quantization_file(template: Checkpoint) -> tuple[Checkpoint, str] | None:
    """The file beside config.json that declares an output's quantization, and whose it is."""
    beside = template.declared_beside if isinstance(template, Template) else None
    return (beside.stored, MODELOPT) if beside else None
