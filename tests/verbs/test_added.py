"""Ensemble, accuracy and cloze of `barrier` and `merge`, against both parents as transformers runs them by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.references import KINDS, MODELS
from hf_moe_lmc.perplexity.report import BarrierReport
from hf_moe_lmc.verbs.barrier import barrier, plan_barrier
from hf_moe_lmc.verbs.merge import merge
from tests import tiny
from tests.schemas import check_report
from tests.verbs import test_vocabularies as vocabularies

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("undrawn")]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "prose.txt").write_text("".join(f"Expert {i} answers where router {i % 7} picked it. " for i in range(12)))
    (folder / "code.txt").write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(14)))
    return [folder / "prose.txt", folder / "code.txt"]


@pytest.fixture
def pair(request: pytest.FixtureRequest, copy: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path, int]:
    """Two models, and how many ids both have where they differ."""
    if request.param == "grown":
        a = vocabularies.saved(tmp_path / "a", "mixtral", 0, rows=vocabularies.TOKENS)
        return a, vocabularies.saved(tmp_path / "b", "mixtral", 1, rows=272, more=("<pad>",)), vocabularies.TOKENS
    a, b = copy("mixtral", seed=0, name="a"), copy("mixtral", seed=1, name="b")
    if request.param == "top-k":
        tiny.edit_config(b, num_experts_per_tok=3)
    return a, b, 10**6


def logits_of(folder: Path, report: BarrierReport) -> list[torch.Tensor]:
    model = tiny.load(folder)
    with torch.inference_mode():
        return [model(row[None]).logits[0, :-1].double() for row in report.windows.rows]


def expected(report: BarrierReport, a: Path, b: Path, t: float, common: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Loss and accuracy by text and model: both parents and both ensembles."""
    of_a, of_b = logits_of(a, report), logits_of(b, report)
    sums: dict[tuple[str, str], list[float]] = {}
    for one, other, row, text in zip(of_a, of_b, report.windows.rows, report.windows.text_of, strict=True):
        wide = max(one.shape[1], other.shape[1])
        p = [torch.nn.functional.pad(each.softmax(-1), (0, wide - each.shape[1])) for each in (one, other)]
        kinds = {
            "a": p[0],
            "b": p[1],
            "logits": ((1 - t) * one[:, :common] + t * other[:, :common]).softmax(-1),
            "probabilities": (1 - t) * p[0] + t * p[1],
        }
        for kind, mean in kinds.items():
            total = sums.setdefault((text, kind), [0.0, 0.0, 0.0])
            total[0] += float(-mean.gather(1, row[1:, None]).log().sum())
            total[1] += float((mean.argmax(-1) == row[1:]).sum())
            total[2] += len(row) - 1
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for (text, kind), (loss, right, count) in sums.items():
        found.setdefault(text, {})[kind] = loss / count, right / count
    return found


@pytest.mark.parametrize("pair", ["alike", "top-k", "grown"], indirect=True)
@pytest.mark.parametrize("memory", [None, 1])
def test_the_ensemble_is_that_of_the_parents_by_themselves(
    pair: tuple[Path, Path, int], tmp_path: Path, texts: list[Path], memory: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, common = pair
    if memory:
        monkeypatch.setattr("hf_moe_lmc.path.cost.available_memory", lambda: 400_000)
    report = barrier(a, b, tmp_path / "out", text=texts, points=4, context=48, ensemble=True, activation_memory=memory)
    assert report.evaluation["mode"] == ("layers" if memory else "resident")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(content)
    places = {content["references"]["t"]: content["references"], content["verdict"]["t"]: content["verdict"]}
    assert 0.5 in places and content["references"]["t"] == 0.5
    for t, found in places.items():
        wanted = expected(report, a, b, t, common)
        for name, on in found["texts"].items():
            for side in ("a", "b"):
                assert (on[side], on["accuracy"][side]) == pytest.approx(wanted[name][side], abs=1e-5)
            assert on["ensembles"] == pytest.approx({kind: wanted[name][kind][0] for kind in KINDS}, abs=1e-5)
            lower = min(KINDS, key=lambda kind, of=wanted[name]: of[kind][0])
            assert on["ensemble_of"] == lower and on["ensemble"] == on["ensembles"][lower]
            assert on["accuracy"]["ensemble"] == pytest.approx(wanted[name][lower][1])
            assert on["differences"]["ensemble"]["a"]["value"] == pytest.approx(on["ensemble"] - on["a"])
            assert on["differences"]["ensemble"]["a"]["interval"] is not None
        for model in (*MODELS, "parents"):
            values = [on[model] for on in found["texts"].values()]
            assert found["mean"][model] == (None if None in values else pytest.approx(sum(values) / 2))
    assert {(one["t"], one["of"]) for one in content["ensembles"]} == {(t, kind) for t in places for kind in KINDS}
    shown = report.table()
    assert "ensemble: mean of " in shown and "weights" in shown and "ensemble: mean of" not in report_without(report).table()


def report_without(report: BarrierReport) -> BarrierReport:
    from dataclasses import replace

    return replace(report, added={})


@pytest.mark.parametrize("pair", ["alike"], indirect=True)
def test_a_merge_has_its_own_weights(pair: tuple[Path, Path, int], tmp_path: Path, texts: list[Path]) -> None:
    a, b, common = pair
    options: dict[str, Any] = {"text": texts, "context": 48, "ensemble": True, "cloze": 6}
    at_once = barrier(a, b, tmp_path / "barrier", points=2, text=texts, context=48)
    merge(a, b, tmp_path / "out", (0.3, 0.8), **options)
    merge(a, b, tmp_path / "best", "best", points=4, align=False, **options)
    for folder, t in ((tmp_path / "out" / "t0.3", 0.3), (tmp_path / "out" / "t0.8", 0.8), (tmp_path / "best", None)):
        content = json.loads((folder / "report.json").read_text())
        check_report(content)
        at = content["merge"]["t"]
        assert t in (None, at) and {one["t"] for one in content["ensembles"]} == {at} == {content["references"]["t"]}
        wanted = expected(at_once, a, b, at, common)
        for name, on in content["references"]["texts"].items():
            assert on["ensembles"] == pytest.approx({kind: wanted[name][kind][0] for kind in KINDS}, abs=1e-5)
            merged = {"naive", "ensemble"} | ({"aligned"} if t else set())
            assert {model for model, share in on["cloze"].items() if share is not None} >= merged | {"a", "b"}
        assert f"weights {1 - at:.3g} of A" in (folder / "report.md").read_text() or at == 0.5


@pytest.mark.parametrize("pair", ["alike", "top-k"], indirect=True)
def test_cloze_answers_are_those_of_the_models_that_were_asked(
    pair: tuple[Path, Path, int], tmp_path: Path, texts: list[Path]
) -> None:
    a, b, _ = pair
    report = barrier(a, b, tmp_path / "out", text=texts, points=3, context=48, cloze=7, ensemble=True)
    assert report.questions is not None
    rows, owners = report.questions.rows, report.questions.windows.text_of
    right: dict[str, list[bool]] = {}
    for side, folder in (("a", a), ("b", b)):
        model = tiny.load(folder)
        with torch.inference_mode():
            logs = [model(row[None]).logits[0, :-1].double().log_softmax(-1).gather(1, row[1:, None])[-8:] for row in rows.rows]
        sums = [float(each.sum()) for each in logs]
        right[side] = [sums[i] > max(sums[i + 1 : i + 4]) for i in range(0, len(sums), 4)]
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    for name, on in content["references"]["texts"].items():
        for side in ("a", "b"):
            own = [value for value, owner in zip(right[side], owners, strict=True) if owner == name]
            assert on["cloze"][side] == pytest.approx(sum(own) / len(own)) and len(own) == 7
        assert all(on["cloze"][model] is not None for model in ("naive", "aligned", "ensemble"))
        assert on["cloze"]["differences"]["aligned"]["better"]["interval"] is not None
    assert content["cloze"] == {"questions": {"prose": 7, "code": 7}, "choices": 4, "beginning": 8, "continuation": 8}


@pytest.mark.parametrize("pair", ["alike"], indirect=True)
@pytest.mark.parametrize("how", ["crossover", "refused", "widened", "bfloat16"])
def test_cloze_of_a_merge_that_left_the_straight_line_is_that_of_what_was_written(
    pair: tuple[Path, Path, int], tmp_path: Path, texts: list[Path], how: str
) -> None:
    a, b, _ = pair
    asked: dict[str, Any] = {"repair": "crossover"}
    if how == "refused":  # one document of calibration text: nothing can be decided
        (tmp_path / "calibration.txt").write_text("Whatever is written here says little of the rest. " * 20)
        asked |= {"repair": "norms", "calibration": tmp_path / "calibration.txt"}
    if how == "widened":
        asked = {"widen": True}
    if how == "bfloat16":
        for folder in (a, b):
            tiny.edit(folder, lambda content: content.update({name: one.bfloat16() for name, one in content.items()}))
    options: dict[str, Any] = {"text": texts, "context": 48, "cloze": 9, "ensemble": True}
    merge(a, b, tmp_path / "out", 0.3, **asked, **options)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(content)
    folder = tmp_path / "out"
    itself = barrier(folder, folder, tmp_path / "itself", points=2, routing=False, **options).to_dict()["references"]
    for name, on in (*content["references"]["texts"].items(), ("mean", content["references"]["mean"])):
        of_folder = itself["mean"] if name == "mean" else itself["texts"][name]
        assert on["cloze"]["repaired"] == pytest.approx(of_folder["cloze"]["a"])
        assert on["cloze"]["differences"]["repaired"]["better"]["interval"] is not None
    if how == "refused":
        assert content["references"]["mean"]["cloze"]["repaired"] == content["references"]["mean"]["cloze"]["aligned"]
    else:
        assert content["verdict"]["mean"]["cloze"]["repaired"] is not None
        rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| cloze, ")]
        assert len(rows) == 3 and "|  |" not in "".join(rows)


@pytest.mark.parametrize("pair", ["alike"], indirect=True)
@pytest.mark.parametrize("points", [4, 5])
def test_every_table_of_a_repaired_path_has_the_same_models(
    pair: tuple[Path, Path, int], tmp_path: Path, texts: list[Path], points: int
) -> None:
    a, b, _ = pair
    options: dict[str, Any] = {"text": texts, "context": 48, "points": points, "ensemble": True, "cloze": 6}
    report = barrier(a, b, tmp_path / "out", repair="norms", **options)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report(content)
    for found in (content["references"], content["verdict"]):
        for on in (*found["texts"].values(), found["mean"]):
            for figures in (on, on["accuracy"], on["cloze"]):
                assert all(figures[model] is not None for model in MODELS), found["t"]
    heads = [line for line in report.to_markdown().splitlines() if line.startswith("| text |")]
    assert len(heads) == (2 if content["verdict"]["t"] == 0.5 else 4)
    assert all(head.endswith("| naive | aligned | repaired | ensemble |") for head in heads)


@pytest.mark.parametrize("pair", ["alike"], indirect=True)
def test_what_is_refused_and_what_a_plan_counts(pair: tuple[Path, Path, int], tmp_path: Path, texts: list[Path]) -> None:
    a, b, _ = pair
    short = tmp_path / "short.txt"
    short.write_text("Too little text for four questions.")
    with pytest.raises(InputError, match=r"the text short gives no cloze task: it takes 4 pieces of 16 tokens"):
        plan_barrier(a, b, tmp_path / "out", text=short, cloze=5)
    with pytest.raises(InputError, match="cloze 0: expected at least 1"):
        plan_barrier(a, b, tmp_path / "out", text=texts, cloze=0)
    with pytest.raises(InputError, match="--ensemble and --cloze would have no effect: nothing is measured"):
        merge(a, b, tmp_path / "out", ensemble=True, cloze=5)
    plain = plan_barrier(a, b, tmp_path / "out", text=texts)
    more = plan_barrier(a, b, tmp_path / "out", text=texts, ensemble=True)
    assert more.bytes_to_read - plain.bytes_to_read == pytest.approx(plain.bytes_to_read / 2)  # matched, measured; once more
