"""The index of a sharded checkpoint: which tensor is in which file, and whether the files agree."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from hf_moe_lmc.checkpoints.contents import INDEX, SINGLE, check_one_model, instead
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo
from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.checkpoints.untrusted import read_json_object
from hf_moe_lmc.errors import CheckpointError, Faults, listing, shown, worded


def read_weight_map(source: Folder | Repository, files: set[str], faults: Faults) -> dict[str, str | None]:
    """Tensor name -> shard by the index, None where that is no file, which is added to `faults`; empty without an index."""
    if INDEX not in files:
        return {}
    where = f"{source.name}/{INDEX}"
    weight_map: Any = None
    with faults.gather():
        weight_map = read_json_object(source.path(INDEX), where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{where}: weight_map is missing or empty; fetch the index again")
    if not isinstance(weight_map, dict):
        return {}
    usable: dict[str, str | None] = dict.fromkeys(weight_map)
    listed: dict[str, list[str]] = {}  # those that are not there, with the tensors listed in them
    for key, file in weight_map.items():
        wrong = None
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            wrong = ("not to a .safetensors file", "entries that lead to no safetensors file")
        elif _leaves(file):
            wrong = ("a path that leaves the folder", "paths that leave the folder")
        if wrong and not faults.enough(wrong[1]):
            message = f"{where}: {shown(key)} is mapped to {worded(file)}, {wrong[0]}; fetch the index again"
            faults.add(CheckpointError(message, kind=wrong[1]))
        elif not wrong and file not in files:
            listed.setdefault(file, []).append(key)
        elif not wrong:
            usable[key] = file
    named = {file for file in usable.values() if file} | listed.keys()
    if named and (SINGLE not in named or not listed):  # else what is missing says more
        with faults.gather():
            check_one_model(source.name, files, named)
    if named and SINGLE in files and SINGLE not in named:
        return usable
    for file, keys in listed.items():
        if faults.enough("missing shards"):
            continue
        found = instead(source, file)
        state = f"expected a file, found {found}" if found else f"is missing; {source.remedy}"
        message = f"shard {shown(file)}, listed in {INDEX} for {shown(keys[0])}"
        message += f" and {len(keys) - 1} more tensors, {state}" if len(keys) > 1 else f", {state}"
        faults.add(CheckpointError(f"{source.name}: {message}", kind="missing shards"))
    return usable


@lru_cache(4096)  # thousands of tensors name the same few files
def _leaves(file: str) -> bool:
    path = PurePosixPath(file)
    return path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file or not file.isprintable()


def check_weight_map(
    name: str, weight_map: Mapping[str, str | None], shards: Mapping[str, Shard], tensors: Mapping[str, TensorInfo]
) -> None:
    """Compares the index with the headers that could be read."""
    problems = (
        [
            f"{shown(key)}: listed in {file}, not there"
            for key, file in weight_map.items()
            if file in shards and key not in tensors
        ],
        [f"{key}: in {info.shard}, not listed" for key, info in tensors.items() if key not in weight_map],
        [
            f"{key}: listed in {file}, found in {tensors[key].shard}"
            for key, file in weight_map.items()
            if file is not None and key in tensors and file != tensors[key].shard
        ],
    )
    if any(problems):
        lines = "\n".join(listing(of_a_kind) for of_a_kind in problems if of_a_kind)
        raise CheckpointError(f"{name}: {INDEX} and the shard headers disagree:\n{lines}")
