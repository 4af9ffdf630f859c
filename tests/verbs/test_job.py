"""A dry run is the run's own checks, stopped early: verbs x faults."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import hf_moe_lmc as lmc
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.writing import output as output_module
from hf_moe_lmc.writing.workspace import open_workspace
from tests import tiny

pytestmark = pytest.mark.filterwarnings(
    "ignore:outside the MoE blocks", "ignore:.*the barrier may be higher", "ignore:the tokenizers of A and B differ"
)

VERBS = {
    "align": ["align", "A", "B", "-o", "OUT"],
    "align, symmetry only": ["align", "A", "B", "-o", "OUT", "--symmetry-only"],
    "apply": ["apply", "SYMMETRY", "B", "-o", "OUT"],
    "merge": ["merge", "A", "B", "-o", "OUT"],
    "merge, not aligned": ["merge", "A", "B", "-o", "OUT", "--no-align"],
    "merge, given a symmetry": ["merge", "A", "B", "-o", "OUT", "--symmetry", "SYMMETRY"],
    "barrier": ["barrier", "A", "B", "-o", "OUT", "--text", "TEXT", "--points", "2", "--max-tokens", "64"],
}
WRITE_A_CHECKPOINT = tuple(verb for verb in VERBS if verb not in ("align, symmetry only", "barrier"))


@dataclass(frozen=True)
class Scene:
    """Inputs of one call, which a fault may spoil."""

    root: Path
    a: Path
    b: Path
    symmetry: Path
    text: Path
    output: Path

    def call(self, verb: str, *options: str) -> list[str]:
        places = {"A": self.a, "B": self.b, "SYMMETRY": self.symmetry, "TEXT": self.text, "OUT": self.output}
        return [str(places.get(word, word)) for word in VERBS[verb]] + list(options)


@pytest.fixture
def scene(copy: Callable[..., Path], text_file: Path, tmp_path: Path) -> Scene:
    a, b = copy("mixtral", seed=0, name="a"), copy("mixtral", seed=1, name="b")
    symmetry = tmp_path / "symmetry"
    lmc.align(a, b, symmetry, symmetry_only=True)
    return Scene(tmp_path, a, b, symmetry, text_file, tmp_path / "out")


@contextmanager
def nothing(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    yield ()


@contextmanager
def truncated(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    shard = scene.b / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    yield ()


@contextmanager
def absent(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    scene.b.rename(scene.root / "elsewhere")
    yield ()


@contextmanager
def foreign_configuration(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    tiny.edit_config(scene.b, num_hidden_layers=2)
    yield ()


@contextmanager
def other_vocabulary(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    path = scene.b / "tokenizer.json"
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    first, second = list(words)[10:12]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(content))
    yield ()


@contextmanager
def occupied(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    scene.output.mkdir()
    (scene.output / "precious").touch()
    yield ()


@contextmanager
def not_ours(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    scene.output.mkdir()
    (scene.output / "precious").touch()
    yield ("--overwrite",)


@contextmanager
def dangling(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    scene.output.symlink_to(scene.root / "nowhere")
    yield ()


@contextmanager
def linked_workspace(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    (scene.root / "target").mkdir()
    (scene.root / ".out.progress").symlink_to(scene.root / "target")
    yield ()


@contextmanager
def in_use(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    with ExitStack() as stack:
        stack.enter_context(open_workspace(scene.output))
        yield ()


@contextmanager
def full(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    monkeypatch.setattr(output_module, "SPARE", 1 << 60)
    yield ()


FAULTS = {
    fault.__name__: fault
    for fault in (
        nothing, truncated, absent, foreign_configuration, other_vocabulary, occupied, not_ours, dangling, linked_workspace,
        in_use, full,
    )
}  # fmt: skip


def attempt(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, list[str], str]:
    """Exit code, complaints but for warnings of what only a run can find, and what was printed."""
    code = main(arguments)
    printed = capsys.readouterr()
    errors = printed.err[printed.err.index("error: ") :] if "error: " in printed.err else ""
    errors = re.sub(r"[\d.]+ [kMGT]?B are free", "SOME are free", errors)  # others write to the disk meanwhile
    return code, errors.splitlines(), printed.out


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_finds_what_the_run_finds(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, fault: str
) -> None:
    with FAULTS[fault](scene, monkeypatch) as options:
        before = tree(scene.root)
        planned = attempt(capsys, scene.call(verb, "--dry-run", *options))
        assert tree(scene.root) == before, "a dry run changes nothing"
        run = attempt(capsys, scene.call(verb, *options))
    assert planned[:2] == run[:2]
    harmless = (
        fault == "nothing"
        or (fault == "full" and verb not in WRITE_A_CHECKPOINT)
        or (fault == "other_vocabulary" and verb in ("apply", "align", "align, symmetry only"))
    )
    assert (run[0], bool(run[1])) == ((0, False) if harmless else (2, True))
    if fault in ("nothing", "full"):  # the plan is printed, even where there is no room
        possible = "would be possible" if harmless else "would not be possible"
        assert planned[2].startswith(f"{VERBS[verb][0]} {possible}") and "to read" in planned[2]
    if fault == "full" and not harmless:
        assert "are free there; free some space" in run[1][0]


def tree(root: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder, name)
            if path.exists():
                found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


@pytest.mark.parametrize(
    ("verb", "arguments", "message"),
    [
        ("merge", {"align": False, "order": "gate"}, "--order would have no effect: nothing is matched"),
        ("merge", {"align": False, "exact": True}, "--exact would have no effect: nothing is matched"),
        ("merge", {"t": 7.0}, "t = 7"),
        ("merge", {"private": True}, "--private would have no effect: nothing is published"),
        ("align", {"private": True}, "--private would have no effect: nothing is published"),
        ("align", {"order": "random"}, "order 'random': expected one of gate, expert, best"),
        ("barrier", {"points": 1}, "points 1: expected at least 2"),
        ("barrier", {"split": "train"}, "--split would have no effect: the text is a file"),
        ("barrier", {"column": "body"}, "--column would have no effect: the text is a plain file"),
    ],
)
def test_options_are_refused_in_python_as_on_the_command_line(
    scene: Scene, capsys: pytest.CaptureFixture[str], verb: str, arguments: dict[str, object], message: str
) -> None:
    text = {"text": scene.text} if verb == "barrier" else {}
    for function in (getattr(lmc, verb), getattr(lmc, f"plan_{verb}")):
        with pytest.raises(InputError, match=message):
            function(scene.a, scene.b, scene.output, **text, **arguments)
    words = {"align": {False: ["--no-align"]}, "t": {7.0: ["-t", "7"]}}
    options = [
        word
        for name, value in arguments.items()
        for word in words.get(name, {}).get(value)  # type: ignore[call-overload]
        or [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    ]
    if arguments.get("order") == "random":
        return  # argparse knows the choices
    for dry in ([], ["--dry-run"]):
        code, errors, _ = attempt(capsys, scene.call(verb, *options, *dry) if verb != "barrier" else [
            "barrier", str(scene.a), str(scene.b), "-o", str(scene.output), "--text", str(scene.text), *options, *dry
        ])  # fmt: skip
        assert code == 2 and message in errors[0]
    assert not scene.output.exists()
