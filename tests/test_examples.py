"""The scripts in examples/ run on small models, and say what they promise."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks:UserWarning")  # two seeds have nothing in common

FOLDER = Path(__file__).resolve().parents[1] / "examples"
TEXT = "The expert that answers is the one the router picked. " * 30


@pytest.fixture
def run(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Runs an example on two models in a folder of its own; returns what it prints."""
    models = [str(saved("olmoe", seed=seed)) for seed in (0, 1)]
    monkeypatch.chdir(tmp_path)

    def printed(name: str, *args: str) -> str:
        runpy.run_path(str(FOLDER / f"{name}.py"))["main"]([*models, *args])
        return capsys.readouterr().out

    return printed


def test_every_example_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {"verdict", "align_once", "symmetry"}


def test_the_verdict_is_printed(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(TEXT, encoding="utf-8")
    printed = run("verdict", "prose.txt", "--points", "3")
    assert printed.startswith("Least loss on the aligned path") and "nats per token" in printed
    assert "Mind: one document" in printed and (tmp_path / "verdict" / "barrier.png").exists()


def test_what_was_matched_once_is_merged_several_times(run: Callable[..., str], tmp_path: Path) -> None:
    printed = run("align_once", "-t", "0.25", "0.5")
    assert "experts" in printed
    for t in ("0.25", "0.5"):
        place = Path("aligned-once", "merges", f"t{t}")
        assert f"written: {place}" in printed and (tmp_path / place / "config.json").exists()


def test_a_symmetry_keeps_the_function_and_halfway_does_not(run: Callable[..., str]) -> None:
    same, halfway = (float(line.split()[-1]) for line in run("symmetry").splitlines())
    assert same < 1e-4 < 100 * same < halfway
