"""A checkpoint on disk or on the Hub: sharded safetensors, checked from the headers and read by ranges.

The format is eight bytes of header length, a JSON header, and the tensors one after the other. Any contiguous range of
elements can be read, so neither a shard nor a large tensor is ever held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor

from hf_moe_lmc.checkpoints.configuration import ABSENT, check_counts
from hf_moe_lmc.checkpoints.contents import INDEX, SINGLE, check_contents, check_named
from hf_moe_lmc.checkpoints.header import (
    Shard,
    TensorInfo,
    read_shard,
    remote_shard,
)
from hf_moe_lmc.checkpoints.packed import MODELOPT, Packing, read_packing
from hf_moe_lmc.checkpoints.quantization import Quantization
from hf_moe_lmc.checkpoints.side_files import is_side_file
from hf_moe_lmc.checkpoints.source import Folder, Repository, resolve
from hf_moe_lmc.checkpoints.tensor_names import check_names
from hf_moe_lmc.checkpoints.untrusted import open_regular, read_json_object
from hf_moe_lmc.checkpoints.weight_map import check_weight_map, read_weight_map
from hf_moe_lmc.errors import CheckpointError, Faults, InputError
from hf_moe_lmc.runtime.memory import reused
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.runtime.progress import size_of

CHUNK = 8 << 20  # bytes of one copy, and the elements' budget of one piece outside the MoE blocks
HEADERS_AT_ONCE = 8
RANGES_AT_ONCE, READS_AT_ONCE = 16, 2  # ranges that are asked for at a time on the Hub, and on disk
PROBE, PROBES, PROBE_EVERY = 512, 8, 4 << 20  # bytes; what the fingerprint sees of a tensor, see `_sample`
# Bits that are all set in the codes that are NaN or infinite.
_WITHOUT_SIGN = 0x7F
_FIRST_NOT_FINITE = {torch.float8_e4m3fn: 0x7F, torch.float8_e5m2: 0x7C, torch.float8_e8m0fnu: 0xFF}  # codes without sign
DESCRIPTORS = 256  # files that stay open; of any more, each read opens its own


@dataclass
class Checkpoint:
    """A complete checkpoint, known from its headers alone until somebody reads a tensor.

    Attributes:
        source: the folder, or the Hub repository at one commit.
        config: config.json as written.
        shards: by file name, in the order of the weight map.
        tensors: by name, in shard and file order.
        quantization: of the weights; None: they are plain.
        changes: values that its configuration gets where it is the template of an output, see `with_changes`.
    """

    source: Folder | Repository
    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    quantization: Quantization | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    _descriptors: dict[str, int] = field(default_factory=dict, repr=False)
    _fingerprint: str | None = field(default=None, repr=False)  # reports, cards and warnings all ask for it
    _here: set[str] = field(default_factory=set, repr=False)  # shards of a repository that were found in the cache
    _opening: Lock = field(default_factory=Lock, repr=False)  # a loader may read from several threads

    @classmethod
    def open(cls, model: str | os.PathLike[str]) -> Checkpoint:
        """Reads configuration, index and every shard header; checks all of them before anything else is done.

        For a Hub id, nothing but these is downloaded; `download` brings the weights.

        Raises:
            CheckpointError: nothing there, not a safetensors checkpoint, or damaged; every fault is listed, with file and
                key, unless it only follows from another.
        """
        source = resolve(model)
        files = set(source.files())
        for file in files & {"config.json", INDEX}:
            source.path(file)  # whoever may not have these need not ask for the rest
        faults = Faults()
        check_contents(source, files, faults)
        config: dict[str, Any] = {}
        with faults.gather():
            if "config.json" in files:
                config = read_json_object(source.path("config.json"), f"{source.name}/config.json", constants=True)
                check_counts(f"{source.name}/config.json", config)
                check_named(source.name, config)
        weight_map = read_weight_map(source, files, faults)
        listed = list(dict.fromkeys(file for file in weight_map.values() if file))
        names = listed if INDEX in files else [SINGLE] if SINGLE in files else []
        shards: dict[str, Shard] = {}
        tensors: dict[str, TensorInfo] = {}
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:  # a large model on the Hub has hundreds
            read = list(pool.map(lambda name: _attempt(source, name), names))
        for name, found in zip(names, read, strict=True):
            if isinstance(found, InputError):
                faults.add(found)
                continue
            shards[name], infos = found
            for info in infos:
                if info.name in tensors and not faults.enough("tensors in two shards"):
                    message = f"tensor {info.name} is in two shards, {tensors[info.name].shard} and {name}; fetch it again"
                    faults.add(CheckpointError(f"{source.name}: {message}", kind="tensors in two shards"))
                tensors[info.name] = info
        with faults.gather():
            check_names(source.name, tensors)
        if weight_map:
            with faults.gather():
                check_weight_map(source.name, weight_map, shards, tensors)
        packing = Packing(None)
        if len(shards) == len(names):  # of weights that cannot be read, nothing else is said
            with faults.gather():
                described = partial(source.path, MODELOPT) if MODELOPT in files else None
                packing = read_packing(source.name, config, tensors, described)
        faults.check()
        changes = dict.fromkeys(packing.dropped, ABSENT)
        return cls(source, config, shards, tensors, packing.quantization, changes)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def stored(self) -> Checkpoint:
        """The checkpoint whose tensors are those in the files: this one, unless it is computed from another."""
        return self

    @property
    def display_name(self) -> str:
        """Hub id, or the folder's name without its path: fit to be published."""
        return self.source.root.resolve().name if isinstance(self.source, Folder) else self.source.repo_id

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def folder(self) -> Path:
        """Where its configuration lies on this machine, in the Hub's cache or elsewhere."""
        return self.source.path("config.json").parent

    @property
    def is_downloaded(self) -> bool:
        """Whether its weights can be read without a download."""
        return isinstance(self.source, Folder) or self.source.cached

    def absent(self) -> dict[str, int]:
        """Bytes of the files that `download` would bring from the Hub."""
        return {} if self.is_downloaded else self.source.absent(self._needed())

    def _needed(self) -> list[str]:
        """Files of a Hub checkpoint that are read: no others are fetched, whatever else the repository holds."""
        return [*self.shards, *self.side_files(), *(file for file in ("README.md",) if file in self.source.files())]

    def download(self) -> None:
        """Brings the shards, side files and card of a Hub checkpoint here; nothing to do for a folder."""
        if self.is_downloaded:
            return
        self.source.download(self._needed())
        here = Folder(self.source.path("config.json").parent)
        for name in self.shards:  # what came must be whole, and what was checked from afar
            shard, infos = _read_shard(here, name)
            seen = {key: (self.tensors[key].dtype, self.tensors[key].shape) for key in self.shards[name].tensors}
            if {info.name: (info.dtype, info.shape) for info in infos} != seen:
                raise CheckpointError(f"{self.name}: the downloaded {name} differs from the header seen on the Hub")
            self.shards[name] = shard
            self.tensors.update((info.name, info) for info in infos)

    def layout_digest(self) -> str:
        """Tells apart what is read of one checkpoint in several layouts; empty: it is as its files have it."""
        return ""

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """`count` elements of tensor `name` from element `first`, in its own dtype: a fresh tensor, [count]."""
        info = self.tensors[name]
        count = info.numel - first if count is None else count
        values = reused(count, info.dtype)
        self.fill(values, info.shard, info.start + first * info.dtype.itemsize)
        return values

    def chunks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Tensor `name` as (first element, values) in ranges of a bounded size, in its own dtype."""
        info = self.tensors[name]
        step = max(1, CHUNK // info.dtype.itemsize)
        for first in range(0, info.numel, step):
            yield first, self.read(name, first, min(step, info.numel - first))

    def first_not_finite(self, name: str) -> str | None:
        """The indices of the first value of a tensor that is NaN or infinite, in words; None if all are finite."""
        for first, values in self.chunks(name):
            if not is_finite(values):
                return format_index(self.tensors[name].shape, first + first_not_finite(values))
        return None

    def side_files(self) -> list[str]:
        """Tokenizer, generation configuration, licence and the like: what goes with the weights besides the card."""
        return [file for file in self.source.files() if is_side_file(file)]

    def fingerprint(self) -> str:
        """SHA-256 over config.json, every shard's header and size, and samples of each tensor, see `_sample`."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
            with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
                for of_shard in pool.map(self._sample, sorted(self.shards)):
                    digest.update(of_shard)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def resume_key(self) -> str:
        """What continued work depends on: the fingerprint and, as that samples, size, times and inode of each local shard.

        On the Hub, the commit tells all. Never published, unlike `fingerprint`.
        """
        if self.source.commit:
            return f"{self.source.commit} {self.fingerprint()}"
        digest = hashlib.sha256(self.fingerprint().encode())
        for name in sorted(self.shards):
            found = self.source.path(name).stat()
            state = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
            digest.update(f"{name} {state}".encode())
        return digest.hexdigest()

    def _sample(self, name: str) -> bytes:
        """Hash of a shard's header and size, and of each tensor's bytes: all of a small one, else PROBE bytes in places
        that are spread evenly from its first to its last byte, two and one more for each PROBE_EVERY bytes, at most PROBES.
        """
        shard = self.shards[name]
        digest = hashlib.sha256(f"{name} {shard.size} ".encode() + shard.header)
        with self._descriptor(name) as descriptor:
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

    def _is_away(self, shard: str) -> bool:
        """Whether a shard is on the Hub and not here."""
        if isinstance(self.source, Folder) or self.source.cached or shard in self._here:
            return False
        if not self.source.is_cached(shard):
            return True
        self._here.add(shard)
        return False

    @contextmanager
    def _descriptor(self, shard: str) -> Iterator[int]:
        """An open file of a shard, for as long as the block runs."""
        with self._opening:
            descriptor = self._descriptors.get(shard)
            if descriptor is None:
                with open_regular(self.source.path(shard), f"{self.name}/{shard}") as file:
                    descriptor = os.dup(file.fileno())
                if len(self._descriptors) < DESCRIPTORS:
                    self._descriptors[shard] = descriptor
        try:
            yield descriptor
        finally:
            if self._descriptors.get(shard) != descriptor:
                os.close(descriptor)

    def fill(self, values: Tensor, shard: str, position: int) -> None:
        """Fills `values`, a contiguous row of any dtype, with the bytes of a shard's file from `position`.

        Of a shard on the Hub that is not in the cache, these bytes alone are fetched.
        """
        view = values.view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
        if self._is_away(shard):
            assert isinstance(self.source, Repository)
            view[:] = self.source.fetch(shard, position, len(view))[0] if len(view) else b""
            return
        with self._descriptor(shard) as descriptor:
            self._fill_from(descriptor, view, shard, position)

    def _fill_from(self, descriptor: int, view: memoryview, shard: str, position: int) -> None:
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise CheckpointError(f"{self.name}/{shard}: ends at byte {position}, before its last tensor; fetch it again")
            view = view[got:]
            position += got


def reads_at_once(*checkpoints: Checkpoint) -> int:
    """How many parts of checkpoints are best read at a time: many where each takes a request to the Hub."""
    return READS_AT_ONCE if all(checkpoint.is_downloaded for checkpoint in checkpoints) else RANGES_AT_ONCE


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass over them."""
    if not values.dtype.is_floating_point or not values.numel():
        return True
    if values.dtype in _FIRST_NOT_FINITE:  # a hundred times as fast as torch's conversion
        codes, first = values.contiguous().view(torch.uint8), _FIRST_NOT_FINITE[values.dtype]
        return int((codes if first > _WITHOUT_SIGN else codes & _WITHOUT_SIGN).amax()) < first
    low, high = (values.float() if values.dtype.itemsize == 1 else values).aminmax()  # NaN if there is one
    return bool(low.isfinite() & high.isfinite())


def first_not_finite(values: Tensor) -> int:
    """Where in a row the first value stands that is NaN or infinite."""
    finite = (values.float() if values.dtype.itemsize == 1 else values).isfinite()
    return int((~finite).nonzero()[0])


def format_index(shape: tuple[int, ...], element: int) -> str:
    """The indices of an element of a tensor, in words."""
    return str([int(i) for i in torch.unravel_index(torch.tensor(element), shape)]) if shape else "[]"


def download_checkpoints(*checkpoints: Checkpoint) -> None:
    """Brings the weights of checkpoints here, once on each machine; all processes have to see the same ones."""
    processes = process_group()
    with processes.main_first():
        _announce({checkpoint.name: checkpoint.absent() for checkpoint in checkpoints})
        for checkpoint in checkpoints:
            checkpoint.download()
    if processes.count > 1:
        processes.check_equal({checkpoint.name: checkpoint.fingerprint() for checkpoint in checkpoints})


def _announce(absent: Mapping[str, Mapping[str, int]]) -> None:
    """Says how much is going to be fetched from the Hub, by checkpoint and file, and whether there is room for it.

    Raises:
        InputError: there is not.
    """
    sizes = {name: sum(files.values()) for name, files in absent.items() if files}
    if not sizes:
        return
    cache = Path(HF_HUB_CACHE).expanduser()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if sum(sizes.values()) > free:
        raise InputError(
            f"{cache}: {size_of(sum(sizes.values()))} are to be fetched from the Hub ({', '.join(sizes)}), {size_of(free)} are "
            "free there; free some space, or let HF_HOME name a folder on another disk"
        )
    for name, size in sizes.items():
        note(f"{name}: fetching {len(absent[name])} files, {size_of(size)}, from the Hub into {cache}")


def _attempt(source: Folder | Repository, name: str) -> tuple[Shard, list[TensorInfo]] | InputError:
    try:
        return _read_shard(source, name)
    except InputError as error:
        return error


def _read_shard(source: Folder | Repository, name: str) -> tuple[Shard, list[TensorInfo]]:
    where = f"{source.name}/{name}"
    if isinstance(source, Repository) and not source.cached:
        return remote_shard(partial(source.fetch, name), name, where)
    return read_shard(source.path(name), name, where)
