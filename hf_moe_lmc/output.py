"""Output folders: streamed checkpoints and reports, whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_moe_lmc.checkpoint import INDEX, Checkpoint, Shard
from hf_moe_lmc.errors import OutputError

FOREIGN_SWITCHES = ("auto_map", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation")


class TensorStream(Protocol):
    """A checkpoint that is computed as it is read: the names, shapes, dtypes and shards of `template`, other values."""

    @property
    def template(self) -> Checkpoint: ...

    def pieces(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Tensor `name` as (first element, values) in any order, before the cast to the template's dtype."""


class FolderWriter:
    """Writes one checkpoint folder; what stands at the end is whole, or nothing is left.

    Files grow in a subfolder of the output and move to their places at the very end, the index last.

    Raises:
        OutputError: the folder is not empty, lies in an input, or cannot be made.
    """

    STAGING = ".partial"

    def __init__(self, output: str | os.PathLike[str], inputs: Sequence[Checkpoint]) -> None:
        self.root = Path(output)
        self._staging = self.root / self.STAGING
        check_output(self.root, inputs)

    def __enter__(self) -> Self:
        self._made = [path for path in (self.root, *self.root.parents) if not path.exists()]
        try:
            self._staging.mkdir(parents=True)
        except OSError as error:
            self._remove_made()
            raise OutputError(f"{self.root}: cannot be written ({error.strerror}); choose another output") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            if kind is not None:
                self._remove_made()

    def _remove_made(self) -> None:
        for path in self._made:  # innermost first; each is empty unless somebody else uses it
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def path(self, file: str) -> Path:
        """Where to write `file` (relative to the output); it appears in the output when all is done."""
        path = self._staging / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def fingerprint(self) -> str:
        """Of the checkpoint that has been written so far."""
        with Checkpoint.open(self._staging) as written:
            return written.fingerprint()

    def write_text(self, file: str, text: str) -> None:
        self.path(file).write_text(text, encoding="utf-8")

    def write_tensors(self, stream: TensorStream, *, quiet: bool = False) -> None:
        """All shards of the template, with their very headers; each value is cast once, to the template's dtype."""
        with tqdm(total=stream.template.nbytes, unit="B", unit_scale=True, desc="writing", disable=quiet or None) as progress:
            for shard in stream.template.shards.values():
                self._write_shard(stream, shard, progress)

    def _write_shard(self, stream: TensorStream, shard: Shard, progress: tqdm) -> None:
        template = stream.template
        with self.path(shard.name).open("wb", buffering=0) as file:
            file.write(shard.header)
            file.truncate(shard.size)
            for name in shard.tensors:
                info = template.tensors[name]
                for first, values in stream.pieces(name):
                    data = values.to(info.dtype).contiguous().view(-1).view(torch.uint8).numpy()
                    _write_all(file.fileno(), data.data, info.start + first * info.dtype.itemsize)
                    progress.update(len(data))
            os.fsync(file.fileno())

    def write_checkpoint_files(self, template: Checkpoint) -> None:
        """Configuration (without switches to foreign code), side files and an index, all as the template has them."""
        config = {key: value for key, value in template.config.items() if key not in FOREIGN_SWITCHES}
        if config == template.config:
            shutil.copyfile(template.source.path("config.json"), self.path("config.json"))
        else:
            self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        for file in template.side_files():
            shutil.copyfile(template.source.path(file), self.path(file))
        weight_map = {name: info.shard for name, info in sorted(template.tensors.items())}
        index = {"metadata": {"total_size": template.nbytes}, "weight_map": weight_map}
        self.write_text(INDEX, json.dumps(index, indent=2) + "\n")

    def _publish(self) -> None:
        files = [path.relative_to(self._staging) for path in self._staging.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: (file.name == INDEX, file.as_posix())):
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self._staging / file).replace(self.root / file)


def check_output(output: str | os.PathLike[str], inputs: Sequence[Checkpoint] = ()) -> None:
    """Refuses an output that is no empty folder, or that lies inside an input.

    Raises:
        OutputError: naming the folder and what was found.
    """
    root = Path(output)
    if root.exists() and not root.is_dir():
        raise OutputError(f"{root}: expected a new or empty folder for the output, found a file")
    if root.is_dir() and any(root.iterdir()):
        found = sorted(path.name for path in root.iterdir())[0]
        raise OutputError(f"{root}: the output folder is not empty (it holds {found}); name a new one or empty it")
    cache = Path(HF_HUB_CACHE).expanduser().resolve()
    if cache == root.resolve() or cache in root.resolve().parents:
        raise OutputError(f"{root}: lies inside the cache of the Hub; choose an output elsewhere")
    for checkpoint in inputs:
        held = checkpoint.source.path("config.json").parent.resolve()
        if held == root.resolve() or held in root.resolve().parents:
            raise OutputError(f"{root}: lies inside the input {checkpoint.name}; choose an output elsewhere")


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, position)
        data = data[written:]
        position += written
