"""The choice among repairs and its guard: what helps is taken, what harms is refused, and the record says what was tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.model_class import language_model_class
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.path.cost import EvaluationOptions
from hf_moe_lmc.perplexity.windows import Windows
from hf_moe_lmc.repair.calibrated_run import Calibrated, Calibration
from hf_moe_lmc.repair.choice import accept, choose
from hf_moe_lmc.repair.halves import cut
from hf_moe_lmc.repair.methods import ALIGNED, Method, methods_of
from hf_moe_lmc.writing.results import ResultFolder
from tests import tiny
from tests.path.test_evaluation import miniatures

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = 144
RIDGE, NOISE = Method(fit="ridge", strength=0.3), Method("norms")


@dataclass(frozen=True)
class Damaged:
    """A block whose down projections are noise."""

    source: LayerSource

    def stored(self, role: str, expert: int | None = None) -> Tensor:
        values = self.source.stored(role, expert)
        return values.flip(0) * 3 if role == "down" else values


@pytest.fixture(scope="module")
def text(saved: Callable[..., Path]) -> Windows:
    """What A itself says: the closer a merge is to A, the lower its loss."""
    model = tiny.load(saved("mixtral", "per-expert", 0))
    torch.manual_seed(0)
    with torch.no_grad():
        rows = model.generate(torch.randint(3, 300, (ROWS, 1)), do_sample=True, min_length=33, max_length=33, pad_token_id=0)
    return Windows(tuple(rows), tuple(i // 2 for i in range(ROWS)), 33, False, ROWS * 33)


def run_of(saved: Callable[..., Path], text: Windows, folder: Path, starts: bool = True) -> Calibrated:
    """A and a copy whose hidden units changed places: taken as it is, the merge of both is bad, and ridge mends it."""
    a = read_model(Checkpoint.open(saved("mixtral", "per-expert", 0)))
    b = read_model(Checkpoint.open(saved("mixtral", "per-expert", 0)))
    symmetry = b.random(torch.Generator().manual_seed(1), scale=1.0)
    everything = frozenset(text.text_of)
    options = EvaluationOptions(model_class=language_model_class(a), batch_size=16)
    damaged: Mapping[int, LayerSource] = {index: Damaged(layer) for index, layer in a.layers.items()}
    named: Any = {"norms": damaged, "crossover": a.layers} if starts else {}
    return Calibrated(a, b, symmetry, 0.5, Calibration(text, (everything, everything)), options, named)


def test_what_helps_is_accepted_and_what_harms_is_refused(saved: Callable[..., Path], text: Windows, tmp_path: Path) -> None:
    run = run_of(saved, text, tmp_path)
    found = choose(run, "ridge", ResultFolder(tmp_path / "ridge"), [NOISE, RIDGE])
    assert found.method == RIDGE and found.accepted and found.fitted is not None
    assert found.difference is not None and found.difference.interval is not None and found.difference.interval[1] < 0
    assert {entry["method"]: entry["difference"] > 0 for entry in found.record["tried"]} == {"norms": True, "ridge": False}
    alone = choose(run, "norms", ResultFolder(tmp_path / "norms"), [NOISE])
    assert (alone.method, alone.accepted) == (ALIGNED, False)
    first, second = cut(text, range(len(text.rows)))
    harmful = accept(run, NOISE, first, second, ResultFolder(tmp_path / "harmful"), {"tried": [1]})
    assert not harmful.accepted and harmful.difference is not None and harmful.difference.value > 0
    assert "refused" in harmful.sentence and "refused" not in found.sentence


def test_few_documents_are_said_and_too_few_windows_refused(saved: Callable[..., Path], text: Windows, tmp_path: Path) -> None:
    few = Windows(text.rows, tuple(i // 24 for i in range(ROWS)), 33, False, ROWS * 33)
    found = choose(run_of(saved, few, tmp_path), "ridge", ResultFolder(tmp_path / "few"), [RIDGE])
    assert found.accepted and "as if they were independent" in found.record["note"]
    with pytest.raises(InputError, match="second half has 4 windows of 33 tokens, and 5 are needed"):
        short = Windows(text.rows[:8], tuple(range(8)), 33, False, 8 * 33)
        choose(run_of(saved, short, tmp_path), "ridge", ResultFolder(tmp_path / "short"), [RIDGE])


def test_it_is_deterministic_and_continues(
    saved: Callable[..., Path], text: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [
        choose(run_of(saved, text, tmp_path), "ridge", ResultFolder(tmp_path / name), [RIDGE]).record
        for name in ("one", "other")
    ]
    assert records[0] == records[1]
    runs: list[int] = []
    run = Calibrated.run

    def counted(self: Calibrated, *args: Any) -> Any:
        runs.append(1)
        return run(self, *args)

    monkeypatch.setattr(Calibrated, "run", counted)
    again = choose(run_of(saved, text, tmp_path), "ridge", ResultFolder(tmp_path / "one"), [RIDGE]).record
    assert again == records[0]
    assert len(runs) == 1  # candidates are not compared again


@pytest.mark.parametrize("name", ["dbrx", "axk1"])
def test_a_family_without_fits_is_left_with_what_needs_none(tmp_path: Path, name: str) -> None:
    a, b = miniatures(name, tmp_path)
    rows = torch.randint(3, 90, (24, 17), generator=torch.Generator().manual_seed(0))
    windows = Windows(tuple(rows), tuple(range(24)), 17, False, 24 * 17)
    everything = frozenset(windows.text_of)
    options = EvaluationOptions(model_class=language_model_class(a), batch_size=8)
    starts: Any = {"norms": a.layers, "crossover": b.layers}
    run = Calibrated(a, b, b.identity(), 0.5, Calibration(windows, (everything, everything)), options, starts)
    found = choose(run, "auto", ResultFolder(tmp_path / "work"))
    assert {entry["method"] for entry in found.record["tried"]} == {"norms", "crossover"}
    assert set(found.record["skipped"]) == {"ridge", "crossover+ridge", "regmean"}
    assert name in found.record["skipped"]["ridge"]


def test_auto_tries_every_method() -> None:
    names = {"norms", "crossover", "ridge", "crossover+ridge", "regmean"}
    assert {method.name for method in methods_of("auto")} == names
    for name in names:
        assert {method.name for method in methods_of(name)} == {name}
