from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import InputError, OutputError
from hf_moe_lmc.matching import alignment
from hf_moe_lmc.matching.records import matchings
from hf_moe_lmc.path import cost as costs
from hf_moe_lmc.plots import style
from hf_moe_lmc.runtime.processes import ProcessGroup, check_launch, process_group
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.writing.workspace import open_workspace
from tests import tiny
from tests.interpreter import Interpreter

pytestmark = [
    pytest.mark.filterwarnings("ignore:outside the MoE blocks:UserWarning"),  # random models are unrelated
]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture
def start(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Arguments of a fresh interpreter -> what it did."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment)

    return call


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


BOTH = """
import sys
from hf_moe_lmc.cli import main
from hf_moe_lmc.path import cost
from hf_moe_lmc.plots import style
from hf_moe_lmc.runtime import processes
a, b, out, text = sys.argv[1:]
def job():
    code = main(["align", a, b, "-o", f"{out}/aligned"])
    draw, style.save = style.save, lambda *_: None  # drawing takes longer than measuring: once
    code += main(["barrier", a, b, "-o", f"{out}/resident", "--text", text, *OPTIONS])
    style.save = draw
    cost.available_memory = lambda: 400_000  # layer by layer, in several passes
    options = ["--symmetry", f"{out}/aligned", *OPTIONS]
    return code + main(["barrier", a, b, "-o", f"{out}/layers", "--text", text, *options])
processes.close, close = lambda: None, processes.close  # one meeting for all
code = job()
close()
sys.exit(code)
"""
OPTIONS = ["--points", "3", "--context", "48", "--batch-size", "2", "--ensemble", "--cloze", "5"]


def test_two_processes_find_what_one_finds(
    pair: tuple[Path, Path],
    tmp_path: Path,
    text_file: Path,
    interpreter: Interpreter,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "two").mkdir()
    done = interpreter.together(2, BOTH.replace("OPTIONS", repr(OPTIONS)), *pair, tmp_path / "two", text_file)
    assert done.codes == (0, 0), done.errors
    out = tmp_path / "one"
    assert main(["align", *map(str, pair), "-o", f"{out}/aligned"]) == 0
    barrier = ["barrier", *map(str, pair), "--text", str(text_file), *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr(style, "save", lambda *_: None)
        assert main([*barrier, "-o", f"{out}/resident"]) == 0
    monkeypatch.setattr(costs, "available_memory", lambda: 400_000)
    assert main([*barrier, "-o", f"{out}/layers", "--symmetry", f"{out}/aligned"]) == 0
    assert done.output == capsys.readouterr().out.replace(f"{tmp_path}/one", f"{tmp_path}/two")  # one process speaks
    for found in out.rglob("report.json"):  # the path of the symmetry is in it
        found.write_text(found.read_text().replace(f"{tmp_path}/one", f"{tmp_path}/two"))
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    modes = [found[f"{name}/report.json"]["evaluation"].pop("mode") for found in (one, two) for name in ("resident", "layers")]
    assert modes == ["resident", "layers"] * 2
    for cost in ("passes", "activations"):  # those of one process
        assert all(found["layers/report.json"]["evaluation"].pop(cost) is not None for found in (one, two))
    assert one["layers/report.json"]["routing"] and one == two
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["aligned", "layers", "resident"]


def test_an_error_in_one_process_ends_all_with_it(
    pair: tuple[Path, Path], tmp_path: Path, start: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    bad = Path(shutil.copytree(pair[0], tmp_path / "bad"))
    # layer 1 falls to process 1
    tiny.edit(bad, lambda tensors: tensors["model.layers.1.mlp.gate.weight"].fill_(float("nan")))
    done = start(*TWO, "-m", "hf_moe_lmc", "align", bad, pair[1], "-o", tmp_path / "out")
    assert done.returncode != 0 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "layer 1: " in lines[0] and "NaN" in lines[0]
    assert "exitcode  : 2 " in done.stderr, done.stderr
    assert 'Traceback (most recent call last):\n  File "hf_moe_lmc' not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


SLOW = """
import os, sys, time
from hf_moe_lmc.cli import command_line
if os.environ["RANK"] == "0":
    escaped = command_line.escaped
    command_line.escaped = lambda text: time.sleep(1) or escaped(text)
code = command_line.main()
os.write(2, b"left\\n")  # at once: another process writes there, too
sys.exit(code)
"""


def test_nobody_leaves_before_the_first_process_has_spoken(
    pair: tuple[Path, Path], tmp_path: Path, interpreter: Interpreter
) -> None:
    """Torchrun ends the other processes when one has exited: the message would be lost."""
    done = interpreter.together(2, SLOW, "align", pair[0], tmp_path, "-o", tmp_path / "out")
    assert done.codes == (2, 2), done.errors
    error, *left = done.errors.splitlines()
    assert error.startswith("error: ") and left == ["left", "left"]


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


def test_a_single_process_starts_nothing(start: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    code = (
        "import sys; from hf_moe_lmc.runtime.processes import close, process_group; "
        "process_group(); close(); print('torch' in sys.modules)"
    )
    assert start("-c", code).stdout == "False\n"
    alone = ProcessGroup()
    assert alone.exchange(1) == [1] and alone.from_main(2) == 2 and alone.share([1, 2, 3]) == [1, 2, 3]
    assert [ProcessGroup(rank, 2).share([1, 2, 3]) for rank in (0, 1)] == [[1, 3], [2]]
    assert not torch.distributed.is_initialized() and process_group().is_main


STOPPED = """
import os, signal, sys
from {module} import {name} as real
import {module} as module
from hf_moe_lmc.cli import main

calls = 0
def stop(*arguments, **options):
    global calls
    calls += 1
    if calls > {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)
module.{name} = stop
{before}
main(sys.argv[1:])
"""


@pytest.fixture
def stop_in(interpreter: Interpreter) -> Callable[..., None]:
    """Runs a verb in a process that is killed when it has called `name` (module.function) `after` times."""

    def call(name: str, after: int, *arguments: object, before: str = "") -> None:
        module, _, function = name.rpartition(".")
        done = interpreter.run(STOPPED.format(module=module, name=function, after=after, before=before), *arguments)
        assert done.code == -9, done.errors

    return call


def test_align_continues_after_a_kill(
    pair: tuple[Path, Path],
    tmp_path: Path,
    stop_in: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert main(["align", *map(str, pair), "-o", str(tmp_path / "whole")]) == 0
    out = tmp_path / "out"
    stop_in("hf_moe_lmc.matching.alignment.match_layer", 2, "align", *pair, "-o", out)
    assert not out.exists() and (tmp_path / ".out.progress" / "lock").exists()
    again = shutil.copytree(tmp_path / ".out.progress", tmp_path / "copy")
    matched = []
    real = alignment.match_layer
    monkeypatch.setattr(alignment, "match_layer", lambda *a, **k: matched.append(1) or real(*a, **k))
    # a mistake in between costs nothing
    assert main(["align", str(pair[0]), str(tmp_path / "nowhere"), "-o", str(out)]) == 2
    capsys.readouterr()
    assert main(["align", *map(str, pair), "-o", str(out)]) == 0
    assert "continuing: 2 of 3 layers were matched by an earlier call" in capsys.readouterr().err and len(matched) == 1
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "out", "whole"]
    # other options, or none of it wanted: everything anew
    for options, name in ((["--units", "plain"], "plain"), (["--no-resume"], "afresh")):
        matched.clear()
        shutil.copytree(again, tmp_path / f".{name}.progress")
        assert main(["align", *map(str, pair), "-o", str(tmp_path / name), *options]) == 0 and len(matched) == 3
    assert contents(tmp_path / "afresh") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("memory", "after"), [(1 << 40, 2), (400_000, 7)])  # with layers: in the second pass
def test_barrier_continues_after_a_kill(
    pair: tuple[Path, Path],
    tmp_path: Path,
    text_file: Path,
    stop_in: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    memory: int,
    after: int,
) -> None:
    arguments = ["barrier", *map(str, pair), "--text", str(text_file), *OPTIONS]
    out = tmp_path / "out"
    monkeypatch.setattr(costs, "available_memory", lambda: memory)
    assert main([*arguments, "-o", str(tmp_path / "whole")]) == 0
    stop_in(
        "hf_moe_lmc.path.evaluation._fill_in",
        after,
        *arguments,
        "-o",
        out,
        before=f"module.available_memory = lambda: {memory}",
    )
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    assert (report["evaluation"]["mode"] == "layers") == (report["evaluation"]["passes"] > 1) == (memory == 400_000)
    assert report["routing"]
    capsys.readouterr()
    assert main([*arguments, "-o", str(out)]) == 0
    said = capsys.readouterr().err
    assert "continuing: 3 of 3 layers" in said and "batches at points were evaluated by an earlier call" in said
    assert contents(out) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_two_calls_cannot_work_on_one_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with open_workspace(tmp_path / "out"), pytest.raises(OutputError, match="another process writes there"):
        align(*pair, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_damaged_progress_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_workspace(tmp_path / "out") as progress:
        kept = progress.results("matching", {})
        kept.write("layer-0", {"nonsense": torch.ones(2)})
        raise KeyboardInterrupt
    with open_workspace(tmp_path / "out") as progress:
        kept = progress.results("matching", {})
        assert kept.names() == {"layer-0"}
        with pytest.raises(OutputError, match=r"layer-0.safetensors: cannot be continued from .* --no-resume"):
            list(matchings(kept))
        other = progress.results("matching", {"order": "gate"})
        assert not other.names()
    assert not any(tmp_path.iterdir())
