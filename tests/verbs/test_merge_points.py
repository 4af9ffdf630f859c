"""Several points in one pass: each is what a merge of its own writes, and A and B are read once for all of them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import InputError, OutputError
from hf_moe_lmc.publishing.finished import finished
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.merge import merge, plan_merge
from hf_moe_lmc.writing import output, spans
from hf_moe_lmc.writing.shard_file import ShardFile
from tests import tiny
from tests.interpreter import Interpreter
from tests.runtime.test_processes import contents
from tests.scripts import script
from tests.writing.test_output import checkpoint, drawn

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks")
trials = script("kill_trials")

SHARD = "15KB"
HOW = ("matched", "symmetry", "plain")
LISTS = ((0.3, 0.5, 0.7), (1.0, 0.25, 0.0))


def places(t: tuple[float, ...]) -> list[str]:
    return [f"t{one:g}" for one in t]


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of shards that were read, by the name of the checkpoint, since it was last cleared."""
    found: dict[str, int] = {}
    fill, counted = Checkpoint.fill, threading.Lock()

    def counting(checkpoint: Checkpoint, values: torch.Tensor, shard: str, position: int) -> None:
        with counted:  # shards are read by several threads
            found[checkpoint.name] = found.get(checkpoint.name, 0) + values.nbytes
        fill(checkpoint, values, shard, position)

    monkeypatch.setattr(Checkpoint, "fill", counting)
    return found


@pytest.mark.parametrize(
    ("family", "layout", "how", "t"),
    [(*case, HOW[i % 3], LISTS[i // 2 % 2]) for i, case in enumerate(tiny.TABLE)],  # each layout in each way
)
def test_each_point_is_the_merge_of_its_own_and_the_inputs_are_read_once(
    saved: Callable[..., Path],
    tmp_path: Path,
    read_bytes: dict[str, int],
    family: str,
    layout: str,
    how: str,
    t: tuple[float, ...],
) -> None:
    a, b = saved(family, layout, 0), saved(family, layout, 1)
    options = {"align": False} if how == "plain" else {}
    if how == "symmetry":
        align(a, b, tmp_path / "g", symmetry_only=True)
        options = {"symmetry": tmp_path / "g"}
    read_bytes.clear()
    merge(a, b, tmp_path / "out", t, **options)
    read = dict(read_bytes)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(places(t))
    for one, place in zip(t, places(t), strict=True):
        read_bytes.clear()
        merge(a, b, tmp_path / place, one, **options)
        assert contents(tmp_path / "out" / place) == contents(tmp_path / place)  # card and side files, too
        finished(tmp_path / "out" / place)
        if 0 < one < 1:  # at an end the other model's tensors outside the MoE blocks are not read
            assert read == read_bytes
    assert contents(tmp_path / places(t)[0]) != contents(tmp_path / places(t)[1])


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
def test_ranges_of_any_size_and_dtype_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: dict[str, int], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    monkeypatch.setattr(spans, "SPAN", 64)
    a = checkpoint(tmp_path / "a", drawn(dtypes[0], 0), 3)
    b = checkpoint(tmp_path / "b", drawn(dtypes[1], 1), 2, -1)
    t = (0.0, 0.3, 1.0, 0.7)
    read_bytes.clear()
    merge(a, b, tmp_path / "out", t, align=False)
    with Checkpoint.open(a) as of_a, Checkpoint.open(b) as of_b:
        assert read_bytes == {of_a.name: of_a.nbytes, of_b.name: of_b.nbytes}
    for one, place in zip(t, places(t), strict=True):
        merge(a, b, tmp_path / place, one, align=False)
        assert contents(tmp_path / "out" / place) == contents(tmp_path / place)


def test_a_single_point_of_a_list_is_the_output_itself(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    for place, t in (("list", [0.3]), ("number", 0.3), ("flag", None)):
        if t is None:
            assert main(["merge", str(a), str(b), "-o", str(tmp_path / place / "out"), "-t", "0.3", "--no-align"]) == 0
        else:
            merge(a, b, tmp_path / place / "out", t, align=False)
    assert contents(tmp_path / "list") == contents(tmp_path / "number") == contents(tmp_path / "flag")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", trials.PLACES)
def test_a_kill_leaves_no_point_or_all_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(spans, "SPAN", 1024)
    a, b = trials.make_pair(tmp_path)
    found = list(trials.trials("merge of two points", place, 8, tmp_path, a, b))
    assert len(found) == 8 and sum(one["killed"] for one in found) >= 7
    assert {"absent", "old"} & {one["stood"] for one in found}


def test_only_what_is_missing_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i), 4) for i, name in enumerate("ab"))
    t = (0.3, 0.5, 0.7)
    merge(a, b, tmp_path / "whole", t, align=False)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(output.FolderWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        merge(a, b, tmp_path / "out", t, align=False)
    (kept,) = (tmp_path / ".out.progress").glob("output-*")
    lost = [
        "t0.3/model-00002-of-00004.safetensors",
        "t0.7/model-00002-of-00004.safetensors",
        "t0.5/model-00004-of-00004.safetensors",
    ]
    for file in lost:
        (kept / file).unlink()
    plan = plan_merge(a, b, tmp_path / "out", t, align=False)
    assert plan.bytes_to_write == sum((tmp_path / "whole" / file).stat().st_size for file in lost)
    begun: list[str] = []
    begin = ShardFile.begin
    monkeypatch.setattr(ShardFile, "begin", lambda self: (begun.append(self.name), begin(self))[1])
    merge(a, b, tmp_path / "out", t, align=False)
    assert sorted(begun) == sorted(lost)
    assert trials.contents(tmp_path / "out") == trials.contents(tmp_path / "whole")


def test_overwrite_knows_an_output_of_several_points(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    out = tmp_path / "out"
    merge(a, b, out, (0.3, 0.5), align=False)
    with pytest.raises(OutputError, match="not empty"):
        merge(a, b, out, (0.3, 0.7), align=False)
    merge(a, b, out, (0.3, 1e-7), align=False, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["t0.3", "t1e-07"]
    merge(a, b, out, 0.5, align=False, overwrite=True)
    assert (out / "config.json").exists() and not (out / "t0.3").exists()
    merge(a, b, out, (0.0, 1.0), align=False, overwrite=True)
    (out / "llama").mkdir()  # beside what is ours, something that is not
    (out / "llama" / "config.json").touch()
    with pytest.raises(OutputError, match=r"not overwritten: it holds llama"):
        merge(a, b, out, 0.5, align=False, overwrite=True)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        ((0.3, 0.5, 0.3), r"t = 0\.3 is given 2 times"),
        ((0.0, -0.0), r"t = 0 is given 2 times"),
        ((0.3, 1.5), r"t = 1\.5: expected a number from 0"),
        ((0.3, float("nan")), r"t = nan: expected a number from 0"),
        ((), "no t was given"),
        (("best", 0.3), "stands for one point"),
        ("middle", r"t = 'middle': expected a number .* or best"),
        ((0.3, None), "t = absent: expected a number"),
    ],
)
def test_points_that_are_refused(tmp_path: Path, t: object, message: str) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    for verb in (merge, plan_merge):
        with pytest.raises(InputError, match=message):
            verb(a, b, tmp_path / "out", t, align=False)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()


def test_several_points_are_not_one_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = ["merge", "a", "b", "-o", str(tmp_path / "out"), "-t", "0.3", "-t", "0.5", "--push-to-hub", "me/merged"]
    assert main(call) == 2
    assert "publishes one checkpoint, and 2 t were given" in capsys.readouterr().err


def test_a_dry_run_counts_every_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i), 2) for i, name in enumerate("ab"))
    call = ["merge", str(a), str(b), "--no-align", "-o", str(tmp_path / "out"), "--dry-run"]
    size = sum(path.stat().st_size for path in a.glob("*.safetensors"))
    one, three = (plan_merge(a, b, tmp_path / "out", t, align=False) for t in (0.3, (0.3, 0.5, 0.7)))
    assert (one.bytes_to_write, three.bytes_to_write) == (size, 3 * size)
    assert (one.checkpoints, three.checkpoints, one.bytes_to_read) == (1, 3, three.bytes_to_read)
    assert one.peak_memory < three.peak_memory
    free = shutil.disk_usage(tmp_path)._replace(free=2 * size)
    monkeypatch.setattr(output, "SPARE", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert main([*call, "-t", "0.3"]) == 0
    assert "checkpoints" not in capsys.readouterr().out
    for ending in (["--dry-run"], []):
        assert main([*call[:-1], *ending, "-t", "0.3", "-t", "0.5", "-t", "0.7"]) == 2
        printed = capsys.readouterr()
        assert "are to be written" in printed.err and ("3, in one pass over A and B" in printed.out) == bool(ending)
    assert not (tmp_path / "out").exists()


def test_two_processes_write_what_one_writes(saved: Callable[..., Path], tmp_path: Path, interpreter: Interpreter) -> None:
    a, b = saved("qwen3_moe"), saved("qwen3_moe", "fused", 1)
    code = "import sys; from hf_moe_lmc.cli import main; sys.exit(main(sys.argv[1:]))"
    call = ["merge", a, b, "-t", "0.3", "-t", "0.7", "-o"]
    done = interpreter.together(2, code, *call, tmp_path / "two")
    assert done.codes == (0, 0), done.errors
    assert main([*map(str, call), str(tmp_path / "one")]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "t0.7" / "alignment" / "alignment.json").read_text())["layers"]
