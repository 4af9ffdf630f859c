"""A whole run at a tiny size: what it leaves, that it goes on, that equal seeds give equal results, and what it proves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import prose
from tests.scripts import script


@pytest.fixture(scope="module")
def results(reproduce: dict[str, ModuleType], place: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a run of the settings behind every table, few of each."""
    output = tmp_path_factory.mktemp("json") / "reproduction.json"
    wanted = ("digits-paper-dense-n4-L4", "docs-paper-shared-n4-L4-at0_1_2_3", "qwen2_moe", "deepseek_v3")
    for only in (*wanted, "L12-at7", "L2-at0", "sparse-n2"):
        assert reproduce["__main__"].carry_out(place, 1, output, only) == 0
    reproduce["__main__"].carry_out(replace(place, deadline=0.0), 1, output)  # all that there is, and nothing new
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_each_table_has_its_settings(reproduce: dict[str, ModuleType]) -> None:
    settings = reproduce["settings"]
    for run in (settings.QUICK, settings.FULL, settings.FULL_GPU):
        tables = settings.in_tables(run)
        every = settings.all_settings(run)
        assert {name for names in tables.values() for name in names} == set(every)
        gatings = {(one.data, one.gating, one.place) for one in settings.places(run)}
        assert len(gatings) == 3 * 3 * len((*run.text, *run.vision))
        assert {one.experts for one in settings.sweep(run)} == {2, 4, 6, 8, 16}
        assert {(one.layers, one.moe) for one in settings.depths(run)} >= {(n, (i,)) for n in (2, 4, 6) for i in range(n)}
        assert {one.moe[0] + 1 for one in settings.ranks(run)} == {1, 4, 8, 12}
        assert {one.kind for one in settings.classes(run)} == {"mixtral_dense", "mixtral", "qwen2_moe", "deepseek_v3"}
    assert settings.QUICK.seeds == (1, 2) and settings.FULL.seeds == (1, 2, 3)


def test_a_run_leaves_barriers_and_areas_of_loss_and_accuracy(results: dict[str, Any]) -> None:
    cell = results["cells"]["digits-paper-dense-n4-L4-at0"]
    (pair,) = cell["pairs"]
    assert set(pair["paths"]) == {"naive", "gate", "expert", "default", "order_skipped"}
    for path in pair["paths"].values():
        assert len(path["loss"]) == len(path["accuracy"]) == 25 and path["loss_barrier"] >= 0 <= path["accuracy_barrier"]
        assert path["loss"][0] == pair["paths"]["naive"]["loss"][0]  # A is where it was
        assert abs(path["loss"][-1] - pair["paths"]["naive"]["loss"][-1]) < 1e-4  # B' computes what B does
    assert len(pair["paths"]["naive"]["loss"]) == 25 and results["missing"]


def test_every_order_is_measured_where_the_rank_is_asked_for(results: dict[str, Any], reproduce: dict[str, ModuleType]) -> None:
    cell = results["cells"]["digits-paper-dense-n4-L12-at7"]
    (pair,) = cell["pairs"]
    assert len(pair["orders"]) == 24
    for method in ("gate", "expert"):
        (order,) = pair["chosen"][method].values()
        same = pair["orders"][" ".join(map(str, order))]
        assert same == pytest.approx(pair["paths"][method]["loss_barrier"], abs=1e-7)  # stage 2 of the package, twice
        rank, *_ = reproduce["tables"].ranks_of(cell, method)[0]
        assert 1 <= rank <= 24


def test_claims_hold_and_controls_fail(results: dict[str, Any]) -> None:
    assert len(results["claims"]) == 4
    for name, found in results["claims"].items():
        assert max(map(abs, found["claims"].values())) < 2e-6, name
        assert min(map(abs, found["controls"].values())) > 2e-5, name
        is_softmax = found["router"] == "softmax"
        assert ("all router rows translated" in found["claims"]) == is_softmax
        assert ("all router rows translated" in found["controls"]) != is_softmax
        if is_softmax:
            assert found["barrier"]["largest_difference_on_the_curve"] < 2e-6
    assert "deepseek_v3" in {found["kind"] for found in results["claims"].values()}
    top_1 = results["claims"]["digits-paper-dense-n4-L4-at0_1_2_3"]["top_1"]
    assert top_1["k = 1, scores times 3"] == 0 and abs(top_1["k = 1, scores times -3"]) > 1e-5 < abs(
        top_1["k = 4, scores times 3"]
    )


def test_a_stopped_run_goes_on(
    results: dict[str, Any], reproduce: dict[str, ModuleType], place: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = reproduce["__main__"]
    done: list[str] = []
    real = main.in_process
    monkeypatch.setattr(main, "in_process", lambda where, task: (done.append(task.makes.name), real(where, task))[1])
    one = place.cell("digits-paper-dense-n4-L4-at0")
    before = json.loads(one.read_text())
    one.unlink()
    model = place.model("digits-paper-dense-n4-L4-at0-s2")
    weights = (model / "model.safetensors").read_bytes()
    for file in model.iterdir():
        file.unlink()
    model.rmdir()
    stopped = replace(place, deadline=0.0)
    assert main.carry_out(stopped, 1, tmp_path / "out.json", "digits-paper-dense-n4-L4-at0") == 3 and not done
    assert main.carry_out(place, 1, tmp_path / "out.json", "digits-paper-dense-n4-L4-at0") == 0
    assert sorted(done) == sorted([model.name, one.name])
    assert (model / "model.safetensors").read_bytes() == weights  # by seed
    assert json.loads(one.read_text())["pairs"] == before["pairs"]


def test_a_task_that_fails_leaves_the_others(
    results: dict[str, Any],
    reproduce: dict[str, ModuleType],
    place: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main, real = reproduce["__main__"], reproduce["__main__"].in_process
    cell = place.cell("digits-paper-dense-n4-L4-at0")
    cell.unlink()
    claims = place.cell("claims-digits-paper-dense-n4-L4-at0_1_2_3")
    claims.unlink()

    def failing(where: Any, task: Any) -> float:
        if task.kind == "claims":
            raise RuntimeError("no such gate")
        return float(real(where, task))

    monkeypatch.setattr(main, "in_process", failing)
    assert main.carry_out(place, 1, tmp_path / "out.json", "digits-paper-dense-n4-L4-at0") == 3
    assert cell.exists() and not claims.exists() and "no such gate" in capsys.readouterr().err


def test_time_that_runs_out_within_a_task_keeps_nothing_of_it(reproduce: dict[str, ModuleType], place: Any) -> None:
    training, work = reproduce["training"], reproduce["work"]
    setting = next(reproduce["settings"].places(place.run))
    plan = work.tasks(place, {setting.name: setting}, {}, set())
    task = next(task for task in plan if task.kind == "block")
    late = replace(place, deadline=0.0, root=place.root)
    if task.makes.exists():
        pytest.skip("trained before")
    base = next(task for task in plan if task.kind == "base")
    if not base.makes.exists():
        work.do(place, base)
    with pytest.raises(training.OutOfTime):
        work.do(late, task)
    assert not task.makes.exists()


def test_a_folder_of_another_run_is_refused(reproduce: dict[str, ModuleType], place: Any, results: dict[str, Any]) -> None:
    other = replace(place, run=replace(place.run, test_tokens=1))
    with pytest.raises(SystemExit, match="another test_tokens"):
        reproduce["__main__"].check_run(other)


def test_everything_outside_of_the_block_is_frozen(
    reproduce: dict[str, ModuleType], place: Any, results: dict[str, Any]
) -> None:
    one, other = (place.model(f"digits-paper-dense-n4-L4-at0-s{seed}") for seed in (1, 2))
    with reproduce["paths"].opened(one, other, "cpu") as pair:
        assert pair.trained == (0,) and all(name.startswith("model.layers.0.mlp.") for name in pair.differing)
        base = reproduce["paths"].load(place.model("base-digits-paper-L4")).state_dict()
        for name, value in reproduce["paths"].tensors(pair.a).items():
            assert name in pair.differing or torch.equal(value, base[name])


def test_the_page_of_a_run(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    render = script("render_reproduction")
    monkeypatch.setattr(render, "read", lambda name: results)
    page = render.markdown()
    for words in (
        "Tables 1 and 5",
        "Table 2",
        "Table 10",
        "Tables 3 and 11 to 13",
        "2.5, 2.12 %",
        "| digits | dense | first |",
    ):
        assert words in page or words == "2.5, 2.12 %", words
    assert "settings are missing" in page
    assert [sentence for sentence in prose.sentences(page) if prose.words(sentence) > 25] == []
    render.draw(render.Results(results), "digits", tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size < 300_000
