"""Where an output grows: a locked folder beside it, from which a stopped call continues and which becomes the output whole.

    .OUT.progress/lock          held while a call works on OUT; a process that ends, however it does, lets go of it
    .OUT.progress/KIND-KEY/     results that belong to equal inputs and options: KEY is the hash of these
    .OUT.progress/output-KEY/   the output itself, file by file; at the end it becomes OUT by one rename
    .OUT.progress/replaced/     what stood at OUT before, while --overwrite puts the new output in its place

A file that stands under its own name is whole and on disk: it is written as NAME.unfinished, synced and renamed. The folder
goes when OUT is whole. Where nothing can be made beside OUT (a mount point, a parent without permission), it is OUT/.progress,
and the files move into OUT one by one, the index last. Nothing here runs code when it is read back.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import Tensor

from hf_moe_lmc.errors import InputError, OutputError

PACKAGES = ("hf_moe_lmc", "torch", "transformers", "scipy")  # what can change a result
ENDING = ".safetensors"
UNFINISHED = ".unfinished"
INSIDE = ".progress"
REPLACED = "replaced"
MOVING = "moving.json"  # names the files of an output that move into OUT one by one
TELLTALES = ("config.json", "report.json", "symmetry.safetensors")  # one of them is in whatever this package writes


@dataclass(frozen=True)
class Kept:
    """Whole files of one kind, all from equal inputs and options."""

    folder: Path

    def path(self, file: str) -> Path:
        return self.folder / file

    def files(self) -> set[str]:
        """Names of what is whole, relative to the folder."""
        found = {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()}
        return {file for file in found if not file.endswith(UNFINISHED)}

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

    def sweep(self) -> None:
        """Removes what is unfinished."""
        for path in self.folder.rglob(f"*{UNFINISHED}"):
            path.unlink()


@dataclass(frozen=True)
class Workplace:
    """The folder of one output while one call holds its lock.

    Attributes:
        root: the output.
        folder: where things are kept.
        overwrite: an output that stands at `root` is replaced, at the very end.
    """

    root: Path
    folder: Path
    overwrite: bool = False

    def kept(self, kind: str, facts: Mapping[str, Any]) -> Kept:
        """Results that belong to `facts`: whatever of inputs and options a result depends on, JSON."""
        facts = {**facts, "versions": {name: version(name) for name in PACKAGES}}
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
        return Kept(self.folder / f"{kind}-{key}")

    def output(self, facts: Mapping[str, Any]) -> Kept:
        """Where the files of the output grow; those of an output that was begun from other facts are removed."""
        kept = self.kept("output", facts)
        for path in self.folder.glob("output-*"):
            if path != kept.folder:
                shutil.rmtree(path)
        kept.folder.mkdir(parents=True, exist_ok=True)
        kept.sweep()
        return kept

    @property
    def is_beside(self) -> bool:
        return self.folder.parent == self.root.parent

    def publish(self, kept: Kept, *, last: str, durable: bool = True) -> None:
        """Makes `kept` the output: by one rename, or, inside OUT, file by file, the one named `last` at the end."""
        if durable:
            sync_folders(kept.folder)
        if not self.is_beside:
            self._move_files(kept, last)
        else:
            replaced = self.folder / REPLACED
            if self.overwrite and self.root.is_dir() and any(self.root.iterdir()):
                self.root.rename(replaced)
            kept.folder.rename(self.root)
        if durable:
            sync(self.root)
            sync(self.root.parent)

    def _move_files(self, kept: Kept, last: str) -> None:
        files = sorted(kept.files(), key=lambda file: (file == last, file))
        before = [path for path in self.root.iterdir() if path != self.folder]
        if self.overwrite and before:
            (self.folder / REPLACED).mkdir(exist_ok=True)
            for path in before:
                path.rename(self.folder / REPLACED / path.name)
        (self.folder / MOVING).write_text(json.dumps({"from": kept.folder.name, "files": files}))
        sync(self.folder / MOVING)
        for file in files:
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            kept.path(file).rename(self.root / file)
        (self.folder / MOVING).unlink()

    def recover(self) -> None:
        """Undoes a replacement or a move that was stopped half-way: what stood at OUT stands there again."""
        moving = self.folder / MOVING
        if moving.exists():
            try:
                plan = json.loads(moving.read_text())
            except ValueError:  # stopped while it was written, so before the first move
                plan = {"from": "", "files": []}
            for file in plan["files"]:
                if (self.root / file).is_file() and not (self.folder / plan["from"] / file).exists():
                    (self.root / file).rename(self.folder / plan["from"] / file)
            for path in sorted(self.root.rglob("*"), reverse=True):  # folders that were made for the files
                if path.is_dir() and self.folder not in (path, *path.parents) and not any(path.iterdir()):
                    path.rmdir()
            moving.unlink()
        replaced = self.folder / REPLACED
        if replaced.is_dir():
            if self.is_beside and not self.root.exists():
                replaced.rename(self.root)
            elif not self.is_beside:
                for path in replaced.iterdir():
                    path.rename(self.root / path.name)
            shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def at_work(
    output: str | os.PathLike[str], *inputs: str | os.PathLike[str], resume: bool = True, overwrite: bool = False
) -> Iterator[Workplace]:
    """Holds the workplace of `output` while the block runs, and removes it at the end.

    After an InputError nothing is left of this call, but what an earlier one left stays: the next may have the right options
    again. After any other exception, what is whole is kept.

    Args:
        inputs: what is read, as the user named it; folders among it must not hold the output.
        resume: False: forget what an earlier call left.
        overwrite: the output may be a folder that this package wrote before; it stands until the new one is whole.

    Raises:
        OutputError: the output is in use, holds something, or cannot be written.
    """
    root = Path(output)
    if root.is_symlink() and not root.exists():
        raise OutputError(f"{root}: a link to nothing; name a folder, or remove the link")
    root = root.resolve()
    held = [path for path in (Path(one).expanduser() for one in inputs) if path.is_dir()]
    check_output(root, held, shown=Path(output), overwrite=overwrite)
    folder = _choose(root)
    if folder.is_symlink():
        raise OutputError(f"{folder}: a link, where this package keeps its progress; remove it")
    fresh = not folder.is_dir()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, root)
    except OSError as error:
        _remove_empty(made)
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another output") from error
    workplace = Workplace(root, folder, overwrite)
    try:
        workplace.recover()
        check_output(root, held, shown=Path(output), overwrite=overwrite)
        if not resume:
            _empty(folder)
        for path in folder.rglob(f"*{UNFINISHED}"):
            path.unlink()
        yield workplace
    except InputError:
        workplace.recover()
        if fresh:
            shutil.rmtree(folder)
        raise
    except BaseException:
        workplace.recover()
        for path in folder.rglob(f"*{UNFINISHED}"):
            path.unlink()
        if not any(path.is_dir() and any(path.iterdir()) for path in folder.iterdir()):  # nothing done yet
            shutil.rmtree(folder)
        raise
    else:
        shutil.rmtree(folder)
    finally:
        os.close(lock)
        _remove_empty(made)


def check_output(
    output: str | os.PathLike[str], inputs: Sequence[Path] = (), *, shown: Path | None = None, overwrite: bool = False
) -> None:
    """Refuses an output that is no empty folder, or that lies inside an input or the Hub's cache, through links or not.

    Args:
        inputs: folders that are read.
        shown: the output as the user wrote it.
        overwrite: a folder that this package wrote may stand there.

    Raises:
        OutputError: naming the folder and what was found.
    """
    name, root = shown or Path(output), Path(output).resolve()
    if root.exists() and not root.is_dir():
        raise OutputError(f"{name}: expected a new or empty folder for the output, found a file")
    cache = Path(HF_HUB_CACHE).expanduser().resolve()
    if cache == root or cache in root.parents:
        raise OutputError(f"{name}: lies inside the cache of the Hub; choose an output elsewhere")
    for held in inputs:
        held = held.resolve()
        if held == root or held in root.parents:
            raise OutputError(f"{name}: lies inside the input {held}; choose an output elsewhere")
        if overwrite and root in held.parents:
            raise OutputError(f"{name}: holds the input {held}, so it cannot be overwritten; choose an output elsewhere")
    held_there = sorted(path.name for path in root.iterdir() if path.name != INSIDE) if root.is_dir() else []
    if held_there and (root / INSIDE / MOVING).exists():
        return  # of a call that was stopped while its files moved in; they move back first
    if held_there and not overwrite:
        raise OutputError(
            f"{name}: the output folder is not empty (it holds {held_there[0]}); name a new one, empty it, or replace what "
            "this package wrote there before with --overwrite"
        )
    if held_there and not any(file in held_there for file in TELLTALES):
        raise OutputError(
            f"{name}: not overwritten: it holds {held_there[0]}, but none of {', '.join(TELLTALES)}, so this package did not "
            "write it; name a new folder"
        )


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


def _choose(root: Path) -> Path:
    """The folder beside `root`, or inside where a rename could not put it in place."""
    beside, inside = root.parent / f".{root.name}.progress", root / INSIDE
    if inside.is_dir():  # a call that was stopped had to choose it
        return inside
    if root.exists() and (os.path.ismount(root) or not os.access(root.parent, os.W_OK)):
        return inside
    return beside


def _locked(folder: Path, root: Path) -> int:
    """The lock of a folder; the system takes it back from a process that ends."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = (folder / "lock").stat().st_ino == os.fstat(lock).st_ino  # or its last holder has just removed it
    except (BlockingIOError, FileNotFoundError):
        held = False
    except OSError:
        os.close(lock)
        raise
    if not held:
        os.close(lock)
        raise OutputError(f"{root}: another process writes there ({folder} is locked); wait for it, or name another output")
    return lock


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _remove_empty(made: Sequence[Path]) -> None:
    for path in made:  # innermost first; somebody else may use it by now
        with suppress(OSError):
            path.rmdir()
