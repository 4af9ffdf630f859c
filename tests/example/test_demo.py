from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import hf_moe_lmc as lmc
from hf_moe_lmc.cli import main
from hf_moe_lmc.errors import OutputError
from hf_moe_lmc.example import stages
from hf_moe_lmc.example.domains import library_domains
from hf_moe_lmc.example.protocol import Training
from tests.example.test_domains import ASYNCIO

STAGES = 13
# models that were hardly trained
pytestmark = pytest.mark.filterwarnings("ignore:in layers .* the experts are further apart")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo of a few seconds."""
    monkeypatch.setattr(stages, "library_domains", lambda: library_domains(ASYNCIO))
    for recipe in ("DENSE", "BASE"):
        monkeypatch.setattr(stages, recipe, Training(steps=12, learning_rate=4e-3, batch=4, warmup=3))
    monkeypatch.setattr(stages, "APART", Training(steps=8, learning_rate=4e-3, batch=4, warmup=3))
    monkeypatch.setattr(stages, "BLOCK", Training(steps=8, learning_rate=2e-3, batch=4, warmup=3))
    monkeypatch.setattr(stages, "HELD_OUT_TOKENS", 256)


@pytest.mark.usefixtures("short")
def test_the_demo_leaves_checkpoints_reports_plots_and_a_merge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, story = tmp_path / "demo", list[str]()
    for name, value in (("HF_HUB_DISABLE_PROGRESS_BARS", None), ("progress_bar_states", {})):
        monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], name, value)
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)  # as they are outside of tests
    reports = lmc.demo(output, tell=story.append)
    errors = capsys.readouterr().err
    assert "training: 12 of 12 steps" in errors and "Writing model shards" not in errors, "bars of our own alone"
    assert transformers.utils.logging.is_progress_bar_enabled()
    summary = json.loads((output / "summary.json").read_text())
    for pair in stages.PAIRS:
        report = json.loads((output / pair / "report.json").read_text())
        assert report == reports[pair]
        assert report["paths"]["aligned"]["barrier"] == summary[pair]["aligned"]["barrier"]
        assert len(report["paths"]["naive"]["t"]) == 25
        assert (output / pair / "barrier.png").exists()
        assert any(f"{pair} pair" in line for line in story)
    shuffled = json.loads((output / "shuffled" / "report.json").read_text())["matching"]["totals"]
    assert shuffled["experts_moved"] > 0 and shuffled["signs"] > 0  # it was shuffled, and found
    assert shuffled["relative_distance_after_units"] < 0.3 * shuffled["relative_distance_before"]
    card = (output / "merge" / "README.md").read_text()
    assert "prose" in card and str(tmp_path) not in card
    references = json.loads((output / "merge" / "report.json").read_text())["references"]
    assert references == summary["upcycled"]["references"] and references["mean"]["ensemble"] is not None
    assert set(references["texts"]) == {"prose", "code"} and references["t"] == 0.5
    for model, words in (("a", "A"), ("aligned", "merge, aligned")):
        row = [f"{references['texts'][text][model]:.3f}" for text in ("prose", "code")] + [f"{references['mean'][model]:.3f}"]
        assert any(line.split() == [*words.split(), *row] for line in story)
    assert (output / "merge" / "model.safetensors").exists() and (output / "merge" / "tokenizer.json").exists()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "a", "b-independent", "b-shuffled", "b-sibling", "base", "dense", "upcycled-a", "upcycled-b",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*")), "the folder in which it grew is gone"
    counted = [line for line in story if " of " in line and line[0].isdigit()]
    assert [line.partition(":")[0] for line in counted if ":" in line] == [f"{i} of {STAGES}" for i in range(1, STAGES + 1)]

    again = list[str]()
    before = (output / "demo.json").stat().st_mtime_ns
    assert lmc.demo(output, tell=again.append) == reports  # a second call tells it once more
    assert any("finished by an earlier call" in line for line in again)
    assert {line.strip() for line in story if "barrier" in line and "path" in line} <= {line.strip() for line in again}
    assert (output / "demo.json").stat().st_mtime_ns == before

    with pytest.raises(OutputError, match="--overwrite"):
        lmc.demo(output, resume=False)
    (output / "demo.json").write_text("{}")  # of another release, say
    with pytest.raises(OutputError, match="not empty"):
        lmc.demo(output)
    assert main(["demo", "-o", str(output), "--overwrite"]) == 0
    assert f"{STAGES} of {STAGES}" in capsys.readouterr().out
    assert json.loads((output / "summary.json").read_text()) == summary, "on one machine the figures repeat"


@pytest.mark.usefixtures("short")
def test_a_stopped_demo_continues_and_comes_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = lmc.demo(tmp_path / "whole")
    for name in ("train", "apply", "barrier", "merge"):
        monkeypatch.setattr(stages, name, stopped_once(getattr(stages, name)))
    output, calls = tmp_path / "stopped", 0
    while not output.exists():
        calls += 1
        assert calls < 9
        story = list[str]()
        try:
            found = lmc.demo(output, tell=story.append)
        except KeyboardInterrupt:
            assert not output.exists()
    assert calls > 3
    assert any("(done by an earlier call)" in line for line in story)
    assert curves(found) == curves(whole)
    assert not list(tmp_path.glob(".*"))


def stopped_once(work: Callable[..., Any]) -> Callable[..., Any]:
    """Stops once, when the first call has done its work but the stage is not on record."""
    stopped = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal stopped
        found = work(*args, **kwargs)
        if not stopped:
            stopped = True
            raise KeyboardInterrupt
        return found

    return run


def curves(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {pair: {path: found["nll"] for path, found in report["paths"].items()} for pair, report in reports.items()}


@pytest.mark.usefixtures("short")
def test_a_folder_of_somebody_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "summary.json").write_text("{}")
    with pytest.raises(OutputError, match="did not write it"):
        lmc.demo(tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "summary.json").read_text() == "{}"
