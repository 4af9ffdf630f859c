"""What is done of a long job, kept beside its output until that is whole, so that the same call continues after a stop.

    .OUT.progress/lock              held while a call works on OUT; a stopped process, however it ended, lets go of it
    .OUT.progress/KIND-KEY/         results that belong to equal inputs and options: KEY is their hash
    .OUT.progress/KIND-KEY/*.safetensors

Each file is written elsewhere and renamed, so one that is there is whole. The folder goes when the output is whole, and when
the inputs turn out to be unusable. Nothing here runs code when it is read: numbers are JSON, the rest is safetensors.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hf_moe_lmc.errors import InputError, OutputError
from hf_moe_lmc.matching import Matching
from hf_moe_lmc.output import FolderWriter
from hf_moe_lmc.symmetry import FIELDS, LayerSymmetry, ModelSymmetry

PACKAGES = ("hf_moe_lmc", "torch", "transformers", "scipy")  # what can change a result


@dataclass(frozen=True)
class Kept:
    """Results of one kind, all from equal inputs and options; each has a name."""

    folder: Path

    def names(self) -> set[str]:
        return {path.stem for path in self.folder.glob("*.safetensors")}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    @contextmanager
    def new(self, name: str) -> Iterator[Path]:
        """A file to write to, which takes its place when it is whole and on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.folder / f"{name}.unfinished"
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(self.path(name))

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        with self.new(name) as path:
            path.write_bytes(safetensors.torch.save(dict(tensors)))

    def read(self, name: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self.path(name).read_bytes())
        except SafetensorError as error:
            raise self.damaged(name, error) from error

    def write_matching(self, index: int, matching: Matching) -> None:
        with self.new(f"layer-{index}") as path:
            metadata = {"matching": json.dumps(_numbers(matching), allow_nan=False)}
            ModelSymmetry("", 1, {index: matching.symmetry}, metadata).save(path)

    def matchings(self) -> Iterator[tuple[int, Matching]]:
        """What `write_matching` left here."""
        for name in sorted(self.names()):
            index = int(name.removeprefix("layer-"))
            try:
                saved = ModelSymmetry.load(self.path(name))
                yield index, _matching(json.loads(saved.metadata["matching"]), saved.layers[index])
            except (InputError, KeyError, TypeError, ValueError) as error:
                raise self.damaged(name, error) from error

    def damaged(self, name: str, error: Exception) -> OutputError:
        return OutputError(f"{self.path(name)}: cannot be continued from ({error}); start afresh with --no-resume")


@dataclass(frozen=True)
class Progress:
    """The folder beside an output, while one call holds it.

    Attributes:
        folder: None where nothing can be kept, as the output's parent is not writable.
    """

    folder: Path | None

    def kept(self, kind: str, facts: Mapping[str, Any]) -> Kept | None:
        """Results that belong to `facts`: whatever of inputs and options a result depends on, JSON."""
        if self.folder is None:
            return None
        facts = {**facts, "versions": {name: version(name) for name in PACKAGES}}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return Kept(self.folder / f"{kind}-{key}")


@contextmanager
def keeping(output: str | os.PathLike[str], *, resume: bool = True) -> Iterator[Progress]:
    """Keeps what is done beside `output` while the block runs, and removes it at the end.

    What a stopped call had begun to write in the output is removed first. After an InputError nothing is left of this call,
    but what an earlier one left stays: the next may have the right options again.

    Args:
        resume: False: forget what an earlier call left.

    Raises:
        OutputError: another process works on this output.
    """
    root = Path(output).resolve()
    folder = root.parent / f".{root.name}.progress"
    nearest = next(path for path in folder.parents if path.exists())
    if not os.access(nearest, os.W_OK):
        warnings.warn(f"{nearest}: not writable, so nothing is kept there to continue from after a stop", stacklevel=4)
        yield Progress(None)
        return
    lock = None
    made: list[Path] = []
    fresh = not folder.is_dir()
    try:
        if not fresh:  # of a call that was stopped, or that still works
            lock = _locked(folder, root)
            shutil.rmtree(root / FolderWriter.STAGING, ignore_errors=True)
            if not resume:
                _empty(folder)
        else:
            made = [path for path in folder.parents if not path.exists()]
            folder.mkdir(parents=True)
            lock = _locked(folder, root)
        yield Progress(folder)
    except InputError:
        if lock is not None and fresh:
            shutil.rmtree(folder)
        raise
    except BaseException:
        if lock is not None and not any(path.is_dir() for path in folder.iterdir()):  # nothing done yet
            shutil.rmtree(folder)
        raise
    else:
        shutil.rmtree(folder)
    finally:
        if lock is not None:
            os.close(lock)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _locked(folder: Path, root: Path) -> int:
    """The lock of a folder; the system takes it back from a process that ends."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise OutputError(f"{root}: another process writes there ({folder} is locked: {error.strerror})") from error
    return lock


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def digest(symmetry: ModelSymmetry) -> str:
    """Hash of the group elements, whatever their metadata."""
    found = hashlib.sha256()
    for index, layer in sorted(symmetry.layers.items()):
        for bank, part in {"": layer, **layer.others}.items():
            for name in FIELDS:
                values = getattr(part, name)
                found.update(f"{index} {bank} {name} {list(values.shape)} ".encode() + values.contiguous().numpy().tobytes())
    return found.hexdigest()


def _numbers(matching: Matching) -> dict[str, Any]:
    """All of a matching but its symmetry."""
    plain = [field.name for field in fields(matching) if field.name not in ("symmetry", "others")]
    values = {name: getattr(matching, name) for name in plain}
    return {**values, "others": {name: _numbers(other) for name, other in matching.others.items()}}


def _matching(numbers: Mapping[str, Any], symmetry: LayerSymmetry) -> Matching:
    """The inverse of `_numbers`. A further bank's matching holds that bank's element alone."""
    others = {name: _matching(other, replace(symmetry.others[name], others={})) for name, other in numbers["others"].items()}
    return Matching(**{**numbers, "symmetry": symmetry, "others": others})
