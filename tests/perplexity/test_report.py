from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.perplexity.report import LayerLosses
from hf_moe_lmc.perplexity.verdict import MergedAt
from tests.perplexity.reports import on_documents, report
from tests.schemas import check_report


def test_the_share_of_the_naive_barrier_is_said_only_where_there_is_one() -> None:
    good = report([1.0, 3.0, 1.0], [1.0, 1.5, 1.0])
    assert good.percent_of_naive == pytest.approx(25) and good.endpoint_change == 0
    assert "25.0 % of the naive barrier" in good.sentence("aligned") and "25.0 %" in good.to_markdown()
    for other in (report(None, [1.0, 1.5, 1.0]), report([1.0, 1.0005, 1.0], [1.0, 1.0, 1.0])):
        assert other.percent_of_naive is None
        assert "% of" not in other.sentence("aligned") and "% of" not in other.to_markdown()


def test_the_table_has_a_row_for_each_point() -> None:
    lines = report([1.0, 3.0, 1.0], [1.0, 1.5, 1.0]).table().splitlines()
    assert lines[0].startswith("Least loss on the aligned path at its end A") and lines[3].startswith("Mind: one document")
    lines = lines[next(i for i, line in enumerate(lines) if line.split()[:1] == ["t"]) :]
    assert lines[0].split() == ["t", "aligned", "nll", "perplexity", "naive", "nll", "perplexity"]
    assert lines[2].split() == ["0.500", "1.5000", "4.4817", "3.0000", "20.0855"]
    assert any(line.startswith("barrier, naive path: 2.0000 nats per token at t = 0.5") for line in lines)


def test_numbers_that_are_not_finite_are_null_in_the_json(tmp_path: Path) -> None:
    broken = report([1.0, float("inf"), 1.0], [1.0, float("nan"), 1.0])
    found = json.loads(broken.to_json(), parse_constant=pytest.fail)
    assert found["paths"]["naive"]["nll"] == [1.0, None, 1.0] and found["paths"]["naive"]["barrier"] is None
    assert found["summary"]["aligned_percent_of_naive"] is None
    broken.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000 and "<svg" in (tmp_path / "plot.svg").read_text()
    assert found["paths"]["naive"]["barrier_interval"] is None  # one window: nothing to resample
    assert "nothing to resample" in broken.to_markdown() and found["statistics"]["clusters"] == 1


def test_the_numbers_of_a_path_have_intervals() -> None:
    measured = on_documents()
    found = json.loads(measured.to_json())
    for name in ("naive", "aligned"):
        path = found["paths"][name]
        for key in ("barrier", "area"):
            low, high = path[f"{key}_interval"]
            assert low < path[key] < high
        assert all(low < nll < high for nll, (low, high) in zip(path["nll"], path["nll_interval"], strict=True))
        assert path["barrier_worse_end"] == pytest.approx(path["barrier"], abs=1e-9)
        assert path["barrier_perplexity_ratio"] == pytest.approx(math.exp(path["barrier"]))
        assert path["bits_per_byte"] == pytest.approx([nll * 4 / 16 / math.log(2) for nll in path["nll"]])
    summary = found["summary"]
    low, high = summary["difference_interval"]
    assert summary["difference"] == pytest.approx(found["paths"]["naive"]["barrier"] - found["paths"]["aligned"]["barrier"])
    assert low < summary["difference"] < high
    statistics = found["statistics"]
    facts = {"unit": "document", "clusters": 24, "replicates": 2000, "level": 0.95, "seed": 0, "note": None}
    assert facts.items() <= statistics.items() and "bootstrap" in statistics["method"]
    assert "layerwise" not in found and "routing" not in found and found["warnings"] == []
    text = measured.to_markdown()
    assert "over 24 documents" in text and "bits per byte" in text and f"[{low:.4f}, {high:.4f}]" in text
    assert f"[{low:.4f}, {high:.4f}]" in measured.table() and "95 % intervals over 24 documents" in measured.table()
    assert found == json.loads(on_documents().to_json())  # seeded


def test_a_path_below_the_line_has_no_barrier_of_zero() -> None:
    found = report([1.0, 3.0, 1.0], [1.0, 0.5, 1.0])
    assert "barrier, aligned path: the path lies below the line between its ends everywhere; area -0.2500" in found.table()
    assert "barrier 0.0000" not in found.table() and found.subtitle == "text; 4 tokens, 1 document; float32"


def test_one_document_is_said() -> None:
    text = on_documents(1).to_markdown()
    assert "over 2 windows" in text and "as if they were independent" in text


def test_a_peak_between_points_of_the_grid_is_warned_of() -> None:
    coarse = report([1.0, 3.0, 1.0], [1.0, 1.0, 1.0])
    assert len(coarse.warnings) == 1 and coarse.warnings[0].startswith("naive path: the barrier may be higher")
    assert "**Mind:** naive path" in coarse.to_markdown() and "--refine" in coarse.to_markdown()
    assert coarse.to_dict()["warnings"] == coarse.warnings


def test_layers_and_routing_are_reported_where_they_were_measured(tmp_path: Path) -> None:
    t = (0.0, 0.5, 1.0)
    spans = [(0, 0), (1, 1), (0, 1)]
    of_layer = {span: LayerLosses(t, on_documents().losses["aligned"][[0, 4, 8]] * (1 + sum(span))) for span in spans}
    routing = [
        {"path": "aligned", "t": at, "layer": layer, "module": "mlp", "load": [0.25, 0.75], "agreement_a": 1 - at / 2,
         "agreement_b": at, "entropy": 0.5}
        for at in t
        for layer in (0, 1)
    ]  # fmt: skip
    full = on_documents(layerwise=of_layer, routing=routing)
    found = json.loads(full.to_json())
    assert [entry.get("layer", entry.get("layers")) for entry in found["layerwise"]] == [0, 1, [0, 1]]
    assert found["routing"] == routing
    low, high = found["layerwise"][1]["barrier_interval"]
    assert low < found["layerwise"][1]["barrier"] < high and found["layerwise"][1]["t"] == list(t)
    layers = full.table().split("\n\n")[-1].splitlines()
    assert layers[1].split() == ["layers", "barrier,", "nats", "at", "t"] and layers[4].split()[0] == "0-1"
    text = full.to_markdown()
    assert "## Layer by layer" in text and "| 0-1 | " in text and "## Routing along the path" in text
    full.plot(tmp_path / "barrier.png")
    names = {"barrier", "layerwise", "routing-aligned", "load-aligned"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert all(f"({path.name})" in text for path in tmp_path.glob("*.png"))
    on_documents(layerwise=of_layer, routing=routing).plot(tmp_path / "again.png")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "barrier.svg").read_bytes()


def test_a_repaired_path_is_what_the_verdict_is_about_unless_it_was_refused() -> None:
    plain = on_documents()
    right = {name: torch.full_like(losses, 2) for name, losses in plain.losses.items()}
    repaired = plain.losses["naive"][:1] - 0.2 * torch.tensor([[0, 1, 2, 3, 4, 3, 2, 1, 0]]).T / 4
    report = replace(plain, losses={**plain.losses, "repaired": repaired}, right={**right, "repaired": right["aligned"] + 1})
    content = json.loads(report.to_json())
    check_report(content)
    assert content["verdict"]["merge"] == "repaired" and content["verdict"]["standing"] == "below_both"
    assert report.verdict.sentences[1].startswith("The repaired merge at t = 0.5 is below both parents by 0.05")
    assert content["paths"]["repaired"]["accuracy"][4] == 0.75
    mean = content["references"]["mean"]
    assert mean["repaired"] == pytest.approx(mean["a"] - 0.05) and mean["accuracy"]["repaired"] == 0.75
    assert {"a", "b", "naive", "better"} == mean["differences"]["repaired"].keys()
    assert "aligned  repaired" in report.table() and "| aligned | repaired |" in report.to_markdown()
    assert content["summary"] == json.loads(plain.to_json())["summary"]  # of Eq. 1, without the repair
    assert content["verdict"]["barriers"] == json.loads(plain.to_json())["verdict"]["barriers"]
    worse = replace(report, losses={**report.losses, "repaired": plain.losses["naive"]})
    assert any("above the aligned one" in caution for caution in worse.verdict.cautions)
    assert not any("above the aligned one" in caution for caution in report.verdict.cautions)
    few = replace(report, losses={**report.losses, "repaired": repaired[[0, 4, 8]]}, right={}, repaired_t=(0.0, 0.5, 1.0))
    assert few.verdict.sentences[-1] == plain.verdict.sentences[-1] and few.verdict.least.t == (0.0, 0.5, 1.0)
    refused = replace(report, decides="aligned")
    assert refused.verdict.merge == "aligned" and refused.verdict.sentences[1].startswith("The merge at")
    merged = replace(report, merge=MergedAt(0.25, "repaired"))
    assert merged.verdict.t == 0.25 and merged.verdict.merge == "repaired" and merged.references.mean.values["aligned"]
