"""One call at a time works on an output, however the others end."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from hf_moe_lmc.errors import OutputError
from hf_moe_lmc.writing.workspace import open_workspace

HOLDER = """
import sys, time
from hf_moe_lmc.writing.workspace import open_workspace
with open_workspace(sys.argv[1]) as workspace:
    (workspace.results("matching", {}).folder).mkdir()
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_that_is_killed_lets_go(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(OutputError, match=r"out: another process writes there \(.*\.out\.progress is locked\)"),
            open_workspace(out),
        ):
            pass
        assert (tmp_path / ".out.progress" / "lock").exists()
        holder.send_signal(signal.SIGKILL)
    assert (tmp_path / ".out.progress" / "lock").exists()
    with open_workspace(out) as workspace:
        assert list(workspace.folder.glob("matching-*"))
    assert not any(tmp_path.iterdir())


def test_links_in_place_of_the_lock_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".out.progress").mkdir()
    (tmp_path / "mine").write_text("years of work")
    for target in ("mine", "absent"):
        (tmp_path / ".out.progress" / "lock").symlink_to(tmp_path / target)
        with (
            pytest.raises(OutputError, match=r"cannot be written \(Too many levels of symbolic links\)"),
            open_workspace(tmp_path / "out"),
        ):
            pass
        (tmp_path / ".out.progress" / "lock").unlink()
    assert (tmp_path / "mine").read_text() == "years of work" and not (tmp_path / "absent").exists()


@pytest.mark.parametrize("gone", [True, False])
def test_the_lock_of_a_file_that_its_holder_has_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    flock, folder = fcntl.flock, tmp_path / ".out.progress"

    def late(descriptor: int, operation: int) -> None:
        """The last holder ends between the opening of the file and its locking."""
        monkeypatch.undo()
        if gone:
            (folder / "lock").unlink()
            folder.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    if gone:
        with pytest.raises(OutputError, match="another process writes there"), open_workspace(tmp_path / "out"):
            pass
    with open_workspace(tmp_path / "out") as workspace:
        assert workspace.folder == folder
    assert not any(tmp_path.iterdir())


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OutputError, match=r"cannot be written \(Function not implemented\)"), open_workspace(tmp_path / "out"):
        pass
    monkeypatch.undo()
    with open_workspace(tmp_path / "out"):
        pass
    assert not any(tmp_path.iterdir())


def test_a_crowd_works_one_after_the_other(tmp_path: Path) -> None:
    """Each that is done removes the folder under the eyes of those that try to lock it."""
    inside: list[int] = []

    def work(number: int, times: int = 5) -> None:
        while times:
            try:
                with open_workspace(tmp_path / "out"):
                    inside.append(number)
                    assert inside == [number]
                    inside.clear()
                times -= 1
            except OutputError as error:
                assert "another process writes there" in str(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not any(tmp_path.iterdir())


def test_the_release_that_is_installed_locks_by_the_system(tmp_path: Path) -> None:
    """Not by a file that merely exists, which would outlive a process that is killed."""
    with open_workspace(tmp_path / "out") as workspace:
        assert filelock.FileLock is filelock.UnixFileLock
        descriptor = os.open(workspace.folder / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
