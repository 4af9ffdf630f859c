"""A checkpoint on disk or on the Hub: sharded safetensors, checked from the headers and read by ranges.

The format is eight bytes of header length, a JSON header, and the tensors one after the other. Any contiguous range of
elements can be read, so neither a shard nor a large tensor is ever held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from hf_moe_lmc.distribution import team
from hf_moe_lmc.errors import CheckpointError, listing
from hf_moe_lmc.hub import Folder, Repository, resolve
from hf_moe_lmc.quantisation import Quantisation, read_quantisation

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
CHUNK = 8 << 20  # bytes of one copy, and the elements' budget of one piece outside the MoE blocks
HEADERS_AT_ONCE = 8
PROBE, PROBES, PROBE_EVERY = 512, 8, 4 << 20  # bytes; what the fingerprint sees of a tensor, see `_sample`

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What does not go along: other weights and archives, code, the card, and what a trainer leaves behind.
FOREIGN_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx", ".npz", ".zip", ".tar", ".gz",
    ".py", ".log", ".lock",
}  # fmt: skip
FOREIGN_FILES = {
    "config.json",
    "README.md",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `start` in the file of `shard`."""

    name: str
    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its raw header (with the eight length bytes), its size, its tensors in file order."""

    name: str
    header: bytes
    size: int
    tensors: tuple[str, ...]


@dataclass
class Checkpoint:
    """A complete checkpoint, known from its headers alone until somebody reads a tensor.

    Attributes:
        source: the folder, or the Hub repository at one commit.
        config: config.json as written.
        shards: by file name, in the order of the weight map.
        tensors: by name, in shard and file order.
        quantisation: what config.json declares of the weights.
    """

    source: Folder | Repository
    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    quantisation: Quantisation | None = None
    _descriptors: dict[str, int] = field(default_factory=dict, repr=False)
    _fingerprint: str | None = field(default=None, repr=False)  # reports, cards and warnings all ask for it
    _opening: Lock = field(default_factory=Lock, repr=False)  # a loader may read from several threads

    @classmethod
    def open(cls, model: str | os.PathLike[str]) -> Checkpoint:
        """Reads configuration, index and every shard header; checks all of them before anything else is done.

        For a Hub id, nothing but these is downloaded; `download` brings the weights.

        Raises:
            CheckpointError: nothing there, not a safetensors checkpoint, or damaged; the file and key are named.
        """
        source = resolve(model)
        files = set(source.files())
        _refuse_other_kinds(source.name, files)
        config = _read_json(source, "config.json")
        quantisation = read_quantisation(source.name, config)
        weight_map = _read_weight_map(source, files)
        names = list(dict.fromkeys(weight_map.values())) if weight_map else [SINGLE]
        shards: dict[str, Shard] = {}
        tensors: dict[str, TensorInfo] = {}
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:  # a large model on the Hub has hundreds
            read = list(pool.map(lambda name: _read_shard(source, name), names))
        for name, (shard, infos) in zip(names, read, strict=True):
            shards[name] = shard
            for info in infos:
                if info.name in tensors:
                    raise CheckpointError(
                        f"{source.name}: tensor {info.name} is in two shards, {tensors[info.name].shard} and {name}"
                    )
                tensors[info.name] = info
        if weight_map:
            _check_weight_map(source.name, weight_map, tensors)
        return cls(source=source, config=config, shards=shards, tensors=tensors, quantisation=quantisation)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def display_name(self) -> str:
        """Hub id, or the folder's name without its path: fit to be published."""
        return self.source.root.resolve().name if isinstance(self.source, Folder) else self.source.repo_id

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def is_here(self) -> bool:
        """Whether its weights can be read without a download."""
        return isinstance(self.source, Folder) or self.source.cached

    def download(self) -> None:
        """Brings the shards and side files of a Hub checkpoint here; nothing to do for a folder."""
        if isinstance(self.source, Folder) or self.source.cached:
            return
        self.source.fetch([*self.shards, *self.side_files()])
        here = Folder(self.source.path("config.json").parent)
        for name in self.shards:  # what came must be whole, and what was checked from afar
            shard, infos = _read_shard(here, name)
            seen = {key: (self.tensors[key].dtype, self.tensors[key].shape) for key in self.shards[name].tensors}
            if {info.name: (info.dtype, info.shape) for info in infos} != seen:
                raise CheckpointError(f"{self.name}: the downloaded {name} differs from the header seen on the Hub")
            self.shards[name] = shard
            self.tensors.update((info.name, info) for info in infos)

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """`count` elements of tensor `name` from element `first`, in its own dtype: a fresh tensor, [count]."""
        info = self.tensors[name]
        count = info.numel - first if count is None else count
        values = torch.empty(count, dtype=info.dtype)
        self.fill(values, info.shard, info.start + first * info.dtype.itemsize)
        return values

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Tensor `name` as (first element, values) in ranges of a bounded size, in its own dtype."""
        info = self.tensors[name]
        step = max(1, CHUNK // info.dtype.itemsize)
        for first in range(0, info.numel, step):
            yield first, self.read(name, first, min(step, info.numel - first))

    def side_files(self) -> list[str]:
        """Tokenizer, generation configuration, licence and the like: what goes with the weights besides the card."""
        return [file for file in self.source.files() if _is_side_file(file)]

    def fingerprint(self) -> str:
        """SHA-256 over config.json, every shard's header and size, and samples of each tensor, see `_sample`."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
            with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
                for of_shard in pool.map(self._sample, sorted(self.shards)):
                    digest.update(of_shard)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _sample(self, name: str) -> bytes:
        """Hash of a shard's header and size, and of each tensor's bytes: all of a small one, else PROBE bytes in places
        that are spread evenly from its first to its last byte, two and one more for each PROBE_EVERY bytes, at most PROBES.
        """
        shard, descriptor = self.shards[name], self._descriptor(name)
        digest = hashlib.sha256(f"{name} {shard.size} ".encode() + shard.header)
        for tensor in shard.tensors:
            info = self.tensors[tensor]
            if info.nbytes <= PROBES * PROBE:
                digest.update(os.pread(descriptor, info.nbytes, info.start))
                continue
            places = min(PROBES, 2 + info.nbytes // PROBE_EVERY)
            for i in range(places):
                digest.update(os.pread(descriptor, PROBE, info.start + i * (info.nbytes - PROBE) // (places - 1)))
        return digest.digest()

    def origin(self) -> dict[str, str]:
        """What tells this checkpoint from another: its Hub id and commit or its folder's name, and its fingerprint.

        Fit to be published: no local path is in it.
        """
        commit = {"commit": self.source.commit} if self.source.commit else {}
        return {"source": self.display_name, **commit, "fingerprint": self.fingerprint()}

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _descriptor(self, shard: str) -> int:
        with self._opening:
            if shard not in self._descriptors:
                self._descriptors[shard] = os.open(self.source.path(shard), os.O_RDONLY)
            return self._descriptors[shard]

    def fill(self, values: Tensor, shard: str, position: int) -> None:
        """Fills `values`, a contiguous row of any dtype, with the bytes of a shard's file from `position`."""
        descriptor = self._descriptor(shard)
        view = values.view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise CheckpointError(f"{self.name}/{shard}: ends at byte {position}, before its last tensor; fetch it again")
            view = view[got:]
            position += got


def bring(*checkpoints: Checkpoint) -> None:
    """Brings the weights of checkpoints here, once on each machine; all processes have to see the same ones."""
    mates = team()
    with mates.main_first():
        for checkpoint in checkpoints:
            checkpoint.download()
    if mates.count > 1:
        mates.check_equal({checkpoint.name: checkpoint.fingerprint() for checkpoint in checkpoints})


def _is_side_file(file: str) -> bool:
    folder, _, name = file.rpartition("/")
    if folder:
        return folder == "additional_chat_templates"
    foreign = name.startswith((".", "events.out.")) or name in FOREIGN_FILES or name.endswith(".index.json")
    return not foreign and Path(name).suffix not in FOREIGN_SUFFIXES


def _refuse_other_kinds(name: str, files: set[str]) -> None:
    top = {file for file in files if "/" not in file}
    if "adapter_config.json" in top and not any(file.startswith("model") and file.endswith(".safetensors") for file in top):
        raise CheckpointError(
            f"{name}: holds an adapter only (adapter_config.json); merge it into its base model first (peft: merge_and_unload)"
        )
    if INDEX not in top and SINGLE not in top:
        pickles = sorted(file for file in top if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
        if pickles:
            raise CheckpointError(
                f"{name}: weights only as pickles ({pickles[0]}), which can run code when opened; "
                "load the model with transformers and save_pretrained it as safetensors first"
            )
        shards = sorted(file for file in top if file.endswith(".safetensors"))
        if shards:
            raise CheckpointError(f"{name}: {len(shards)} safetensors files ({shards[0]}, ...) but no {INDEX} that lists them")
        raise CheckpointError(f"{name}: expected {SINGLE} or {INDEX}, found neither; is this a model folder?")
    if "config.json" not in top:
        raise CheckpointError(f"{name}: config.json is missing; copy it from the model this checkpoint comes from")


def _read_json(source: Folder | Repository, file: str) -> dict[str, Any]:
    try:
        value = json.loads(source.path(file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source.name}/{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source.name}/{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_weight_map(source: Folder | Repository, files: set[str]) -> dict[str, str]:
    if INDEX not in files:
        return {}
    weight_map = _read_json(source, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source.name}/{INDEX}: weight_map is missing or empty")
    for key, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(f"{source.name}/{INDEX}: {key} is mapped to {file!r}, not to a .safetensors file")
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file or ":" in file:
            raise CheckpointError(f"{source.name}/{INDEX}: {key} is mapped to {file!r}, a path that leaves the folder")
        if file not in files:
            raise CheckpointError(f"{source.name}: shard {file}, listed in {INDEX}, is missing")
    return weight_map


def _check_weight_map(name: str, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    problems = [f"{key}: listed in {file}, not there" for key, file in weight_map.items() if key not in tensors]
    problems += [f"{key}: in {info.shard}, not listed" for key, info in tensors.items() if key not in weight_map]
    problems += [
        f"{key}: listed in {weight_map[key]}, found in {info.shard}"
        for key, info in tensors.items()
        if key in weight_map and weight_map[key] != info.shard
    ]
    if problems:
        raise CheckpointError(f"{name}: {INDEX} and the shard headers disagree:\n{listing(problems)}")


def _read_shard(source: Folder | Repository, name: str) -> tuple[Shard, list[TensorInfo]]:
    where = f"{source.name}/{name}"
    if isinstance(source, Repository) and not source.cached:
        header, raw, size = source.header(name), b"", None
        data = 0
    else:
        with source.path(name).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw, header = _read_header(file, size, where)
        data = len(raw)
    infos = _parse_header(header, name, data, where)
    end = max((info.start + info.nbytes for info in infos), default=data)
    if size is not None and end != size:
        state = "truncated" if end > size else "longer than its header says"
        raise CheckpointError(f"{where}: {state}: the header describes {end} bytes, the file has {size}; fetch it again")
    return Shard(name, raw, end, tuple(info.name for info in infos)), infos


def _read_header(file: BinaryIO, size: int, where: str) -> tuple[bytes, dict[str, Any]]:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(HEADER_LIMIT, size - 8):
        raise CheckpointError(f"{where}: not a whole safetensors file ({size} bytes, header of {length}); fetch it again")
    body = file.read(length)
    try:
        header = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: the header is not a JSON object")
    return prefix + body, header


def _parse_header(header: Mapping[str, Any], shard: str, data: int, where: str) -> list[TensorInfo]:
    infos = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = DTYPES[entry["dtype"]]
            shape = tuple(int(size) for size in entry["shape"])
            begin, end = (int(offset) for offset in entry["data_offsets"])
        except KeyError as error:
            raise CheckpointError(f"{where}: tensor {name}: dtype or field {error} is not one that is read here") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: tensor {name}: malformed header entry {entry!r}") from error
        if min(shape, default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{where}: tensor {name}: {list(shape)} of {dtype} does not fill bytes {begin} to {end}")
        infos.append(TensorInfo(name, shard, dtype, shape, data + begin, end - begin))
    infos.sort(key=lambda info: (info.start, info.nbytes))
    expected = data
    for info in infos:
        if info.start != expected:
            raise CheckpointError(
                f"{where}: tensor {info.name} starts at byte {info.start}, expected {expected} (hole or overlap)"
            )
        expected += info.nbytes
    return infos
