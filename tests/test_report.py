from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.perplexity import Windows
from hf_moe_lmc.report import BarrierReport


def report(naive: list[float] | None, aligned: list[float]) -> BarrierReport:
    """Losses per token on one window of four predicted tokens."""
    windows = Windows((torch.arange(5),), (0,), 5, False, 5)
    losses = {"aligned": 4 * torch.tensor(aligned, dtype=torch.float64)[:, None]}
    if naive is not None:
        losses["naive"] = 4 * torch.tensor(naive, dtype=torch.float64)[:, None]
    return BarrierReport(
        a={"source": "org/a"},
        b={"source": "org/b"},
        evaluation={**windows.describe(), "dtype": "float32"},
        matching={},
        windows=windows,
        losses=losses,
        t=(0.0, 0.5, 1.0),
        seconds=1.0,
    )


def test_the_share_of_the_naive_barrier_is_said_only_where_there_is_one() -> None:
    good = report([1.0, 3.0, 1.0], [1.0, 1.5, 1.0])
    assert good.percent_of_naive == pytest.approx(25) and good.endpoint_change == 0
    assert "25.0 % of the naive barrier" in good.sentence("aligned") and "25.0 %" in good.to_markdown()
    for other in (report(None, [1.0, 1.5, 1.0]), report([1.0, 1.0005, 1.0], [1.0, 1.0, 1.0])):
        assert other.percent_of_naive is None
        assert "% of" not in other.sentence("aligned") and "% of" not in other.to_markdown()


def test_the_table_has_a_row_for_each_point() -> None:
    lines = report([1.0, 3.0, 1.0], [1.0, 1.5, 1.0]).table().splitlines()
    assert lines[0].split() == ["t", "aligned", "nll", "perplexity", "naive", "nll", "perplexity"]
    assert lines[2].split() == ["0.500", "1.5000", "4.4817", "3.0000", "20.0855"]
    assert any(line.startswith("barrier, naive path: 2.0000 nats per token at t = 0.5") for line in lines)


def test_numbers_that_are_not_finite_are_null_in_the_json(tmp_path: Path) -> None:
    broken = report([1.0, float("inf"), 1.0], [1.0, float("nan"), 1.0])
    found = json.loads(broken.to_json(), parse_constant=pytest.fail)
    assert found["paths"]["naive"]["nll"] == [1.0, None, 1.0] and found["paths"]["naive"]["barrier"] is None
    assert found["summary"]["aligned_percent_of_naive"] is None
    broken.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
