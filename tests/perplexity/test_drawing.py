from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_moe_lmc.perplexity.drawing import Plots, measured, plots
from hf_moe_lmc.perplexity.report import BarrierReport
from tests.perplexity.reports import cut, make_report, on_documents, report


def plotted(made: BarrierReport, finding: str | None = None) -> Plots:
    return plots(
        (made.a["source"], made.b["source"]), made.paths, layers=made.layers, routing=made.routing or (),
        evaluation=made.evaluation, finding=finding,
    )  # fmt: skip


def test_the_interval_of_the_excess_is_paired_and_nothing_at_the_ends() -> None:
    """Documents of very different losses, whose rise is nearly the same, leave a narrow band."""
    made = on_documents()
    for path in made.paths.values():
        assert path.excess_interval[0] == path.excess_interval[-1] == (0, 0)
        raw, paired = (np.ptp(np.array(found), axis=1) for found in (path.nll_interval, path.excess_interval))
        assert (paired < raw / 3).all()
        for excess, (low, high) in zip(path.curve.excess[1:-1], path.excess_interval[1:-1], strict=True):
            assert low < excess < high
        peak = path.curve.peak
        assert path.excess_interval[peak] == pytest.approx(path.barrier_interval, rel=0.05)
    assert report([1, 2, 1], [1, 1.5, 1]).paths["naive"].excess_interval == [None] * 3


def test_each_resample_is_over_its_own_line() -> None:
    """Ends that differ between documents move the line, not the excess."""
    t = (0.0, 0.5, 1.0)
    ends = torch.linspace(4, 12, 20, dtype=torch.float64)
    losses = torch.stack([ends, (ends + ends.flip(0)) / 2 + 0.4, ends.flip(0)])
    (path,) = make_report(cut(tuple(range(20))), {"aligned": losses}, t).paths.values()
    low, high = path.excess_interval[1]
    assert (low, high) == pytest.approx((0.1, 0.1)) and np.ptp(path.nll_interval[0]) > 0.3


def test_what_is_plotted_is_what_was_measured() -> None:
    made = on_documents()
    found = plotted(made, finding="better by far")
    heading = found.losses.heading
    assert (heading.title, heading.models) == ("better by far", ("org/a", "org/b"))
    assert heading.measured == "held_out.txt, 96 tokens of 12 documents" and found.layers is None and found.routing == []
    assert list(found.losses.lines) == ["aligned", "naive"]
    for name, line in found.losses.lines.items():
        path = made.paths[name]
        assert (line.nll, line.excess, line.barrier) == (path.curve.nll, path.curve.excess, path.curve.barrier)
        assert line.band == path.excess_interval and line.interval == path.barrier_interval
    assert "95 % intervals, paired over 12 documents" in found.losses.sure
    assert plotted(made).losses.heading.title == "org/a to org/b"


@pytest.mark.parametrize(("documents", "said"), [(1, "may be too narrow"), (5, "5 documents only")])
def test_what_weakens_the_intervals_stands_in_the_plot(documents: int, said: str) -> None:
    assert said in plotted(on_documents(documents)).losses.sure
    assert "nothing to resample" in plotted(report(None, [1, 2, 1])).losses.sure


def test_the_text_is_named() -> None:
    files = {"kind": "files", "files": [{"name": f"{x}.txt"} for x in "abcd"]}
    assert measured({"text": files, "tokens_scored": 12000, "documents": 4}).startswith("a.txt, b.txt and 2 more files, 12,000")
    dataset = {"kind": "dataset", "name": "org/wiki", "config": None, "split": "test"}
    assert measured({"text": dataset, "tokens_scored": 9, "documents": 1}) == "org/wiki, test, 9 tokens of 1 document"


def test_the_page_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    for kind in ("static", "interactive"):
        (tmp_path / kind).mkdir()
        on_documents().plot(tmp_path / kind / "barrier.png", kind)  # type: ignore[arg-type]
        assert (tmp_path / kind / "barrier.html").exists() == (kind == "interactive")
