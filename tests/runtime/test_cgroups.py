"""Trees of control groups as Linux shows them, in folders: the least that any group leaves is found, whatever the version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hf_moe_lmc.runtime import memory
from hf_moe_lmc.runtime.cgroups import memory_left

GB = 10**9
NO_LIMIT = 9223372036854771712  # version 1


def version_2(folder: Path, limit: object, used: int, cache: int = 0, high: object = "max") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.high").write_text(f"{high}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile {cache + 7}\ninactive_file {cache}\nactive_file 7\n")


def version_1(folder: Path, limit: int, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {cache}\n")


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Path]:
    """(lines of cgroup, lines of mountinfo) -> the folder of a process."""

    def make(groups: list[str], mounts: list[str]) -> Path:
        folder = tmp_path / "process"
        folder.mkdir()
        (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        others = ["21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw", "22 21 0:5 / /proc rw - proc  rw"]
        (folder / "mountinfo").write_text("".join(f"{line}\n" for line in [*others, *mounts]))
        return folder

    return make


def mount(point: Path, root: str = "/", system: str = "cgroup2", options: str = "rw,nsdelegate") -> str:
    escaped = str(point).replace(" ", r"\040")
    return f"30 21 0:26 {root} {escaped} rw,nosuid shared:4 master:1 - {system} cgroup {options}"


@pytest.mark.parametrize(
    ("limit", "used", "cache", "high", "expected"),
    [
        (8 * GB, 3 * GB, 0, "max", 5 * GB),
        (8 * GB, 3 * GB, GB, "max", 6 * GB),
        (8 * GB, 8 * GB, 8 * GB, "max", 8 * GB),
        (8 * GB, GB, 2 * GB, "max", 8 * GB),  # both were read a moment apart
        (8 * GB, 9 * GB, 0, "max", 0),
        (8 * GB, 3 * GB, 0, 4 * GB, GB),
        (8 * GB, 3 * GB, 0, 9 * GB, 5 * GB),
        ("max", 3 * GB, 0, 4 * GB, GB),
        ("max", 3 * GB, 0, "max", None),
        (NO_LIMIT, 3 * GB, 0, "max", None),
    ],
)
def test_a_group_of_version_2(
    tmp_path: Path,
    process: Callable[..., Path],
    limit: object,
    used: int,
    cache: int,
    high: object,
    expected: int | None,
) -> None:
    version_2(tmp_path / "cgroup", limit, used, cache, high)  # a container sees its own group as the outermost one
    assert memory_left(process(["0::/"], [mount(tmp_path / "cgroup")])) == expected


def test_all_groups_around_it_count(tmp_path: Path, process: Callable[..., Path]) -> None:
    point = tmp_path / "c group"
    folder = process(["0::/slurm/job/step"], [mount(point)])
    (point / "slurm/job/step").mkdir(parents=True)
    assert memory_left(folder) is None  # the outermost group has no files, and the others need not have any
    version_2(point / "slurm/job/step", "max", GB)
    version_2(point / "slurm/job", 8 * GB, 2 * GB)
    version_2(point / "slurm", 100 * GB, 97 * GB)
    assert memory_left(folder) == 3 * GB
    version_2(point / "slurm", 100 * GB, 50 * GB)
    assert memory_left(folder) == 6 * GB
    version_2(point / "slurm/job/step", 4 * GB, GB)
    assert memory_left(folder) == 3 * GB
    version_2(tmp_path, GB, GB)  # above the mount there are no groups
    version_2(point / "other", GB, GB)
    assert memory_left(folder) == 3 * GB


def test_version_1(tmp_path: Path, process: Callable[..., Path]) -> None:
    point = tmp_path / "memory"
    folder = process(
        ["9:name=systemd:/a", "5:cpu,cpuacct:/b", "4:hugetlb,memory:/docker/some:thing", "0::/c"],
        [
            mount(tmp_path / "cpu", system="cgroup", options="rw,cpu,cpuacct"),
            mount(point, system="cgroup", options="rw,memory,hugetlb"),
        ],
    )
    version_1(tmp_path / "cpu" / "docker/some:thing", GB, GB)  # the control: another controller's tree
    version_1(point, NO_LIMIT, 50 * GB)
    version_1(point / "docker", NO_LIMIT, 20 * GB)
    version_1(point / "docker/some:thing", NO_LIMIT, GB)
    assert memory_left(folder) is None
    version_1(point / "docker/some:thing", 8 * GB, 5 * GB, 2 * GB)
    assert memory_left(folder) == 5 * GB
    version_1(point / "docker", 20 * GB, 19 * GB)
    assert memory_left(folder) == GB


def test_both_versions_at_once(tmp_path: Path, process: Callable[..., Path]) -> None:
    """Hybrid: memory stays with version 1, version 2 is there without a controller of memory; or the other way round."""
    folder = process(
        ["4:memory:/old", "0::/new"],
        [mount(tmp_path / "memory", system="cgroup", options="rw,memory"), mount(tmp_path / "unified")],
    )
    (tmp_path / "unified/new").mkdir(parents=True)
    version_1(tmp_path / "memory/old", 8 * GB, GB)
    assert memory_left(folder) == 7 * GB
    version_2(tmp_path / "unified/new", 3 * GB, GB)
    assert memory_left(folder) == 2 * GB


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/docker/abc", "/docker/abc"),  # of version 1: paths of the host, and only the own group is mounted
        ("/docker/abc", "/kubepods/xyz"),  # another namespace
        ("/../abc", "/"),
        ("/", "/.."),
    ],
)
def test_a_container_sees_its_own_group_at_the_mount(
    tmp_path: Path, process: Callable[..., Path], group: str, root: str
) -> None:
    version_1(tmp_path / "memory", 8 * GB, GB)
    version_1(tmp_path / "abc", GB, GB)
    folder = process([f"4:memory:{group}"], [mount(tmp_path / "memory", root, "cgroup", "rw,memory")])
    assert memory_left(folder) == 7 * GB


def test_a_mount_that_holds_the_group_comes_before_one_that_does_not(tmp_path: Path, process: Callable[..., Path]) -> None:
    version_2(tmp_path / "other", GB, GB)
    version_2(tmp_path / "own/inner", 8 * GB, GB)
    folder = process(["0::/a/inner"], [mount(tmp_path / "other", "/b"), mount(tmp_path / "own", "/a")])
    assert memory_left(folder) == 7 * GB


def test_without_groups_there_is_no_limit(tmp_path: Path, process: Callable[..., Path]) -> None:
    assert memory_left(tmp_path / "absent") is None  # not Linux
    assert memory_left(process(["4:memory:/gone", "0::/gone"], [mount(tmp_path / "cgroup")])) is None


@pytest.mark.parametrize("left", [None, 0, GB, 1 << 62])
def test_what_is_available_is_what_machine_and_groups_allow(monkeypatch: pytest.MonkeyPatch, left: int | None) -> None:
    monkeypatch.setattr(memory, "memory_left", lambda: left)
    free = psutil.virtual_memory().available
    assert 0 < free < psutil.virtual_memory().total
    found = memory.available_memory()
    assert found == left if left in (0, GB) else abs(found - free) < GB
