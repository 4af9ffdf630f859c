from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_moe_lmc.perplexity import drawing
from hf_moe_lmc.perplexity.drawing import Plots, plots
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.plots import style
from tests.perplexity.reports import cut, make_report, on_documents, report


def plotted(made: BarrierReport, finding: str | None = None) -> Plots:
    means, records = made.verdict.compared.means, made.routing or ()
    return plots(made.names, made.paths, means, layers=made.layers, routing=records, measured=made.subtitle, finding=finding)


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
    assert heading.measured == made.subtitle and found.layers is None and found.routing == []
    assert list(found.losses.lines) == ["aligned", "naive"]
    for name, line in found.losses.lines.items():
        path = made.paths[name]
        assert line.nll == pytest.approx(path.curve.nll) and line.barrier == pytest.approx(path.curve.barrier)
        assert line.excess == pytest.approx(path.curve.excess) and line.interval == pytest.approx(path.barrier_interval)
        assert np.array(line.band) == pytest.approx(np.array(path.excess_interval))
    assert f"95 % intervals, paired over {made.bootstrap.count} documents" in found.losses.sure
    assert plotted(made).losses.heading.title == "org/a to org/b"


@pytest.mark.parametrize(("documents", "said"), [(1, "too few to decide"), (5, "5 documents only")])
def test_what_weakens_the_intervals_stands_in_the_plot(documents: int, said: str) -> None:
    assert said in plotted(on_documents(documents)).losses.sure
    assert "nothing to resample" in plotted(report(None, [1, 2, 1])).losses.sure


def test_several_texts_are_plotted_on_their_mean_as_the_verdict_has_it() -> None:
    """A long text of barrier 0 and a short one of barrier 1: 0.5 on their mean."""
    owners = tuple(range(40))
    texts = ("prose",) * 30 + ("code",) * 10
    level = torch.linspace(8, 12, 40, dtype=torch.float64)
    rise = torch.tensor([0.0] * 30 + [4.0] * 10, dtype=torch.float64)
    windows = replace(cut(owners), texts=texts)
    made = make_report(windows, {"aligned": torch.stack([level, level + rise, level])}, (0.0, 0.5, 1.0))
    losses = plotted(made).losses
    (line,) = losses.lines.values()
    assert line.barrier == pytest.approx(0.5) == made.verdict.barriers["aligned"][0].barrier != made.aligned.barrier
    assert line.band[1] == pytest.approx((0.5, 0.5)) and line.band[0] == line.band[-1] == (0, 0)
    assert losses.heading.measured.startswith("prose, code; 160 tokens") and "mean of the texts" in losses.heading.measured


@pytest.mark.parametrize(("end", "said"), [(1.0, "not told apart from the better parent"), (1.5, "Not to be relied on")])
def test_the_title_is_the_verdict_or_that_there_is_none(
    end: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[str] = []
    monkeypatch.setattr(drawing, "draw_losses", lambda losses: titles.append(losses.heading.title))
    monkeypatch.setattr(style, "save", lambda *_: None)
    report([1.0, 3.0, 1.0], [1.0, 1.5, end]).plot(tmp_path / "barrier.png")
    assert len(titles) == 1 and said in titles[0]


def test_two_revisions_of_one_repository_are_told_apart_by_their_commits() -> None:
    made = on_documents()
    one, other = ({"source": "org/a", "commit": letter * 40, "fingerprint": letter * 64} for letter in "ab")
    assert replace(made, a=one, b=other).names == ("org/a@aaaaaaa", "org/a@bbbbbbb")
    assert replace(made, a=one, b=one).names == ("org/a", "org/a") and made.names == ("org/a", "org/b")


def test_the_page_is_written_where_it_is_asked_for(tmp_path: Path) -> None:
    for kind in ("static", "interactive"):
        (tmp_path / kind).mkdir()
        on_documents().plot(tmp_path / kind / "barrier.png", kind)  # type: ignore[arg-type]
        assert (tmp_path / kind / "barrier.html").exists() == (kind == "interactive")
