"""Results of a call that is not finished yet: whole files that the same call finds again after a stop.

A file that stands under its own name is whole and on disk: it is written as NAME.unfinished, synced and renamed. Nothing here
runs code when it is read back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hf_moe_lmc.errors import OutputError

ENDING = ".safetensors"
UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class ResultFolder:
    """Whole files of one kind, all from equal inputs and options."""

    folder: Path

    def path(self, file: str) -> Path:
        return self.folder / file

    def files(self) -> set[str]:
        """Names of what is whole, relative to the folder."""
        names = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        return {name for name in names if not name.endswith(UNFINISHED)}

    @contextmanager
    def new(self, file: str, *, durable: bool = True) -> Iterator[Path]:
        """A path to write to; what is there at the end takes its place as `file`, on disk if `durable`."""
        path = self.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + UNFINISHED)
        yield unfinished
        if durable:
            sync(unfinished)
        unfinished.replace(path)

    def names(self) -> set[str]:
        """What `write` has written here."""
        return {file.removesuffix(ENDING) for file in self.files() if file.endswith(ENDING)}

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with self.new(name + ENDING) as path:
            path.write_bytes(safetensors.torch.save(dict(tensors)))

    def read(self, name: str) -> dict[str, Tensor]:
        """Raises OutputError where the file is damaged."""
        try:
            return safetensors.torch.load(self.path(name + ENDING).read_bytes())
        except SafetensorError as error:
            raise self.damaged(name, error) from error

    def damaged(self, name: str, error: Exception) -> OutputError:
        return OutputError(f"{self.path(name + ENDING)}: cannot be continued from ({error}); start afresh with --no-resume")


def sync(path: Path) -> None:
    """Has a file or folder on disk when it returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(root: Path) -> None:
    for path in (root, *(path for path in root.rglob("*") if path.is_dir())):
        sync(path)
