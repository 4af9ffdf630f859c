from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_moe_lmc.example import demo as example
from hf_moe_lmc.example.protocol import Training, standard_library_text
from tests.example.test_protocol import EMAIL


def test_the_demo_leaves_checkpoints_reports_plots_and_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "standard_library_text", lambda: standard_library_text(EMAIL, minimum_characters=100))
    monkeypatch.setattr(example, "BASE", Training(steps=12, learning_rate=4e-3, batch=4, warmup=3))
    monkeypatch.setattr(example, "BLOCK", Training(steps=8, learning_rate=2e-3, batch=4, warmup=3))
    monkeypatch.setattr(example, "HELD_OUT_TOKENS", 256)
    output = tmp_path / "demo"
    lines: list[str] = []
    reports = example.demo(output, tell=lines.append)
    story = "\n".join(lines)
    summary = json.loads((output / "summary.json").read_text())
    for pair in ("independent", "shuffled"):
        report = json.loads((output / pair / "report.json").read_text())
        assert report["paths"]["aligned"]["barrier"] == reports[pair].aligned.barrier == summary[pair]["aligned"]["barrier"]
        assert len(report["paths"]["naive"]["t"]) == 25
        assert (output / pair / "barrier.png").exists()
        assert f"{pair} pair" in story
    shuffled = json.loads((output / "shuffled" / "report.json").read_text())["matching"]["totals"]
    assert shuffled["experts_moved"] > 0 and shuffled["signs"] > 0  # it was shuffled, and found
    assert shuffled["relative_distance_after_units"] < 0.3 * shuffled["relative_distance_before"]
    card = (output / "merge" / "README.md").read_text()
    assert "hidden units moved" in card and str(tmp_path) not in card
    assert (output / "merge" / "model.safetensors.index.json").exists()
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "a", "b-independent", "b-shuffled", "b-sibling", "held_out.txt",
    ]  # fmt: skip
