"""What a barrier measurement records besides the two curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.path.measurement import _beside_the_maximum
from hf_moe_lmc.perplexity.curve import BarrierCurve
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.verbs.barrier import barrier
from tests.schemas import check_report

pytestmark = pytest.mark.filterwarnings("ignore:outside the MoE blocks")


@pytest.fixture(scope="module")
def measure(
    saved: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., BarrierReport]:
    def measure(**options: Any) -> BarrierReport:
        a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "per-expert", 1)
        output = tmp_path_factory.mktemp("measured") / "out"
        options = {"text": text_file, "points": 5, "context": 32, "max_tokens": 200} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BarrierReport, "plot", lambda *_: None)  # tests of the report and of the path draw
            report = barrier(a, b, output, **options)
        found = json.loads((output / "report.json").read_text())
        check_report(found)
        assert found.get("routing") == report.routing
        assert found.get("layerwise") == json.loads(report.to_json()).get("layerwise")
        return report

    return measure


@pytest.fixture(scope="module")
def plain(measure: Callable[..., BarrierReport]) -> BarrierReport:
    return measure()


def test_the_routing_is_recorded_at_every_point_of_the_grid(
    plain: BarrierReport, measure: Callable[..., BarrierReport]
) -> None:
    assert plain.layerwise is None and plain.routing is not None
    places = [(row["path"], row["t"], row["layer"], row["module"]) for row in plain.routing]
    assert places == [(path, i / 4, layer, "mlp") for path in ("aligned", "naive") for i in range(5) for layer in (1, 2)]
    for row in plain.routing:
        assert len(row["load"]) == 6 and sum(row["load"]) == pytest.approx(1)
        assert row["agreement_a"] == 1 if row["t"] == 0 else row["agreement_a"] < 1
        assert row["agreement_b"] == 1 if row["t"] == 1 else row["agreement_b"] < 1
    without = measure(routing=False)
    assert without.routing is None and without.aligned.nll == plain.aligned.nll


def test_each_moe_layer_alone_starts_at_a_and_costs_no_more_reading(
    plain: BarrierReport, measure: Callable[..., BarrierReport]
) -> None:
    report = measure(layerwise=3)
    assert report.aligned.nll == plain.aligned.nll and report.naive == plain.naive and report.routing == plain.routing
    assert report.evaluation["passes"] == plain.evaluation["passes"]
    entries = report.to_dict()["layerwise"]
    assert [entry["layer"] for entry in entries] == [1, 2]
    for entry in entries:
        assert entry["t"] == [0, 0.25, 0.5, 0.75, 1]
        assert entry["nll"][0] == plain.aligned.nll[0] and entry["nll"][-1] != plain.aligned.nll[-1]
        assert entry["barrier"] == BarrierCurve(tuple(entry["t"]), tuple(entry["nll"])).barrier


def test_ranges_of_layers_go_together(plain: BarrierReport, measure: Callable[..., BarrierReport]) -> None:
    report = measure(layers="1, 0-2,1-2,each", layerwise=1)
    assert report.aligned.nll == plain.aligned.nll and report.evaluation["passes"] == plain.evaluation["passes"]
    entries = report.to_dict()["layerwise"]
    assert [entry.get("layer", entry.get("layers")) for entry in entries] == [1, 2, [0, 2], [1, 2]]
    assert all(("layer" in entry) != ("layers" in entry) for entry in entries)
    single, both = (report.layers[span].curve for span in ((2, 2), (1, 2)))
    assert single.t == both.t == (0, 0.5, 1) and single.nll[0] == both.nll[0] != both.nll[1] != single.nll[1]
    alone = measure(layers="0", routing=False, naive=False)
    assert list(alone.layerwise or {}) == [(0, 0)] and len(alone.layers[0, 0].t) == 7


def test_layers_that_do_not_exist_are_refused(measure: Callable[..., BarrierReport]) -> None:
    for layers, message in (
        ("3", "has decoder layers 0 to 2"),
        ("0-3", "has decoder layers 0 to 2"),
        ("2-1", "a range goes from the lower to the higher"),
        ("0:2", "expected numbers, ranges and `each`"),
        ("-1", "expected numbers"),
        ("", "expected numbers"),
    ):
        with pytest.raises(InputError, match=message):
            measure(layers=layers)


def test_points_are_added_beside_the_maximum_on_both_paths(
    plain: BarrierReport, measure: Callable[..., BarrierReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    # random models need not have a maximum between the ends
    monkeypatch.setattr("hf_moe_lmc.path.measurement._beside_the_maximum", lambda c: [0.1] if 0.1 not in c.t else [0.3, 0.6])
    report = measure(refine=2)
    assert report.t == (0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.75, 1)
    assert report.evaluation["refined_t"] == [0.1, 0.3, 0.6] and report.evaluation["passes"] == 3
    assert report.naive is not None and plain.naive is not None
    for refined, before in ((report.aligned, plain.aligned), (report.naive, plain.naive)):
        at = dict(zip(refined.t, refined.nll, strict=True))
        assert tuple(at[t] for t in before.t) == before.nll
    assert report.routing is not None and plain.routing is not None
    assert [row for row in report.routing if row["t"] in before.t] == plain.routing
    assert {(row["path"], row["t"]) for row in report.routing} == {(path, t) for path in report.losses for t in report.t}
    one_grid = measure(points=11, naive=False).routing
    assert one_grid is not None
    of_added = [row for row in report.routing if row["path"] == "aligned" and row["t"] in (0.1, 0.3, 0.6)]
    assert of_added == [row for row in one_grid if row["t"] in (0.1, 0.3, 0.6)]


def test_the_midpoint_is_measured_whatever_the_grid(plain: BarrierReport, measure: Callable[..., BarrierReport]) -> None:
    off = measure(points=4)
    assert 0.5 not in off.t and off.routing is not None and {row["t"] for row in off.routing} == set(off.t)
    assert off.references.to_dict() == plain.references.to_dict() and off.references.t == 0.5
    assert off.references.mean.loss("aligned") == pytest.approx(plain.aligned.nll[2], abs=1e-12)


def test_texts_are_reported_by_name_and_on_their_mean(
    plain: BarrierReport, measure: Callable[..., BarrierReport], text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text_file.read_text()[100 * i : 100 * i + 300]}) + "\n" for i in range(1, 4)))
    found = measure(text=[f"prose={text_file}", str(other)])
    assert list(found.references.texts) == ["prose", "other"] and found.subtitle.startswith("prose, other; ")
    sizes = found.evaluation["texts"]
    assert sizes["prose"] == plain.evaluation["texts"][text_file.stem] and sizes["other"]["tokens_scored"] <= 200
    for name in ("a", "b", "aligned", "naive"):
        losses = [on.loss(name) for on in found.references.texts.values()]
        assert losses[0] == pytest.approx(plain.references.mean.loss(name), abs=1e-6)
        assert found.references.mean.loss(name) == pytest.approx(sum(losses) / 2)
    with pytest.raises(InputError, match="the text short holds 1 tokens: nothing to predict"):
        short = tmp_path / "short.txt"
        short.write_text("a")
        measure(text=[text_file, short])


def test_the_intervals_beside_the_maximum_are_halved() -> None:
    assert _beside_the_maximum(BarrierCurve((0.0, 0.5, 1.0), (1.0, 2.0, 1.0))) == [0.25, 0.75]
    assert _beside_the_maximum(BarrierCurve((0.0, 0.25, 0.5, 1.0), (1.0, 1.0, 2.0, 1.0))) == [0.375, 0.75]
    assert _beside_the_maximum(BarrierCurve((0.0, 0.5, 1.0), (1.0, 0.5, 1.0))) == []
    assert _beside_the_maximum(BarrierCurve((0.0, 1.0), (1.0, 2.0))) == []
    assert _beside_the_maximum(BarrierCurve((0.0, 0.5, 1.0), (1.0, float("nan"), 1.0))) == []


def test_a_routing_that_does_not_show_is_said(measure: Callable[..., BarrierReport], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe_lmc.path.routing.ROUTERS", ("elsewhere",))
    with pytest.warns(UserWarning, match="the routing cannot be watched: layer 1"):
        report = measure()
    assert report.routing is None and "layer 1" in report.evaluation["routing_unavailable"]


def test_numbers_out_of_range_are_refused(measure: Callable[..., BarrierReport]) -> None:
    for name in ("layerwise", "refine"):
        with pytest.raises(InputError, match=f"{name} -1: expected at least 0"):
            measure(**{name: -1})
    with pytest.raises(InputError, match="activation-memory 0: expected at least 1"):
        measure(activation_memory=0)


def test_bfloat16_reports_what_relabelling_alone_does(plain: BarrierReport, measure: Callable[..., BarrierReport]) -> None:
    assert plain.relabelling_floor is None
    found = measure(dtype="bfloat16", routing=False)
    assert found.endpoint_change is not None and found.relabelling_floor == abs(found.endpoint_change)
