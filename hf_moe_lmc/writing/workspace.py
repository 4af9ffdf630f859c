"""Work on one output: a locked folder in which it grows, from which a stopped call continues.

The folder goes when the output is whole; see location.py for its place and its contents.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_moe_lmc.errors import InputError, OutputError
from hf_moe_lmc.writing.location import LOCK, OUTPUT, PLAN, check_empty, check_location, working_folder
from hf_moe_lmc.writing.publication import Publication
from hf_moe_lmc.writing.results import UNFINISHED, ResultFolder

PACKAGES = ("hf_moe_lmc", "torch", "transformers", "scipy")  # what can change a result


@dataclass(frozen=True)
class Workspace:
    """The folder of one output while one call holds its lock.

    Attributes:
        root: the output.
        folder: where results are kept.
        overwrite: an output that stands at `root` is replaced, at the very end.
    """

    root: Path
    folder: Path
    overwrite: bool = False

    @property
    def publication(self) -> Publication:
        return Publication(self.root, self.folder)

    def results(self, kind: str, facts: Mapping[str, Any]) -> ResultFolder:
        """Results that belong to `facts`: whatever of inputs and options a result depends on, JSON."""
        return ResultFolder(self.folder / _kept_name(kind, facts))

    def output_folder(self, facts: Mapping[str, Any]) -> ResultFolder:
        """Where the files of the output grow; those of an output that was begun from other facts are removed.

        Raises:
            OutputError: what an earlier call finished at `root` is made from other facts.
        """
        results = self.results(OUTPUT, facts)
        finished = self.publication.finished()
        if finished == results.folder.name:
            self.publication.take_back()  # it was finished, but not its call
        elif finished:
            check_empty(self.root, self.root, overwrite=self.overwrite)
        for path in self.folder.glob(f"{OUTPUT}-*"):
            if path != results.folder:
                shutil.rmtree(path)
        results.folder.mkdir(parents=True, exist_ok=True)
        return results

    def publish(self, results: ResultFolder, *, last: str, durable: bool = True) -> None:
        """Makes `results` the output, the files named `last` at the end."""
        self.publication.publish(results, last=last, overwrite=self.overwrite, durable=durable)

    def check_empty(self, shown: Path) -> None:
        """As the function, but an output that an earlier call finished may stand there; `output_folder` looks at it."""
        if not self.publication.finished():
            check_empty(self.root, shown, overwrite=self.overwrite)


def _kept_name(kind: str, facts: Mapping[str, Any]) -> str:
    facts = {**facts, "versions": {name: version(name) for name in PACKAGES}}
    return f"{kind}-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]}"


def kept_files(output: str | os.PathLike[str], facts: Mapping[str, Any] | None) -> set[str]:
    """Names of the files of an output that a stopped call with equal facts has written whole; None: whatever its facts."""
    folder = working_folder(Path(output).resolve())
    names = [path.name for path in folder.glob(f"{OUTPUT}-*")] if facts is None else [_kept_name(OUTPUT, facts)]
    return {file for name in names for file in ResultFolder(folder / name).files()}


@contextmanager
def open_workspace(
    output: str | os.PathLike[str], *inputs: str | os.PathLike[str], resume: bool = True, overwrite: bool = False
) -> Iterator[Workspace]:
    """Holds the workspace of `output` while the block runs, and removes it at the end.

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
    workspace = Workspace(root, folder, overwrite)
    try:
        workspace.publication.recover()
        workspace.check_empty(shown)
        if not resume:
            _empty(folder)
        _sweep(folder)
        yield workspace
    except BaseException as error:
        workspace.publication.recover()
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
    if not (folder / PLAN).exists():  # else a call was stopped while it published: `open_workspace` looks at what stands
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
    """The output and the folder in which it grows, as far as both can be where they are."""
    if shown.is_symlink() and not shown.exists():
        raise OutputError(f"{shown}: a link to nothing; name a folder, or remove the link")
    root = shown.resolve()
    check_location(root, inputs, shown, overwrite=overwrite)
    folder = working_folder(root)
    if folder.is_symlink():
        raise OutputError(f"{folder}: a link, where this package keeps its progress; remove it")
    return root, folder


def _remove(folder: Path) -> None:
    """Removes a working folder: the lock last, and before it the plan, which says that its output is whole."""
    _empty(folder)
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == LOCK, path.name == PLAN)):
        path.unlink()
    _remove_empty([folder])


def _sweep(folder: Path) -> None:
    """Removes what is unfinished."""
    for path in folder.rglob(f"*{UNFINISHED}"):
        path.unlink()


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
