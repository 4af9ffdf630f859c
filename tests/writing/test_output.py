"""What is written: the very bytes, whatever the layout of ranges; whole or not at all, whatever happens on the way."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import CheckpointError, OutputError, WriteError
from hf_moe_lmc.verbs.merge import merge
from hf_moe_lmc.writing import output, results, spans
from hf_moe_lmc.writing.shard_file import ShardFile
from hf_moe_lmc.writing.workspace import open_workspace
from tests import tiny
from tests.scripts import script

trials = script("kill_trials")

INDEX = "model.safetensors.index.json"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1, order: int = 1) -> Path:
    """A checkpoint of any tensors, in the given number of shards; with `order` -1 their names are dealt out backwards."""
    folder.mkdir(parents=True)
    names = list(tensors)[::order]
    parts = [names[i::shards] for i in range(shards)]
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def drawn(dtype: torch.dtype, seed: int, count: int = 9) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (), (3,), (0, 4), (64, 33), (1,), (2, 3, 5)]
    found = {f"w.{i}": torch.randn(shapes[i % len(shapes)], generator=generator).to(dtype) for i in range(count)}
    return {**found, "steps": torch.arange(5)}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("dtype_a", "dtype_b"),
    [*((dtype, dtype) for dtype in DTYPES), *((torch.bfloat16, other) for other in DTYPES[:2]), (torch.float32, DTYPES[3])],
    ids=str,
)
def test_a_plain_merge_is_the_line_rounded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype_a: torch.dtype, dtype_b: torch.dtype, t: float
) -> None:
    monkeypatch.setattr(spans, "SPAN", 64)  # ranges that end inside tensors
    of_a, of_b = drawn(dtype_a, 0), drawn(dtype_b, 1)
    a = checkpoint(tmp_path / "a", of_a, 3)
    b = checkpoint(tmp_path / "b", of_b, 2, -1)  # other shards, another order
    merge(a, b, tmp_path / "out", t, align=False)
    found = loaded(tmp_path / "out")
    assert found.keys() == of_a.keys()
    for name, value in found.items():
        if name == "steps":
            expected = of_a[name]
        else:
            wide = torch.promote_types(torch.promote_types(dtype_a, dtype_b), torch.float32)
            expected = torch.lerp(of_a[name].to(wide), of_b[name].to(wide), t).to(dtype_a)
            expected = of_a[name] if t == 0 else of_b[name].to(dtype_a) if t == 1 else expected
        assert value.dtype == expected.dtype and tiny.same_bytes(value.reshape(-1), expected.reshape(-1))
    for shard in a.glob("*.safetensors"):  # the very headers
        head = 8 + int.from_bytes(shard.read_bytes()[:8], "little")
        assert (tmp_path / "out" / shard.name).read_bytes()[:head] == shard.read_bytes()[:head]


def test_tensors_that_lie_one_after_the_other_are_one_range(tmp_path: Path) -> None:
    tensors = {f"w.{i:04d}": torch.ones(3) * i for i in range(500)}
    a, b = (checkpoint(tmp_path / name, tensors) for name in "ab")
    apart = checkpoint(tmp_path / "c", tensors, 2, -1)
    with output.Checkpoint.open(a) as of_a, output.Checkpoint.open(b) as of_b, output.Checkpoint.open(apart) as of_c:
        (shard,) = of_a.shards.values()
        assert len(list(spans.PlainStream(of_a, of_b, (0.5,)).spans(shard))) == 1
        assert len(list(spans.Copied(of_a).spans(shard.tensors))) == 1
        assert len(list(spans.PlainStream(of_a, of_c, (0.5,)).spans(shard))) == 500  # the control: nothing is adjacent there


def test_no_transformers_in_a_plain_merge(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    code = "import sys; from hf_moe_lmc.cli import main; main(sys.argv[1:]); print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "merge", a, b, "--no-align", "-o", tmp_path / "out"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    of_a, of_b = drawn(dtype, 0), drawn(dtype, 1)
    of_b["w.4"][2, 7] = bad
    a, b = checkpoint(tmp_path / "a", of_a, 2), checkpoint(tmp_path / "b", of_b, 2)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"b/model-0000\d-of-00002.safetensors: tensor w.4 holds NaN .* at \[2, 7\]"):
        merge(a, b, out, align=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    merge(a, b, out, 0.0, align=False)  # nothing of B is in it
    merge(a, b, tmp_path / "all", align=False, allow_nonfinite=True)
    assert not bool(loaded(tmp_path / "all")["w.4"][2, 7].isfinite())
    assert bool(loaded(tmp_path / "all")["w.4"][2, 6].isfinite())


def test_values_beyond_the_range_of_the_output_are_named(tmp_path: Path) -> None:
    a = checkpoint(tmp_path / "a", {"w": torch.ones(3, dtype=torch.float16)})
    b = checkpoint(tmp_path / "b", {"w": torch.tensor([1.0, 1e6, 1.0])})
    with pytest.raises(CheckpointError, match=r"tensor w would get a value beyond the range of torch.float16 at \[1\]"):
        merge(a, b, tmp_path / "out", 0.9, align=False)


@pytest.mark.filterwarnings("ignore")  # of the fork, and of unrelated models
@pytest.mark.parametrize(("verb", "place"), [("merge", "beside"), ("align", "overwrite"), ("apply", "inside")])
def test_a_kill_leaves_nothing_or_all_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, place: str
) -> None:
    monkeypatch.setattr(spans, "SPAN", 1024)
    a, b = trials.make_pair(tmp_path)
    found = list(trials.trials(verb, place, 8, tmp_path, a, b))
    assert len(found) == 8 and sum(one["killed"] for one in found) >= 7
    assert {"absent", "old"} & {one["stood"] for one in found}


def test_whole_shards_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i), 4) for i, name in enumerate("ab"))
    merge(a, b, tmp_path / "whole", align=False)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(output.FolderWriter, "write_checkpoint_files", interrupt)
        merge(a, b, tmp_path / "out", align=False)
    (kept,) = (tmp_path / ".out.progress").glob("output-*")
    times = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert len(times) == 4 and not (tmp_path / "out").exists()
    lost = kept / sorted(times)[1]
    lost.unlink()
    merge(a, b, tmp_path / "out", align=False)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert {name for name in after if after[name] == times[name]} == set(times) - {lost.name}
    assert trials.contents(tmp_path / "out") == trials.contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "whole"]
    # other inputs are other facts: nothing is taken over
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(output.FolderWriter, "write_checkpoint_files", interrupt)
        merge(a, b, tmp_path / "other", align=False)
    merge(a, b, tmp_path / "other", 0.25, align=False)
    merge(a, b, tmp_path / "quarter", 0.25, align=False)
    assert trials.contents(tmp_path / "other") == trials.contents(tmp_path / "quarter")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_overwrite_replaces_what_is_ours_and_nothing_else(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    out, mine = tmp_path / "out", tmp_path / "mine"
    merge(a, b, out, 0.5, align=False)
    before = trials.contents(out)
    with pytest.raises(OutputError, match=r"not empty .* --overwrite"):
        merge(a, b, out, 0.25, align=False)
    assert trials.contents(out) == before
    merge(a, b, out, 0.25, align=False, overwrite=True)
    assert trials.contents(out) != before
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"not overwritten: it holds thesis\.tex"):
        merge(a, b, mine, align=False, overwrite=True)
    for place in (a, tmp_path):  # an input, and what holds one
        with pytest.raises(OutputError, match=r"lies inside the input|holds the input"):
            merge(a, b, place, align=False, overwrite=True)
    assert (mine / "thesis.tex").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "mine", "out"]


def test_links_lead_nowhere_into_an_input(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    before = trials.contents(a)
    (tmp_path / "link").symlink_to(a)
    (tmp_path / "nothing").symlink_to(tmp_path / "absent")
    (tmp_path / ".out.progress").symlink_to(a)
    for out, message in ((tmp_path / "link", "lies inside the input"), (tmp_path / "nothing", "a link to nothing")):
        with pytest.raises(OutputError, match=message):
            merge(a, b, out, align=False)
    with pytest.raises(OutputError, match="a link, where this package keeps its progress"):
        merge(a, b, tmp_path / "out", align=False)
    assert trials.contents(a) == before


def test_side_files_are_copied_through_links_and_modes_are_those_of_new_files(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    blob = tmp_path / "blob"
    blob.write_text("{}")
    blob.chmod(0o600)
    (a / "generation_config.json").symlink_to(blob)
    mask = os.umask(0o027)
    try:
        merge(a, b, tmp_path / "out", align=False)
    finally:
        os.umask(mask)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o640 and not path.is_symlink() for path in files) and len(files) == 5
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with some options; skips where this process may not."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount-{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no permission to mount a tmpfs")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(
    tmp_path: Path,
    mounted: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(output, "SPARE", 0)
    big = {f"w.{i}": torch.ones(1 << 16) for i in range(8)}  # 256 KiB each
    a = checkpoint(tmp_path / "a", big, 4)
    b = checkpoint(tmp_path / "b", {name: -value for name, value in big.items()}, 4)
    disk = mounted("size=1536k")
    arguments = ["merge", str(a), str(b), "--no-align", "-o", str(disk / "out")]
    assert main(arguments) == 2  # seen before anything is written
    assert "2.1 MB are to be written, 1.57 MB are free" in capsys.readouterr().err and not any(disk.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(output.FolderWriter, "check_space", lambda *_: None)  # somebody else fills the disk meanwhile
        assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "repeat the same call" in said and "Traceback" not in said
    assert [path.name for path in disk.iterdir()] == [".out.progress"]
    assert not list(disk.rglob(f"*{results.UNFINISHED}")) and len(list(disk.rglob("*.safetensors"))) == 2
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert main(arguments) == 0
    assert [path.name for path in disk.iterdir()] == ["out"] and loaded(disk / "out").keys() == big.keys()


def test_a_mount_point_is_filled_from_inside_and_a_read_only_one_is_refused(
    tmp_path: Path, mounted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "SPARE", 0)
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i), 2) for i, name in enumerate("ab"))
    merge(a, b, tmp_path / "whole", align=False)
    disk = mounted("size=4m")
    merge(a, b, disk, align=False)
    assert trials.contents(disk) == trials.contents(tmp_path / "whole")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in (disk / "new", disk / "deep" / "er"):
        assert main(["merge", str(a), str(b), "--no-align", "-o", str(out)]) == 2
        assert "cannot be written (Read-only file system)" in capsys.readouterr().err
    empty = mounted("size=4m,ro")
    assert main(["merge", str(a), str(b), "--no-align", "-o", str(empty)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_two_calls_and_what_a_third_finds(tmp_path: Path) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))
    with open_workspace(tmp_path / "out"), pytest.raises(OutputError, match="another process writes there"):
        merge(a, b, tmp_path / "out", align=False)
    merge(a, b, tmp_path / "out", align=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_an_error_of_the_system_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (checkpoint(tmp_path / name, drawn(torch.float32, i)) for i, name in enumerate("ab"))

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(WriteError, match=r"Input/output error; nothing unfinished stands there\. 0 whole shards"):
        merge(a, b, tmp_path / "out", align=False)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob(f"*{results.UNFINISHED}"))


def test_a_call_that_was_stopped_does_not_continue_with_shards_of_an_older_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are edited where no sample of the fingerprint lies."""
    of_a, of_b = ({f"w.{i}": torch.rand(64, 1024) for i in range(3)} for _ in "ab")
    a, b = checkpoint(tmp_path / "a", of_a, 3), checkpoint(tmp_path / "b", of_b, 3)

    def stopped() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(output.FolderWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                merge(a, b, tmp_path / "out", align=False)

    stopped()
    with output.Checkpoint.open(b) as before:
        keys = before.fingerprint(), before.resume_key()
    written: list[str] = []
    real = ShardFile.begin
    monkeypatch.setattr(ShardFile, "begin", lambda self: (written.append(self.shard.name), real(self))[1])
    stopped()
    assert written == []  # the control: the same inputs, nothing is written again
    of_b["w.1"][20:30] += 1
    file = next(file for file in b.glob("*.safetensors") if "w.1" in load_file(file))
    raw = bytearray(file.read_bytes())
    at = len(raw) - of_b["w.1"].nbytes
    raw[at:] = of_b["w.1"].numpy().tobytes()
    file.write_bytes(raw)
    with output.Checkpoint.open(b) as after:
        assert after.fingerprint() == keys[0] and after.resume_key() != keys[1]
    merge(a, b, tmp_path / "out", align=False)
    assert len(written) == 3
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], torch.lerp(of_a[name], of_b[name], 0.5)) for name in of_a)
