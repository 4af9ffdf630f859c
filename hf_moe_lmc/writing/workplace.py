"""Where an output grows: a locked folder beside it, from which a stopped call continues and which becomes the output whole.

    .OUT.progress/lock          held while a call works on OUT; a process that ends, however it does, lets go of it
    .OUT.progress/KIND-KEY/     results that belong to equal inputs and options: KEY is the hash of these
    .OUT.progress/output-KEY/   the output itself, file by file; at the end it becomes OUT by one rename
    .OUT.progress/replaced/     what stood at OUT before, while --overwrite puts the new output in its place
    .OUT.progress/publication.json  what is about to become OUT, so that a publication that was stopped can be undone

A file that stands under its own name is whole and on disk: it is written as NAME.unfinished, synced and renamed. The folder
goes when OUT is whole. Where nothing can be made beside OUT (a mount point, a parent without permission), it is OUT/.progress,
and the files move into OUT one by one, the index last. Nothing here runs code when it is read back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from torch import Tensor

from hf_moe_lmc.errors import InputError, OutputError

PACKAGES = ("hf_moe_lmc", "torch", "transformers", "scipy")  # what can change a result
ENDING = ".safetensors"
UNFINISHED = ".unfinished"
INSIDE = ".progress"
LOCK = "lock"
REPLACED = "replaced"
PLAN = "publication.json"  # names the files of an output from the moment that they begin to go to OUT
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


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


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
        return Kept(self.folder / _kept_name(kind, facts))

    def output(self, facts: Mapping[str, Any]) -> Kept:
        """Where the files of the output grow; those of an output that was begun from other facts are removed.

        Raises:
            OutputError: what an earlier call finished at `root` is made from other facts.
        """
        kept = self.kept("output", facts)
        plan = self._plan()
        if plan and self._is_complete(plan):
            if plan["from"] != kept.folder.name:
                check_empty(self.root, self.root, overwrite=self.overwrite)
            else:
                self._take_back(plan)  # it was finished, but not its call
        for path in self.folder.glob("output-*"):
            if path != kept.folder:
                shutil.rmtree(path)
        kept.folder.mkdir(parents=True, exist_ok=True)
        return kept

    @property
    def is_beside(self) -> bool:
        return self.folder.parent == self.root.parent

    def publish(self, kept: Kept, *, last: str, durable: bool = True) -> None:
        """Makes `kept` the output: by one rename, or, inside OUT, file by file, the one named `last` at the end."""
        files = sorted(kept.files(), key=lambda file: (file == last, file))
        plan = self.folder / PLAN
        plan.with_name(plan.name + UNFINISHED).write_text(json.dumps({"from": kept.folder.name, "files": files}))
        if durable:
            sync_folders(kept.folder)
            sync(plan.with_name(plan.name + UNFINISHED))
        plan.with_name(plan.name + UNFINISHED).replace(plan)
        if self.overwrite:
            self._put_aside()
        if self.is_beside:
            kept.folder.rename(self.root)
        else:
            for file in files:
                (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                kept.path(file).rename(self.root / file)
        if durable:
            sync(self.root)
            sync(self.root.parent)

    def _put_aside(self) -> None:
        replaced = self.folder / REPLACED
        if not self.root.is_dir() or not _held_in(self.root):
            return
        if self.is_beside:
            self.root.rename(replaced)
            return
        replaced.mkdir(exist_ok=True)
        for name in _held_in(self.root):
            (self.root / name).rename(replaced / name)

    def _plan(self) -> dict[str, Any] | None:
        """What a call that came to publishing was about to do."""
        path = self.folder / PLAN
        plan: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return plan

    def _is_complete(self, plan: Mapping[str, Any]) -> bool:
        """Whether all of an output stands at `root`."""
        kept = Kept(self.folder / plan["from"])
        return not kept.files() and all((self.root / file).is_file() for file in plan["files"])

    def _take_back(self, plan: Mapping[str, Any]) -> None:
        """Undoes a publication, or what there is of it."""
        kept = Kept(self.folder / plan["from"])
        if self.is_beside:
            self.root.rename(kept.folder)
        else:
            for file in plan["files"]:
                if (self.root / file).is_file() and not kept.path(file).exists():
                    kept.path(file).parent.mkdir(parents=True, exist_ok=True)
                    (self.root / file).rename(kept.path(file))
            for path in sorted({(self.root / file).parent for file in plan["files"]}, reverse=True):
                if path != self.root:
                    with suppress(OSError):
                        path.rmdir()
        (self.folder / PLAN).unlink()

    def recover(self) -> None:
        """After a publication that was stopped half-way: what stood at OUT stands there again."""
        plan = self._plan()
        complete = plan is not None and self._is_complete(plan)
        if plan and not complete:
            if self.is_beside:  # nothing of it stands there: the rename was still to come, or somebody removed the output
                (self.folder / PLAN).unlink()
            else:
                self._take_back(plan)
        replaced = self.folder / REPLACED
        if replaced.is_dir() and not complete:
            if self.is_beside:
                if not self.root.exists():
                    replaced.rename(self.root)
            else:
                for path in replaced.iterdir():
                    path.rename(self.root / path.name)
        if complete:
            shutil.rmtree(replaced, ignore_errors=True)

    def check_empty(self, shown: Path) -> None:
        """As the function, but an output that an earlier call finished may stand there; `output` looks at it."""
        plan = self._plan()
        if not (plan and self._is_complete(plan)):
            check_empty(self.root, shown, overwrite=self.overwrite)


def _kept_name(kind: str, facts: Mapping[str, Any]) -> str:
    facts = {**facts, "versions": _versions()}
    return f"{kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}"


def kept_files(output: str | os.PathLike[str], facts: Mapping[str, Any]) -> set[str]:
    """Names of the files of an output that a stopped call with equal facts has written whole."""
    return Kept(_choose(Path(output).resolve()) / _kept_name("output", facts)).files()


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
    shown = Path(output)
    held = [path for path in (Path(one).expanduser() for one in inputs) if path.is_dir()]
    root, folder = _places(shown, held, overwrite=overwrite)
    fresh = not folder.is_dir()
    if fresh:
        check_empty(root, shown, overwrite=overwrite)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder, root)
    except OSError as error:
        _remove_empty(made)
        if isinstance(error, FileExistsError) and not folder.is_file():
            raise _in_use(root, folder) from error  # its last holder removed it at that moment
        raise OutputError(f"{shown}: cannot be written ({error.strerror}); choose another output") from error
    workplace = Workplace(root, folder, overwrite)
    try:
        workplace.recover()
        workplace.check_empty(shown)
        if not resume:
            _empty(folder)
        _sweep(folder)
        yield workplace
    except BaseException as error:
        workplace.recover()
        _sweep(folder)
        mistaken = fresh and isinstance(error, InputError)
        done = any(path.is_dir() and any(path.iterdir()) for path in folder.iterdir()) or (folder / PLAN).exists()
        if mistaken or not done:
            _remove(folder)
        raise
    else:
        _remove(folder)
    finally:
        lock.release()
        _remove_empty(made)


def check_output(output: str | os.PathLike[str], inputs: Sequence[Path] = (), *, overwrite: bool = False) -> None:
    """Refuses an output that is no new or empty folder, that lies where it must not, is in use or cannot be written.

    Nothing is changed: a dry run is refused what the run would be.

    Args:
        inputs: folders that are read.
        overwrite: a folder that this package wrote may stand there.

    Raises:
        OutputError: naming the folder and what was found.
    """
    shown = Path(output)
    root, folder = _places(shown, inputs, overwrite=overwrite)
    if not (folder / PLAN).exists():  # else a call was stopped while it published: `at_work` looks at what stands
        check_empty(root, shown, overwrite=overwrite)
    if (folder / LOCK).exists():
        _locked(folder, root).release()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if problem := _why_not_writable(nearest):
        raise OutputError(f"{shown}: cannot be written ({problem}); choose another output")


def _why_not_writable(folder: Path) -> str | None:
    """What the system would say to a new file in a folder; None: nothing."""
    if not folder.is_dir():
        return os.strerror(errno.ENOTDIR)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return os.strerror(errno.EROFS)
    return None if os.access(folder, os.W_OK) else os.strerror(errno.EACCES)


def _places(shown: Path, inputs: Sequence[Path], *, overwrite: bool) -> tuple[Path, Path]:
    """The output and its workplace, as far as both can be where they are."""
    if shown.is_symlink() and not shown.exists():
        raise OutputError(f"{shown}: a link to nothing; name a folder, or remove the link")
    root = shown.resolve()
    check_place(root, inputs, shown, overwrite=overwrite)
    folder = _choose(root)
    if folder.is_symlink():
        raise OutputError(f"{folder}: a link, where this package keeps its progress; remove it")
    return root, folder


def check_place(root: Path, inputs: Sequence[Path], shown: Path, *, overwrite: bool) -> None:
    """Raises OutputError for an output inside an input or the Hub's cache, through links or not, and for a file."""
    if root.exists() and not root.is_dir():
        raise OutputError(f"{shown}: expected a new or empty folder for the output, found a file")
    cache = Path(HF_HUB_CACHE).expanduser().resolve()
    if cache == root or cache in root.parents:
        raise OutputError(f"{shown}: lies inside the cache of the Hub; choose an output elsewhere")
    for held in (path.resolve() for path in inputs):
        if held == root or held in root.parents:
            raise OutputError(f"{shown}: lies inside the input {held}; choose an output elsewhere")
        if overwrite and root in held.parents:
            raise OutputError(f"{shown}: holds the input {held}, so it cannot be overwritten; choose an output elsewhere")


def check_empty(root: Path, shown: Path, *, overwrite: bool) -> None:
    """Raises OutputError for a folder that holds something, or with `overwrite` something that is not ours."""
    found = _held_in(root) if root.is_dir() else []
    if found and not overwrite:
        raise OutputError(
            f"{shown}: the output folder is not empty (it holds {found[0]}); name a new one, empty it, or replace what "
            "this package wrote there before with --overwrite"
        )
    if found and not any(file in found for file in TELLTALES):
        raise OutputError(
            f"{shown}: not overwritten: it holds {found[0]}, but none of {', '.join(TELLTALES)}, so this package did not "
            "write it; name a new folder"
        )


def _held_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != INSIDE)


def _remove(folder: Path) -> None:
    """Removes a workplace: the lock last, and before it the word that its output is whole."""
    _empty(folder)
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name == PLAN)):
        path.unlink()
    _remove_empty([folder])


def _sweep(folder: Path) -> None:
    """Removes what is unfinished."""
    for path in folder.rglob(f"*{UNFINISHED}"):
        path.unlink()


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


def _locked(folder: Path, root: Path) -> FileLock:
    """The lock of a folder; the system takes it back from a process that ends.

    A file system without locks is an error: a file that only stands for a lock would outlive a process that is killed.
    """
    lock = FileLock(folder / LOCK, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except (Timeout, FileNotFoundError) as error:  # it is held, or its last holder has just removed the folder
        raise _in_use(root, folder) from error
    return lock


def _in_use(root: Path, folder: Path) -> OutputError:
    return OutputError(f"{root}: another process writes there ({folder} is locked); wait for it, or name another output")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _remove_empty(made: Sequence[Path]) -> None:
    for path in made:  # innermost first; somebody else may use it by now
        with suppress(OSError):
            path.rmdir()
