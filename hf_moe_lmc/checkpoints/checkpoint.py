"""A checkpoint on disk or on the Hub: sharded safetensors, known from their headers and read by ranges.

Any contiguous range of elements can be read. So neither a shard nor a large tensor is ever held in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.contents import HEADERS_AT_ONCE, read_contents, read_header
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo
from hf_moe_lmc.checkpoints.quantization import Quantization
from hf_moe_lmc.checkpoints.source import Folder, Repository, resolve
from hf_moe_lmc.checkpoints.untrusted import open_regular
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.runtime.memory import reused
from hf_moe_lmc.runtime.processes import team

CHUNK = 8 << 20  # bytes read at a time
PROBE, PROBES, PROBE_EVERY = 512, 8, 4 << 20  # bytes; what the fingerprint sees of a tensor, see `_sample`
DESCRIPTORS = 256  # files that stay open; of any more, each read opens its own

# Not copied with the weights: other weights and archives, code, the card, and what a trainer leaves behind.
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


@dataclass
class Checkpoint:
    """A complete checkpoint. Until a tensor is read, only its headers are.

    Attributes:
        source: the folder, or the Hub repository at one commit.
        config: config.json as written.
        shards: by file name, in the order of the weight map.
        tensors: by name, in shard and file order.
        quantization: what config.json declares of the weights.
    """

    source: Folder | Repository
    config: dict[str, Any]
    shards: dict[str, Shard]
    tensors: dict[str, TensorInfo]
    quantization: Quantization | None = None
    _descriptors: dict[str, int] = field(default_factory=dict, repr=False)
    _fingerprint: str | None = field(default=None, repr=False)  # reports, cards and warnings need it
    _opening: Lock = field(default_factory=Lock, repr=False)  # a loader may read from several threads

    @classmethod
    def open(cls, model: str | os.PathLike[str]) -> Checkpoint:
        """Reads and checks configuration, index and every shard header. Of a Hub id, nothing else is downloaded.

        Raises:
            CheckpointError: nothing there, not a safetensors checkpoint, or damaged. All problems are reported together,
                with file and key.
        """
        source = resolve(model)
        contents = read_contents(source)
        return cls(source, contents.config, contents.shards, contents.tensors, contents.quantization)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def display_name(self) -> str:
        """Hub id, or the name of the folder without its path, so that it can be published."""
        return self.source.root.resolve().name if isinstance(self.source, Folder) else self.source.repo_id

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def folder(self) -> Path:
        """The local folder of its configuration, in the Hub's cache or elsewhere."""
        return self.source.path("config.json").parent

    @property
    def is_here(self) -> bool:
        """Whether its weights can be read without a download."""
        return isinstance(self.source, Folder) or self.source.cached

    def download(self) -> None:
        """Downloads the shards and side files of a Hub checkpoint. A local folder needs no download."""
        if self.is_here:
            return
        self.source.fetch([*self.shards, *self.side_files()])
        cache = Folder(self.source.path("config.json").parent)
        for name in self.shards:  # what was downloaded must be whole, and equal what was checked
            shard, infos = read_header(cache, name)
            checked = {key: (self.tensors[key].dtype, self.tensors[key].shape) for key in self.shards[name].tensors}
            if {info.name: (info.dtype, info.shape) for info in infos} != checked:
                raise CheckpointError(f"{self.name}: the downloaded {name} differs from the header seen on the Hub")
            self.shards[name] = shard
            self.tensors.update((info.name, info) for info in infos)

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
        """The index of the first NaN or infinite value of a tensor, as text; None if all are finite."""
        for first, values in self.chunks(name):
            if not is_finite(values):
                return format_index(self.tensors[name].shape, first + first_not_finite(values))
        return None

    def side_files(self) -> list[str]:
        """Tokenizer, generation configuration, licence and the like: the files that a copy of the weights needs."""
        return [file for file in self.source.files() if _is_side_file(file)]

    def fingerprint(self) -> str:
        """SHA-256 over config.json, every shard's header and size, and samples of each tensor, see `_sample`."""
        if self._fingerprint is None:
            digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
            with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
                for sample in pool.map(self._sample, sorted(self.shards)):
                    digest.update(sample)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _sample(self, name: str) -> bytes:
        """Hash of a shard's header and size and of samples of its tensors.

        Of a small tensor all bytes count. Of a large one, PROBE bytes count at places spread evenly from its first byte to
        its last: two places, and one more for each PROBE_EVERY bytes, PROBES at most.
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
        """Hub id and commit, or the name of the folder, and the fingerprint. It holds no local path."""
        commit = {"commit": self.source.commit} if self.source.commit else {}
        return {"source": self.display_name, **commit, "fingerprint": self.fingerprint()}

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """Fills `values`, a contiguous row of any dtype, with the bytes of a shard's file from `position`."""
        view = values.view(torch.uint8).numpy().data if values.numel() else memoryview(b"")
        with self._descriptor(shard) as descriptor:
            self._fill_from(descriptor, view, shard, position)

    def _fill_from(self, descriptor: int, view: memoryview, shard: str, position: int) -> None:
        while len(view):
            got = os.preadv(descriptor, [view], position)
            if got == 0:
                raise CheckpointError(f"{self.name}/{shard}: ends at byte {position}, before its last tensor; fetch it again")
            view = view[got:]
            position += got


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; one pass over them."""
    if not values.dtype.is_floating_point or not values.numel():
        return True
    low, high = (values.float() if values.dtype.itemsize == 1 else values).aminmax()  # NaN if there is one
    return bool(low.isfinite() & high.isfinite())


def first_not_finite(values: Tensor) -> int:
    """The position of the first NaN or infinite value of a row."""
    finite = (values.float() if values.dtype.itemsize == 1 else values).isfinite()
    return int((~finite).nonzero()[0])


def format_index(shape: tuple[int, ...], element: int) -> str:
    """The index of an element, counted in memory order, as text: `[2, 7]`."""
    return str([int(i) for i in torch.unravel_index(torch.tensor(element), shape)]) if shape else "[]"


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
