"""The file of a saved symmetry: a safetensors file of named tensors, with metadata.

    layers.{layer}.{field}          the first bank of a layer, and its shared expert
    layers.{layer}.{bank}.{field}   a further bank; it has no shared expert, and its shared fields are empty

Permutations are int32 (int64 is read as well), scales float32. This module knows tensors and names only; `group` says what
they mean.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_moe_lmc.checkpoints.header import read_shard
from hf_moe_lmc.errors import CheckpointError, SymmetryError, listing, shown
from hf_moe_lmc.symmetry.banks import FIRST, in_bank, qualified

FORMAT_VERSION = "1"
BANK_FIELDS = ("expert_order", "unit_order", "unit_scale")
SHARED_FIELDS = ("shared_order", "shared_scale")
FIELDS = (*BANK_FIELDS, *SHARED_FIELDS)
_KEY = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.(.+)")

Layers = Mapping[int, Mapping[str, Mapping[str, Tensor]]]  # layer -> bank -> field -> tensor


@dataclass(frozen=True)
class StoredSymmetry:
    """The content of a file.

    Attributes:
        groups: number of expert groups that bind.
        layers: layer -> bank, the first one first -> field -> tensor; each bank has all of FIELDS.
        metadata: the whole of the file's metadata.
    """

    family: str
    groups: int
    layers: Layers
    metadata: Mapping[str, str]


def save(path: str | os.PathLike[str], stored: StoredSymmetry) -> None:
    """Writes the file: equal contents give equal bytes."""
    tensors = {
        f"layers.{index}.{qualified(bank, name)}": values.to(torch.int32 if name.endswith("order") else torch.float32)
        for index, banks in stored.layers.items()
        for bank, fields in banks.items()
        for name, values in fields.items()
    }
    metadata = {
        **stored.metadata,
        "format": "pt",
        "hf_moe_lmc": "symmetry",
        "format_version": FORMAT_VERSION,
        "family": stored.family,
        "groups": str(stored.groups),
    }
    # bytes through an ordinary file: save_file would make it readable by its owner alone
    Path(path).write_bytes(_with_sorted_metadata(safetensors.torch.save(tensors, metadata)))


def locate(path: str | os.PathLike[str]) -> Path:
    """The file at `path`, or in a folder its symmetry.safetensors.

    Raises:
        SymmetryError: there is none; the message lists the places.
    """
    path = Path(path)
    candidates = [path / "symmetry.safetensors", path / "alignment" / "symmetry.safetensors"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise SymmetryError(f"{path}: no symmetry here; looked for\n{listing([str(candidate) for candidate in candidates])}")


def load(file: Path) -> StoredSymmetry:
    """Reads what `save` wrote.

    Raises:
        SymmetryError: another format, or a layer that lacks a field.
    """
    try:
        _, infos = read_shard(file, file.name, str(file))  # stricter than the library
        with safe_open(file, "pt") as opened:
            metadata = dict(opened.metadata() or {})
            _check_metadata(metadata, file)
            _check_tensors({info.name: info.dtype for info in infos}, str(file))
            tensors = {info.name: opened.get_tensor(info.name) for info in infos}
    except (SafetensorError, CheckpointError) as error:
        raise SymmetryError(f"{file}: not a readable safetensors file ({error})") from error
    return StoredSymmetry(metadata["family"], int(metadata["groups"]), _layers(tensors, str(file)), metadata)


def _check_metadata(metadata: Mapping[str, str], file: Path) -> None:
    if metadata.get("hf_moe_lmc") != "symmetry":
        raise SymmetryError(f"{file}: a safetensors file, but no symmetry saved by hf_moe_lmc")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise SymmetryError(f"{file}: format version {shown(version)}, this release reads {FORMAT_VERSION}; update hf_moe_lmc")
    if "family" not in metadata or not re.fullmatch("[1-9][0-9]{0,5}", metadata.get("groups", "")):
        raise SymmetryError(f"{file}: its metadata lack the family or the number of expert groups")


def _check_tensors(dtypes: Mapping[str, torch.dtype], where: str) -> None:
    """Raises SymmetryError, before values are read, unless these are the fields of layers."""
    for key, dtype in dtypes.items():
        name = key.rpartition(".")[2]
        if not _KEY.fullmatch(key) or name not in FIELDS:
            raise SymmetryError(f"{where}: unexpected tensor {shown(key)}")
        expected = (torch.int32, torch.int64) if name.endswith("order") else (torch.float32,)
        if dtype not in expected:
            raise SymmetryError(f"{where}: {shown(key)}: dtype {dtype}, expected {expected[0]}")


def _layers(tensors: Mapping[str, Tensor], where: str) -> dict[int, dict[str, dict[str, Tensor]]]:
    """The tensors of a file by layer (ascending), bank (the first one first) and field; permutations are int64."""
    layers: dict[int, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        index, _, rest = key.removeprefix("layers.").partition(".")
        bank, _, name = rest.rpartition(".")
        values = tensor.to(torch.int64 if name.endswith("order") else torch.float32)
        layers.setdefault(int(index), {FIRST: {}}).setdefault(bank, {})[name] = values
    for number, banks in layers.items():
        for bank, fields in banks.items():
            place = f"{where}: {in_bank(f'layer {number}', bank)}"
            if missing := [name for name in FIELDS if name not in fields]:
                raise SymmetryError(f"{place} lacks {', '.join(missing)}")
            if bank != FIRST and any(fields[name].numel() for name in SHARED_FIELDS):
                raise SymmetryError(f"{place}: shared fields with entries, expected none: the first bank holds them")
    return dict(sorted(layers.items()))


def _with_sorted_metadata(file: bytes) -> bytes:
    """A safetensors file with sorted metadata, which the library writes in random order."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data + file[end:]
