"""The contents of a model folder or Hub repository: configuration, index and shard headers, checked before anything else.

All problems are reported together, unless one only follows from another.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from hf_moe_lmc.checkpoints.configuration import check_counts
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo, read_shard, remote_shard
from hf_moe_lmc.checkpoints.quantization import Quantization, read_quantization
from hf_moe_lmc.checkpoints.source import Folder, Repository
from hf_moe_lmc.checkpoints.untrusted import kind_of, read_json_object
from hf_moe_lmc.errors import CheckpointError, Faults, InputError, listing, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADERS_AT_ONCE = 8


@dataclass(frozen=True)
class Contents:
    """What a complete checkpoint consists of; see `Checkpoint`, which has the same attributes."""

    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    quantization: Quantization | None


def read_contents(source: Folder | Repository) -> Contents:
    """Reads configuration, index and every shard header; of a Hub repository, nothing but these is downloaded.

    Raises:
        CheckpointError: not a safetensors checkpoint, or damaged; every fault is listed, with file and key.
    """
    files = set(source.files())
    for file in files & {"config.json", INDEX}:
        source.path(file)  # whoever may not have these need not ask for the rest
    faults = Faults()
    _refuse_other_kinds(source, files, faults)
    config, quantization = _read_config(source, files, faults)
    weight_map = _read_weight_map(source, files, faults)
    listed = list(dict.fromkeys(file for file in weight_map.values() if file))
    names = listed if INDEX in files else [SINGLE] if SINGLE in files else []
    shards, tensors = _read_headers(source, names, faults)
    if weight_map:
        with faults.gather():
            _check_weight_map(source.name, weight_map, shards, tensors)
    faults.check()
    return Contents(config, shards, tensors, quantization)


def read_header(source: Folder | Repository, name: str) -> tuple[Shard, list[TensorInfo]]:
    """One shard and its tensors, from its header alone."""
    where = f"{source.name}/{name}"
    if isinstance(source, Repository) and not source.cached:
        return remote_shard(source.header(name), name, where)
    return read_shard(source.path(name), name, where)


def _read_config(source: Folder | Repository, files: set[str], faults: Faults) -> tuple[dict[str, Any], Quantization | None]:
    config: dict[str, Any] = {}
    with faults.gather():
        if "config.json" in files:
            config = read_json_object(source.path("config.json"), f"{source.name}/config.json", constants=True)
            check_counts(f"{source.name}/config.json", config)
            return config, read_quantization(source.name, config)
    return config, None


def _read_headers(
    source: Folder | Repository, names: list[str], faults: Faults
) -> tuple[dict[str, Shard], dict[str, TensorInfo]]:
    """Shards and tensors by name, as far as they can be read."""

    def attempt(name: str) -> tuple[Shard, list[TensorInfo]] | InputError:
        try:
            return read_header(source, name)
        except InputError as error:
            return error

    shards: dict[str, Shard] = {}
    tensors: dict[str, TensorInfo] = {}
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:  # a large model on the Hub has hundreds
        headers = list(pool.map(attempt, names))
    for name, header in zip(names, headers, strict=True):
        if isinstance(header, InputError):
            faults.add(header)
            continue
        shards[name], infos = header
        for info in infos:
            if info.name in tensors and not faults.enough("tensors in two shards"):
                message = f"tensor {info.name} is in two shards, {tensors[info.name].shard} and {name}; fetch it again"
                faults.add(CheckpointError(f"{source.name}: {message}", kind="tensors in two shards"))
            tensors[info.name] = info
    return shards, tensors


def _refuse_other_kinds(source: Folder | Repository, files: set[str], faults: Faults) -> None:
    """Adds a fault unless there are safetensors weights and a configuration."""
    name, top = source.name, {file for file in files if "/" not in file}
    weights = any(file.startswith("model") and file.endswith(".safetensors") for file in top)
    if "adapter_config.json" in top and not weights:
        adapter = "holds an adapter only (adapter_config.json); merge it into its base model first (peft: merge_and_unload)"
        faults.add(CheckpointError(f"{name}: {adapter}"))
        return
    if INDEX not in top and SINGLE not in top:
        faults.add(CheckpointError(f"{name}: {_instead_of_weights(source, top)}"))
    if "config.json" not in top and weights:
        kind = _kind_instead(source, "config.json")
        state = f"expected a file, found {kind}" if kind else "is missing; copy it from the model this checkpoint comes from"
        faults.add(CheckpointError(f"{name}: config.json {state}"))


def _instead_of_weights(source: Folder | Repository, top: set[str]) -> str:
    """What the folder holds in place of safetensors weights, as text."""
    for file in (INDEX, SINGLE):
        if kind := _kind_instead(source, file):
            return f"{file}: expected a file, found {kind}"
    pickles = sorted(file for file in top if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        return (
            f"weights only as pickles ({shown(pickles[0])}), which can run code when opened; "
            "load the model with transformers and save_pretrained it as safetensors first"
        )
    shards = sorted(file for file in top if file.endswith(".safetensors"))
    if shards:
        return f"{len(shards)} safetensors files ({shown(shards[0])}, ...) but no {INDEX} that lists them"
    return f"expected {SINGLE} or {INDEX}, found neither; is this a model folder?"


def _kind_instead(source: Folder | Repository, file: str) -> str | None:
    """The kind of what is there in place of a regular file, as text; None if nothing is."""
    return kind_of(source.path(file)) if isinstance(source, Folder) else None


def _read_weight_map(source: Folder | Repository, files: set[str], faults: Faults) -> dict[str, str | None]:
    """Tensor name -> shard, from the index; empty without an index.

    Where the shard cannot be used, it is None, and a fault is added.
    """
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
    missing: dict[str, list[str]] = {}  # shard -> the tensors listed in it
    for key, file in weight_map.items():
        wrong = None
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            wrong = ("not to a .safetensors file", "entries that lead to no safetensors file")
        elif _leaves_folder(file):
            wrong = ("a path that leaves the folder", "paths that leave the folder")
        if wrong and not faults.enough(wrong[1]):
            message = f"{where}: {shown(key)} is mapped to {shown(repr(file))}, {wrong[0]}; fetch the index again"
            faults.add(CheckpointError(message, kind=wrong[1]))
        elif not wrong and file not in files:
            missing.setdefault(file, []).append(key)
        elif not wrong:
            usable[key] = file
    for file, keys in missing.items():
        if faults.enough("missing shards"):
            continue
        kind = _kind_instead(source, file)
        state = f"expected a file, found {kind}" if kind else "is missing; fetch it again"
        message = f"shard {shown(file)}, listed in {INDEX} for {shown(keys[0])}"
        message += f" and {len(keys) - 1} more tensors, {state}" if len(keys) > 1 else f", {state}"
        faults.add(CheckpointError(f"{source.name}: {message}", kind="missing shards"))
    return usable


@lru_cache(4096)  # thousands of tensors name the same few files
def _leaves_folder(file: str) -> bool:
    path = PurePosixPath(file)
    return path.is_absolute() or ".." in path.parts or "\\" in file or ":" in file or not file.isprintable()


def _check_weight_map(
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
        lines = "\n".join(listing(lines_of_kind) for lines_of_kind in problems if lines_of_kind)
        raise CheckpointError(f"{name}: {INDEX} and the shard headers disagree:\n{lines}")
