"""The memory that control groups (cgroups) of Linux leave to this process.

A container, a Slurm job or a systemd service sees the memory of the whole machine, but may use only what its group may. A
group is bound by its own limit and by those of all groups around it. Both versions of the interface are read:

    version  files                                                          file cache in memory.stat
    2        memory.max, memory.high; memory.current                        inactive_file
    1        memory.limit_in_bytes; memory.usage_in_bytes                   total_inactive_file
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60  # bytes; version 1 writes "no limit" as the largest number of pages


@dataclass(frozen=True)
class _Interface:
    """Names of the files of one version.

    Attributes:
        file_system: that it is mounted as.
        limits: bytes, or `max`.
        usage: bytes of the group and all groups in it, their file caches included.
        cache: the field of memory.stat that says how much of these caches can be dropped at once.
    """

    file_system: str
    limits: tuple[str, ...]
    usage: str
    cache: str


_INTERFACES = {
    1: _Interface("cgroup", ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    2: _Interface("cgroup2", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


@dataclass(frozen=True)
class _Mount:
    """Where a tree of groups is to be seen: the group `root` and all groups in it under the folder `point`."""

    root: PurePosixPath
    point: Path
    file_system: str
    options: tuple[str, ...]


def memory_left(process: Path = Path("/proc/self")) -> int | None:
    """Bytes that the groups of a process leave it, file caches counted as free; None where there is no limit.

    Args:
        process: the folder with its `cgroup` and `mountinfo`, which other systems than Linux do not have.
    """
    if not (process / "cgroup").exists():
        return None
    mounts = list(_mounts((process / "mountinfo").read_text()))
    left = [
        found
        for version, group in _groups((process / "cgroup").read_text())
        for folder in _folders(group, _mounted(mounts, version))
        if (found := _left(folder, _INTERFACES[version])) is not None
    ]
    return min(left, default=None)


def _groups(text: str) -> Iterator[tuple[int, PurePosixPath]]:
    """(version, group) of what may limit the memory of a process; a line is NUMBER:CONTROLLERS:GROUP."""
    for line in text.splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            yield 2, PurePosixPath(group)
        elif "memory" in controllers.split(","):
            yield 1, PurePosixPath(group)


def _mounts(text: str) -> Iterator[_Mount]:
    """A line is: ID PARENT DEVICE ROOT POINT OPTIONS [MORE ...] - FILE_SYSTEM SOURCE OPTIONS."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        root, point = map(_unescaped, before.split(" ")[3:5])
        file_system, _, options = after.split(" ", 2)
        yield _Mount(PurePosixPath(root), Path(point), file_system, tuple(options.split(",")))


def _unescaped(path: str) -> str:
    """Blanks, ends of lines and backslashes are octal numbers there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _mounted(mounts: Sequence[_Mount], version: int) -> list[_Mount]:
    """Where the groups of one version are to be seen; in version 1, each controller has a tree of its own."""
    of_version = [mount for mount in mounts if mount.file_system == _INTERFACES[version].file_system]
    return [mount for mount in of_version if version == 2 or "memory" in mount.options]


def _folders(group: PurePosixPath, mounts: Sequence[_Mount]) -> Iterator[Path]:
    """The folders of a group and of all groups around it, as far as they are to be seen.

    A group that lies in no root is seen from another namespace. What is mounted there is then all that can be known.
    """
    inside = [mount for mount in mounts if group.is_relative_to(mount.root) and ".." not in group.parts]
    for mount in inside or mounts:
        folder = mount.point / group.relative_to(mount.root) if inside else mount.point
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(mount.point))


def _left(folder: Path, names: _Interface) -> int | None:
    """Bytes below the limit of one group; None where it has none. The outermost group and one that is gone have no files."""
    written = [(folder / name).read_text().strip() for name in names.limits if (folder / name).exists()]
    limits = [int(limit) for limit in written if limit != "max" and int(limit) < UNLIMITED]
    if not limits:
        return None
    fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / names.usage).read_text()) - int(fields[names.cache])
    return max(0, min(limits) - max(0, used))
