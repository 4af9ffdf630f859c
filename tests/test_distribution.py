from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc import distribution
from hf_moe_lmc.cli import main
from hf_moe_lmc.distribution import Team, check_launch
from hf_moe_lmc.errors import InputError
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks:UserWarning")  # random models are unrelated
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output: JSON without the seconds that it took and without versions of pictures, else bytes."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
        for name, path in files.items()
    }


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key != "seconds"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def pair(saved: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    return saved("qwen3_moe"), saved("qwen3_moe", "fused", 1)


def test_two_processes_align_as_one_does(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", *map(str, pair), "-o", str(tmp_path / "one")]) == 0
    alone = capsys.readouterr().out
    done = start(*TWO, "-m", "hf_moe_lmc", "align", *pair, "-o", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.replace("/one", "/two")  # one process speaks
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_an_error_in_one_process_ends_all_with_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    bad = Path(shutil.copytree(pair[0], tmp_path / "bad"))
    # layer 1 falls to process 1
    tiny.edit(bad, lambda tensors: tensors["model.layers.1.mlp.gate.weight"].fill_(float("nan")))
    done = start(*TWO, "-m", "hf_moe_lmc", "align", bad, pair[1], "-o", tmp_path / "out")
    assert done.returncode != 0 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "layer 1: " in lines[0] and "NaN" in lines[0]
    assert "exitcode  : 2 " in done.stderr
    assert 'Traceback (most recent call last):\n  File "hf_moe_lmc' not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


SLURM = {
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "3",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_NODELIST": "gpu[07-08],other",
}


def test_slurm_tasks_without_torchrun_are_refused_with_the_line_to_use(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    arguments = ["align", *map(str, pair), "-o", str(tmp_path / "my out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "one of 16 Slurm tasks" in error
    assert (
        "srun --ntasks-per-node=1 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint gpu07:29500 "
        f"-m hf_moe_lmc align {pair[0]} {pair[1]} -o '{tmp_path / 'my out'}'" in error
    )
    assert not any(tmp_path.iterdir())
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "4(x2)")
    with pytest.raises(InputError, match=r"--nproc-per-node 4 .* --symmetry-only"):
        check_launch(["-m", "hf_moe_lmc", "align", "--symmetry-only"])


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 in a larger job
        {"RANK": "3", "WORLD_SIZE": "16"},
    ],
)
def test_one_slurm_task_or_torchrun_in_slurm_is_fine(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str]) -> None:
    for name, value in {**SLURM, **changed}.items():
        monkeypatch.setenv(name, value)
    check_launch()


def test_a_single_process_starts_nothing() -> None:
    code = "import sys; from hf_moe_lmc.distribution import close, team; team(); close(); print('torch' in sys.modules)"
    assert start("-c", code).stdout == "False\n"
    team = Team()
    assert team.exchange(1) == [1] and team.from_main(2) == 2 and team.share([1, 2, 3]) == [1, 2, 3]
    assert [Team(rank, 2).share([1, 2, 3]) for rank in (0, 1)] == [[1, 3], [2]]
    assert not torch.distributed.is_initialized() and distribution.team().is_main
