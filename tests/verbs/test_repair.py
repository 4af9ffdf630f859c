"""Repaired merges from end to end: what is written is what was measured, refused repairs leave the aligned merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import InputError
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.repair import ridge_layer
from hf_moe_lmc.repair.data_free import REPAIRS
from hf_moe_lmc.runtime.notices import NOTES
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.verbs.barrier import barrier, plan_barrier
from hf_moe_lmc.verbs.merge import merge, plan_merge
from hf_moe_lmc.writing import output
from hf_moe_lmc.writing.streams import interpolated, whole
from tests import tiny
from tests.formats.published import numbers
from tests.schemas import check_report

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:outside the MoE blocks", "ignore:.*expect a barrier", "ignore:.*the barrier may be", "ignore:A and B hold"
    ),
    pytest.mark.usefixtures("undrawn"),
]
RUN = {"context": 32, "calibration_tokens": 2500}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "functions.jsonl"
    path.write_text("".join(json.dumps({"text": f"def f{i}(x): return x + {i}"}) + "\n" for i in range(80)))
    return path


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("The expert that answers is the one the router picked. " * 20)
    return path


def content(folder: Path, file: str = "report.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / file).read_text())
    if file == "report.json":
        check_report(found)
    return found


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize(
    ("family", "layout"), [("mixtral", "per-expert"), ("qwen2_moe", "fused"), ("deepseek_v3", "per-expert")]
)
def test_what_is_written_is_what_was_measured(
    saved: Callable[..., Path], tmp_path: Path, prose: Path, family: str, layout: str, name: str
) -> None:
    a, b, t = saved(family, layout, 0), saved(family, "per-expert", 1), [0.3, 1.0]
    merge(a, b, tmp_path / "out", t, repair=name, text=prose, context=32)
    folder = tmp_path / "out" / "t0.3"
    symmetry = ModelSymmetry.load(folder / "alignment")
    model_a, model_b = (read_model(Checkpoint.open(one)) for one in (a, b))
    stream = interpolated(model_a, model_b, symmetry.layers, 0.3, merging=REPAIRS[name])
    for key, tensor in tiny.tensors(folder).items():
        assert torch.equal(tensor, whole(stream, key).to(tensor.dtype)), key
    found = content(folder)
    itself = barrier(folder, folder, tmp_path / "itself", text=prose, context=32, points=2, routing=False)
    assert found["references"]["mean"]["repaired"] == pytest.approx(itself.aligned.nll[0], abs=1e-5)
    assert found["merge"]["path"] == "repaired" and found["repair"]["chosen"] == name and found["repair"]["accepted"]
    assert found["references"]["mean"]["repaired"] != pytest.approx(found["references"]["mean"]["aligned"], abs=1e-4)
    card = (folder / "README.md").read_text()
    assert f"--repair {name}" in card and "## Repair" in card
    # an end of the path is a parent, of which nothing is repaired
    end = content(tmp_path / "out" / "t1")
    assert not end["repair"]["accepted"] and end["merge"]["path"] == "aligned"


@pytest.mark.parametrize("form", ["a", "b", "bf16"])
def test_quantized_outputs_hold_the_repaired_numbers(quantized: Callable[..., Path], tmp_path: Path, form: Any) -> None:
    a, b = quantized("mixtral", 0), quantized("mixtral", 1)
    merge(a, b, tmp_path / "out", 0.25, repair="crossover", format=form)
    symmetry = ModelSymmetry.load(tmp_path / "out" / "alignment")
    model_a, model_b = (read_model(Checkpoint.open(one)) for one in (a, b))
    expected = interpolated(model_a, model_b, symmetry.layers, 0.25, merging=REPAIRS["crossover"])
    straight = interpolated(model_a, model_b, symmetry.layers, 0.25)
    written = numbers(tiny.tensors(tmp_path / "out"))
    experts = [key for key in written if ".experts." in key]
    for key in experts:
        values, found = whole(expected, key).float(), written[key].float()
        if form == "bf16":
            assert torch.equal(found, values.bfloat16().float()), key
        else:
            assert (found - values).norm() < 0.05 * values.norm(), key
            assert (found - whole(straight, key).float()).norm() > 0.2 * values.norm(), key


def test_units_that_both_have_alike_keep_their_bytes(quantized: Callable[..., Path], tmp_path: Path) -> None:
    a = quantized("mixtral", 0)
    merge(a, a, tmp_path / "out", 0.5, repair="crossover", align=False)
    before, after = tiny.tensors(a), tiny.tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(tiny.same_bytes(before[name], after[name]) for name in before)


@pytest.mark.parametrize("t", [0.5, "best"])
def test_a_fitted_merge_is_measured_and_written(
    saved: Callable[..., Path], tmp_path: Path, rows: Path, prose: Path, t: Any
) -> None:
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "fused", 1)
    options: dict[str, Any] = {"text": prose, "points": 3} if t == "best" else {"text": prose}
    merge(a, b, tmp_path / "out", t, repair="ridge", calibration=rows, **RUN, **options)
    found = content(tmp_path / "out")
    record = content(tmp_path / "out", "repair.json")
    assert record == found["repair"] and record["accepted"] and record["chosen"].startswith("ridge (lambda")
    assert len(record["tried"]) == 5 and record["difference"]["interval"][1] < 0
    itself = barrier(tmp_path / "out", tmp_path / "out", tmp_path / "itself", text=prose, context=32, points=2, routing=False)
    assert found["references"]["mean"]["repaired"] == pytest.approx(itself.aligned.nll[0], abs=1e-5)
    merge(a, b, tmp_path / "aligned", found["merge"]["t"])
    one, two = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "aligned")
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved and all("down_proj" in name for name in moved)
    assert str(tmp_path) not in (tmp_path / "out" / "report.json").read_text()


def test_a_refused_repair_leaves_the_aligned_merge(
    saved: Callable[..., Path], tmp_path: Path, prose: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    words = ["merge", str(a), str(b), "--context", "32"]
    assert main([*words[:-2], "-o", str(tmp_path / "aligned")]) == 0
    calibrated = ["--repair", "crossover", "--calibration", str(prose), "--text", str(rows)]
    assert main([*words, "-o", str(tmp_path / "out"), *calibrated]) == 0  # one document: nothing can be decided
    one, two = tiny.tensors(tmp_path / "out"), tiny.tensors(tmp_path / "aligned")
    assert all(tiny.same_bytes(one[name], two[name]) for name in two)
    found = content(tmp_path / "out")
    assert not found["repair"]["accepted"] and found["repair"]["tried"][0]["method"] == "crossover"
    # what is made with the repair is the aligned merge
    for on in (*found["references"]["texts"].values(), found["references"]["mean"]):
        assert on["repaired"] == on["aligned"] != on["naive"]
    assert found["merge"]["path"] == "aligned" == found["verdict"]["merge"]
    printed = capsys.readouterr()
    assert "the aligned merge stays" in printed.err and "repaired" not in printed.out and "--refine" not in printed.err
    sentence = found["repair"]["sentence"]
    card, text = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.md"))
    assert sentence[1:] in card and sentence[1:] in text and "of the straight line" in card and "| repaired" not in card
    assert "Repaired merges:" not in text and "in the plot" not in text


@pytest.mark.parametrize("how", [{"repair": "crossover"}, {"widen": True}])
def test_the_best_point_is_that_of_the_straight_line_and_the_merge_there_is_what_was_asked(
    saved: Callable[..., Path], tmp_path: Path, rows: Path, how: dict[str, Any]
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "fused", 1)
    merge(a, b, tmp_path / "out", "best", text=rows, points=5, context=32, **how)
    found = content(tmp_path / "out")
    word = "widened" if "widen" in how else "repaired"
    assert found["merge"]["path"] == found["verdict"]["merge"] == "repaired" and found["merge"]["t"] == found["references"]["t"]
    assert found["verdict"]["least"]["t"] == found["merge"]["t"] and found["verdict"]["held_out"] is None
    least, of_merge, barriers = found["verdict"]["sentences"]
    assert least.startswith("Least loss on the aligned path") and of_merge.startswith(f"The {word} merge at t = ")
    assert barriers.count(";") == 1 and "naive" in barriers and "aligned" in barriers
    mean = found["references"]["mean"]
    index = found["paths"]["aligned"]["t"].index(found["merge"]["t"])
    assert mean["aligned"] == pytest.approx(found["paths"]["aligned"]["nll"][index]) and mean["repaired"] != mean["aligned"]
    card, text = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.md"))
    assert f"The {word} merge at" in card and "The point t =" not in card and f"| aligned | {word} |" in text
    assert found["repair"]["sentence"][1:] in text
    if word == "widened":
        assert "repaired" not in card and "repaired" not in text


def test_auto_without_text_does_nothing_and_says_so(
    saved: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    NOTES.addHandler(caplog.handler)
    merge(a, b, tmp_path / "auto", repair="auto")
    NOTES.removeHandler(caplog.handler)
    assert "auto has no text to decide on" in caplog.text
    merge(a, b, tmp_path / "aligned")
    one, two = (
        {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        for folder in (tmp_path / "auto", tmp_path / "aligned")
    )
    assert one == two


@pytest.mark.parametrize("t", [0.4, "best"])
@pytest.mark.parametrize("how", ["accepted", "refused", "without text"])
def test_without_alignment_nothing_is_called_aligned(
    saved: Callable[..., Path], tmp_path: Path, prose: Path, rows: Path, capsys: pytest.CaptureFixture[str], how: str, t: Any
) -> None:
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "per-expert", 1)
    # one document decides nothing, so that what is tried on it is refused
    text, calibration = (rows, ["--calibration", str(prose)]) if how == "refused" else (prose, ["--calibration", str(rows)])
    calibrated = [*calibration, "--calibration-tokens", "2500"] if how != "without text" else []
    points = ["--points", "3"] if t == "best" else []
    words = ["merge", str(a), str(b), "-o", str(tmp_path / "out"), "-t", str(t), "--no-align", "--context", "32", *points]
    words += ["--repair", "ridge" if how == "accepted" else "norms", "--text", str(text), *calibrated]
    assert main([*words, "--dry-run"]) == 0 and main(words) == 0
    found = content(tmp_path / "out")
    assert found["repair"]["accepted"] == (how != "refused") and "aligned" not in found["paths"]
    assert ("the naive merge" in found["repair"]["sentence"]) == (how != "without text")
    if how != "without text":
        assert found["repair"]["compared"].keys() == {"naive"}
    if how == "accepted":
        assert found["repair"]["loss"].keys() == {"naive", "repaired"}
    printed = capsys.readouterr()
    assert "this checkpoint  " in printed.out and "loss, " in printed.out and "accuracy, " in printed.out
    files = [(tmp_path / "out" / name).read_text() for name in ("README.md", "report.md", "repair.json")]
    for said in (printed.out, printed.err, *files, json.dumps(found["verdict"]["sentences"])):
        assert "aligned" not in said, said[: said.index("aligned") + 80]


def test_a_stopped_call_does_not_fit_again(
    saved: Callable[..., Path], tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "per-expert", 1)
    arguments: dict[str, Any] = {"repair": "ridge", "calibration": rows, **RUN}
    merge(a, b, tmp_path / "whole", **arguments)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output.FolderWriter, "write_tensors", stopped)
        merge(a, b, tmp_path / "out", **arguments)
    fitted: list[int] = []
    ridge = ridge_layer.ridge
    monkeypatch.setattr(ridge_layer, "ridge", lambda *given, **named: (fitted.append(1), ridge(*given, **named))[1])
    merge(a, b, tmp_path / "out", **arguments)
    assert not fitted
    one, two = tiny.tensors(tmp_path / "whole"), tiny.tensors(tmp_path / "out")
    assert all(tiny.same_bytes(one[name], two[name]) for name in one)
    assert content(tmp_path / "whole", "repair.json") == content(tmp_path / "out", "repair.json")


def test_the_repaired_path_of_barrier_is_that_of_the_merges(saved: Callable[..., Path], tmp_path: Path, rows: Path) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "fused", 1)
    found = barrier(a, b, tmp_path / "path", text=rows, context=32, points=4, repair="norms", routing=False)
    document = content(tmp_path / "path")
    path, aligned = document["paths"]["repaired"], document["paths"]["aligned"]
    assert path["t"] == aligned["t"] and path["nll"][0] == aligned["nll"][0] and path["nll"][-1] == aligned["nll"][-1]
    assert "repaired" not in document["summary"] and found.aligned.barrier == aligned["barrier"]
    assert document["verdict"]["barriers"].keys() == {"aligned", "naive"}
    assert "repaired" not in document["verdict"]["sentences"][-1] and "repaired merges: " in found.table()
    section = found.to_markdown().split("## The barrier")[1].split("## Repair")
    assert "| aligned |" in section[0] and "repaired" not in section[0] and "Repaired merges: " in section[1]
    merge(a, b, tmp_path / "merges", [path["t"][1], 0.5], repair="norms", text=rows, context=32)
    of_merges = [content(folder)["references"]["mean"]["repaired"] for folder in sorted((tmp_path / "merges").iterdir())]
    assert of_merges[0] == pytest.approx(path["nll"][1], rel=1e-6)
    assert of_merges[1] == pytest.approx(document["references"]["mean"]["repaired"], rel=1e-6)


def test_a_fitted_path_has_the_middle_and_the_least_loss(
    saved: Callable[..., Path], tmp_path: Path, rows: Path, prose: Path
) -> None:
    a, b = saved("qwen2_moe", "per-expert", 0), saved("qwen2_moe", "fused", 1)
    barrier(a, b, tmp_path / "path", text=prose, points=9, repair="ridge", calibration=rows, routing=False, **RUN)
    found = content(tmp_path / "path")
    aligned = found["paths"]["aligned"]
    least = aligned["t"][aligned["nll"].index(min(aligned["nll"]))]
    assert {0.0, 0.25, 0.5, 0.75, 1.0, least} == set(found["paths"]["repaired"]["t"])
    assert [path["t"] for path in (aligned, found["paths"]["naive"])] == [[i / 8 for i in range(9)]] * 2
    for name in ("aligned", "naive"):  # each on its own grid, not on that of the few repaired merges
        on_grid = found["verdict"]["barriers"][name]
        assert on_grid["barrier"] == pytest.approx(found["paths"][name]["barrier"])
        assert on_grid["t"] == found["paths"][name]["barrier_t"]
    assert [one["t"] for one in found["repair"]["points"]] == sorted({0.25, 0.5, 0.75, least})
    assert found["repair"]["t"] == 0.5 and found["references"]["mean"]["repaired"] is not None


def test_a_dry_run_says_what_a_repair_takes(saved: Callable[..., Path], tmp_path: Path, rows: Path, prose: Path) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    plan = plan_merge(a, b, tmp_path / "out", repair="auto", calibration=rows, **RUN)
    assert plan.repair is not None and "13 candidates" in plan.repair and "memory for equations" in plan.table()
    without = plan_merge(a, b, tmp_path / "out", repair="norms")
    assert "without text" in (without.repair or "")
    more = plan_merge(a, b, tmp_path / "out", repair="ridge", calibration=rows, context=32, calibration_tokens=20000)
    fewer = plan_merge(a, b, tmp_path / "out", repair="ridge", calibration=rows, context=32, calibration_tokens=500)
    works = [one.peak_memory for one in (without, fewer, more)]
    assert works == sorted(works)
    assert "reads both models 2 times" in plan.repair
    both = sum((folder / "model.safetensors").stat().st_size for folder in (a, b))
    assert plan.bytes_to_read == pytest.approx(4 * both, rel=0.1)  # besides these, once to match and once to write
    assert "without text" in (plan_merge(a, b, tmp_path / "out", repair="norms").repair or "")
    assert "for each of 4 t" in (
        plan_barrier(a, b, tmp_path / "out", text=prose, repair="ridge", calibration=rows, **RUN).repair or ""
    )
    assert plan_merge(a, b, tmp_path / "out").repair is None and not (tmp_path / "out").exists()


def test_only_a_repair_that_nothing_measures_is_said_to_be_unmeasured(
    saved: Callable[..., Path], tmp_path: Path, prose: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    with caplog.at_level("INFO", "hf_moe_lmc"):
        plan_merge(a, b, tmp_path / "out", repair="norms", text=prose)
        plan_barrier(a, b, tmp_path / "out", repair="norms", text=prose)
        assert "nothing says whether" not in caplog.text
        plan_merge(a, b, tmp_path / "out", repair="norms")
    assert "nothing says whether it is better" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repair": "ridge"}, "--repair ridge is fitted on text: give it --calibration TEXT"),
        ({"repair": "regmean"}, "--repair regmean is fitted on text"),
        ({"repair": "best"}, "repair 'best': expected one of none, norms"),
        ({"calibration": "TEXT"}, "--repair is none; give --repair auto, which takes the best repair on"),
        ({"repair": "ridge", "calibration_a": "TEXT"}, "--calibration-a was given without --calibration-b"),
        ({"repair": "ridge", "calibration_b": "TEXT"}, "--calibration-b was given without --calibration-a"),
        (
            {"repair": "ridge", "calibration": "TEXT", "calibration_a": "TEXT", "calibration_b": "TEXT"},
            "--calibration is the text of both models",
        ),
        ({"repair": "norms", "calibration_tokens": 5}, "--calibration-tokens would have no effect"),
        ({"repair": "norms", "context": 32}, "--context would have no effect"),
        ({"repair": "ridge", "calibration": "missing.txt"}, "missing.txt: no such text file"),
        ({"repair": "ridge", "calibration": "TEXT", "calibration_tokens": 20, "context": 32}, "cannot be cut in two"),
        (
            {"repair": "ridge", "calibration": "TEXT", "text": "TEXT", "context": 32},
            "share 12 words in a row with the calibration",
        ),
        ({"repair": "norms", "report": "TEXT"}, "the report is of the straight line"),
    ],
)
def test_what_is_refused_before_anything_is_done(
    saved: Callable[..., Path], tmp_path: Path, prose: Path, arguments: dict[str, Any], message: str
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    given = {name: prose if value == "TEXT" else value for name, value in arguments.items()}
    for verb in (merge, plan_merge):
        with pytest.raises(InputError, match=message):
            verb(a, b, tmp_path / "out", **given)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()
