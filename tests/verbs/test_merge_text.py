"""A merge that is measured: at the t that was given, or where the loss is least; and the card with an earlier report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.matching import alignment
from hf_moe_lmc.path.evaluation import Evaluator
from hf_moe_lmc.perplexity.references import MODELS
from hf_moe_lmc.publishing.finished import finished
from hf_moe_lmc.verbs.align import align
from hf_moe_lmc.verbs.barrier import barrier
from hf_moe_lmc.verbs.merge import merge, plan_merge
from hf_moe_lmc.writing import output
from tests import tiny
from tests.interpreter import Interpreter
from tests.runtime.test_processes import contents
from tests.schemas import check_report

pytestmark = [
    pytest.mark.filterwarnings("ignore:outside the MoE blocks", "ignore:.*the barrier may be higher", "ignore:continuing"),
    pytest.mark.usefixtures("undrawn"),
]
MEASURED = ("references", "verdict", "merge")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "prose.txt").write_text("The expert that answers is the one the router picked. " * 6)
    (folder / "code.txt").write_text("def f(x):\n    return x + 1\n" * 8)
    return [folder / "prose.txt", folder / "code.txt"]


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "report.json").read_text())
    check_report(found)
    return found  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(("family", "align"), [("mixtral", True), ("qwen2_moe", False), ("deepseek_v3", True)])
def test_the_best_point_is_that_of_the_least_loss_on_the_mean_of_the_texts(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], family: str, align: bool
) -> None:
    a, b = saved(family, "per-expert", 0), saved(family, "fused", 1)
    merge(a, b, tmp_path / "best", "best", text=texts, points=6, align=align)
    found, path = report(tmp_path / "best"), "aligned" if align else "naive"
    assert found["paths"].keys() == ({"aligned", "naive"} if align else {"naive"})
    curve, owners, tokens = found["paths"][path], found["windows"]["text"], found["windows"]["tokens"]
    means = []
    for losses in curve["window_nll"]:
        of_texts = []
        for name in ("prose", "code"):
            own = [i for i, owner in enumerate(owners) if owner == name]
            of_texts.append(sum(losses[i] * tokens[i] for i in own) / sum(tokens[i] for i in own))
        means.append(sum(of_texts) / 2)
    best = curve["t"][means.index(min(means))]
    assert found["merge"] == {"t": best, "path": path, "chosen": True} and 0 < best < 1
    assert found["references"]["t"] == best and found["verdict"]["least"]["t"] == best
    assert found["references"]["mean"][path] == pytest.approx(min(means))
    merge(a, b, tmp_path / "given", best, align=align)
    assert weights(tmp_path / "best") == weights(tmp_path / "given")
    card = (tmp_path / "best" / "README.md").read_text()
    assert "![Loss along the path from A to B](barrier.png)" in card and found["verdict"]["sentences"][0] in card
    assert (tmp_path / "best" / "report.md").exists() and finished(tmp_path / "best").kind == "checkpoint"
    assert str(tmp_path) not in (tmp_path / "best" / "report.json").read_text()


def test_each_given_point_is_measured_beside_its_parents(saved: Callable[..., Path], tmp_path: Path, texts: list[Path]) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    t = (0.25, 0.6)
    merge(a, b, tmp_path / "out", t, text={"novel": texts[0], "code": texts[1]})
    whole = barrier(a, b, tmp_path / "whole", text=texts, points=21)
    for one in t:
        found = report(tmp_path / "out" / f"t{one:g}")
        assert found["merge"] == {"t": one, "path": "aligned", "chosen": False}
        references = found["references"]
        assert references["t"] == one == found["verdict"]["t"] and references["texts"].keys() == {"novel", "code"}
        index = whole.t.index(one)
        for name, of_barrier in (("novel", "prose"), ("code", "code")):
            own = torch.tensor([owner == of_barrier for owner in whole.windows.text_of])
            on = references["texts"][name]
            assert on.keys() >= set(MODELS) and on["repaired"] is None and on["ensemble"] is None
            for model, losses in {
                "a": whole.losses["aligned"][0],
                "b": whole.losses["naive"][-1],
                **{path: whole.losses[path][index] for path in ("naive", "aligned")},
            }.items():
                assert on[model] == pytest.approx(float(losses[own].sum() / whole.windows.scored[own].sum()), abs=1e-5)
        for model in ("a", "b", "naive", "aligned"):
            mean = sum(references["texts"][name][model] for name in ("novel", "code")) / 2
            assert references["mean"][model] == pytest.approx(mean)
        assert found["verdict"]["least"] is None and not found["warnings"]
        merge(a, b, tmp_path / f"{one}", one)
        assert weights(tmp_path / "out" / f"t{one:g}") == weights(tmp_path / f"{one}")
    assert not (tmp_path / "out" / "report.json").exists()


def test_the_matching_is_done_once_and_the_best_end_is_a_parent_and_said(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """B is A with its head scaled to nonsense, so that no loss is below A's."""
    a = saved("mixtral")
    b = Path(shutil.copytree(a, tmp_path / "b"))
    tiny.edit(b, lambda content: content["lm_head.weight"].mul_(-20))
    matched: list[object] = []
    match = alignment.match_layer
    monkeypatch.setattr(alignment, "match_layer", lambda *given, **named: (matched.append(given), match(*given, **named))[1])
    with pytest.warns(UserWarning, match="the best t is 0, an end of the path: no merge has a lower loss on this text than A"):
        merge(a, b, tmp_path / "out", "best", text=texts, points=3)
    assert len(matched) == 3
    found = report(tmp_path / "out")
    assert found["merge"]["t"] == found["references"]["t"] == 0 and found["references"]["mean"]["aligned"] == pytest.approx(
        found["references"]["mean"]["a"]
    )
    assert found["verdict"]["standing"] == "parent" and found["verdict"]["sentences"][1].startswith(
        "The merge at t = 0 is A itself. On the mean of the texts, no merge on the path is below A: the best one, at t = 0.5, "
    )
    of_a, written = tiny.tensors(a), tiny.tensors(tmp_path / "out")
    assert all(tiny.same_bytes(of_a[name], written[name]) for name in of_a)


@pytest.mark.parametrize("stage", ["matched", "measured", "written"])
def test_a_stopped_call_goes_on_from_where_it_was(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    arguments: dict[str, Any] = {"text": texts, "points": 3}
    (tmp_path / "whole").mkdir()
    merge(a, b, tmp_path / "whole" / "out", "best", **arguments)

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    done: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stage == "matched":
            patch.setattr(Evaluator, "score", stopped)
        else:
            patch.setattr(output.FolderWriter, "write_tensors" if stage == "measured" else "publish", stopped)
        merge(a, b, tmp_path / "out", "best", **arguments)
    assert not (tmp_path / "out").exists()
    match, write = alignment.match_layer, output.ShardFile.begin
    monkeypatch.setattr(alignment, "match_layer", lambda *g, **n: (done.append("matching"), match(*g, **n))[1])
    monkeypatch.setattr(output.ShardFile, "begin", lambda self: (done.append("writing"), write(self))[1])
    merge(a, b, tmp_path / "out", "best", **arguments)
    assert done == ([] if stage == "written" else ["writing"])
    one, two = contents(tmp_path / "whole" / "out"), contents(tmp_path / "out")
    assert one == two


def test_what_another_text_left_does_not_come_into_the_output(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(output.FolderWriter, "publish", stopped)
        merge(a, b, tmp_path / "out", text=texts)
    merge(a, b, tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists() and not (tmp_path / "out" / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": "best"}, "t = best is found by measuring: give it a text"),
        ({"context": 32}, "--context would have no effect: nothing is measured"),
        ({"points": 5}, "--points would have no effect: nothing is measured"),
        ({"dtype": "bfloat16", "column": "text"}, "--column and --dtype would have no effect"),
        ({"text": "TEXT", "points": 5}, "--points would have no effect: t is given"),
        ({"text": "TEXT", "t": "best", "points": 1}, "points 1: expected at least 2"),
        ({"text": "TEXT", "report": "DIR"}, "a report was given, and a text to measure on; choose one"),
        ({"text": "TEXT", "device": "nonsense"}, "device 'nonsense' cannot be used here"),
        ({"text": "missing.txt"}, "missing.txt: no such text file"),
        ({"report": "DIR"}, r"DIR: holds no report\.json"),
    ],
)
def test_what_is_refused_before_anything_is_done(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], arguments: dict[str, Any], message: str
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    given = {name: texts[0] if value == "TEXT" else value for name, value in arguments.items()}
    for verb in (merge, plan_merge):
        with pytest.raises(InputError, match=message):
            verb(a, b, tmp_path / "out", **given)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_counts_what_is_measured(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    with Checkpoint.open(a) as of_a, Checkpoint.open(b) as of_b:
        both = of_a.nbytes + of_b.nbytes
    best = plan_merge(a, b, tmp_path / "out", "best", text=texts, points=5)
    given = plan_merge(a, b, tmp_path / "out", (0.3, 0.7), text=texts)
    assert (best.points, given.points) == (1 + 2 * 4, 1 + 2 * 3)
    assert best.bytes_to_read == given.bytes_to_read == 3 * both  # matched, measured, written
    assert given.bytes_to_write == 2 * best.bytes_to_write > 0
    call = ["merge", str(a), str(b), "-o", str(tmp_path / "out"), "--text", str(texts[0]), "-t", "best", "--dry-run"]
    assert main(call) == 0
    assert "49 points with" in capsys.readouterr().out
    call = ["barrier", *call[1:7], "--refine", "2", "--dry-run"]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "once, and up to 2 times more to refine" in shown and "tensors" not in shown and "a few MB" in shown
    assert not list(tmp_path.iterdir())


def test_an_earlier_report_goes_into_the_card(saved: Callable[..., Path], tmp_path: Path, texts: list[Path]) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    measured = barrier(a, b, tmp_path / "barrier", text=texts, points=5)
    (tmp_path / "barrier" / "barrier.png").write_bytes(b"a picture")  # which tests leave out
    at = measured.t.index(0.25)
    for name, options, path in (("aligned", {}, "aligned"), ("plain", {"align": False}, "naive")):
        merge(a, b, tmp_path / name, (0.25, 0.4), report=tmp_path / "barrier", **options)
        for folder in ("t0.25", "t0.4"):
            assert (tmp_path / name / folder / "barrier.png").read_bytes() == b"a picture"
        card, off_the_grid = ((tmp_path / name / folder / "README.md").read_text() for folder in ("t0.25", "t0.4"))
        assert measured.verdict.sentences[0] in card and "](barrier.png)" in card
        assert f"| this checkpoint | {measured.curve(path).nll[at]:.4f} |" in card
        assert "this checkpoint |" not in off_the_grid and measured.verdict.sentences[0] in off_the_grid
    with pytest.warns(UserWarning, match="B was aligned in another way there"):
        merge(a, b, tmp_path / "other", 0.25, report=tmp_path / "barrier", units="plain")
    assert "this checkpoint |" not in (tmp_path / "other" / "README.md").read_text()


def test_a_report_of_others_is_refused(saved: Callable[..., Path], tmp_path: Path, texts: list[Path]) -> None:
    a, b, c = (saved("mixtral", "per-expert", seed) for seed in range(3))
    barrier(a, b, tmp_path / "barrier", text=texts, points=2)
    (tmp_path / "barrier" / "barrier.png").touch()
    for pair, message in (((b, a), "exchange A and B"), ((a, c), "measure these two")):
        for options in ({}, {"align": False}):
            for verb in (merge, plan_merge):
                with pytest.raises(InputError, match=f"its report is of A and B = .* and this merge is of .*{message}"):
                    verb(*pair, tmp_path / "out", report=tmp_path / "barrier", **options)  # type: ignore[operator]
    path = tmp_path / "barrier" / "report.json"
    content = json.loads(path.read_text())
    for spoil, message in (
        (lambda: content["evaluation"].pop("text"), r"evaluation\.text\.kind is missing"),
        (lambda: content.update(a=3), r"a\.fingerprint is missing"),
    ):
        spoil()
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            merge(a, b, tmp_path / "out", report=tmp_path / "barrier")
    path.write_text("[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        merge(a, b, tmp_path / "out", report=tmp_path / "barrier")
    assert not (tmp_path / "out").exists()


def test_a_saved_symmetry_is_measured_and_written(saved: Callable[..., Path], tmp_path: Path, texts: list[Path]) -> None:
    a, b = saved("mixtral", "per-expert", 0), saved("mixtral", "per-expert", 1)
    align(a, b, tmp_path / "g", symmetry_only=True)
    merge(a, b, tmp_path / "given", "best", text=texts, points=3, symmetry=tmp_path / "g")
    merge(a, b, tmp_path / "matched", "best", text=texts, points=3)
    assert weights(tmp_path / "given") == weights(tmp_path / "matched")
    one, two = report(tmp_path / "given"), report(tmp_path / "matched")
    assert all(one[key] == two[key] for key in MEASURED) and one["matching"]["symmetry"] == "g"


@pytest.mark.filterwarnings("ignore:the two paths end in one model")
def test_ends_that_disagree_are_a_failure_of_barrier_and_merge_alike(
    saved: Callable[..., Path],
    tmp_path: Path,
    texts: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As if the aligned B were another model than B. The output is there all the same, to be looked at."""
    call = [str(saved("mixtral", "per-expert", seed)) for seed in (0, 1)] + ["--text", str(texts[0])]
    for tolerance, code in ((-1.0, 1), (1.0, 0)):  # the second: the control
        monkeypatch.setattr("hf_moe_lmc.perplexity.report.TOLERANCE", tolerance)
        for verb, *options in (("barrier", "--points", "3"), ("merge", "-t", "0.3")):
            out = tmp_path / f"{verb} {options[1]} {code}"
            assert main([verb, *call, *options, "-o", str(out)]) == code
            said, found = capsys.readouterr().out.splitlines(), report(out)
            assert said[0].startswith("Not to be relied on: the two paths end in one model") == bool(code)
            assert bool(found["disagreement"]) == bool(code) and ("not rely on this report" in said[0]) == bool(code)
            assert ("nor on the merge" in said[0]) == (bool(code) and verb == "merge")
            card = (out / ("README.md" if verb == "merge" else "report.md")).read_text()
            assert ("**Not to be relied on" in card) == bool(code)


def test_two_processes_choose_and_write_what_one_does(
    saved: Callable[..., Path], tmp_path: Path, texts: list[Path], interpreter: Interpreter, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved("qwen3_moe"), saved("qwen3_moe", "fused", 1)
    code = "import sys; from hf_moe_lmc.perplexity.report import BarrierReport; BarrierReport.plot = lambda *_: None\n"
    code += "from hf_moe_lmc.cli import main; sys.exit(main(sys.argv[1:]))"
    call = ["merge", a, b, "-t", "best", "--points", "3", "--text", texts[0], "--context", "48", "--batch-size", "2", "-o"]
    (tmp_path / "two").mkdir()
    done = interpreter.together(2, code, *call, tmp_path / "two" / "out")
    assert done.codes == (0, 0), done.errors
    assert main([*map(str, call), str(tmp_path / "out")]) == 0
    assert "Least loss on the aligned path" in capsys.readouterr().out and "Least loss on the aligned path" in done.output
    assert weights(tmp_path / "out") == weights(tmp_path / "two" / "out")
    one, two = report(tmp_path / "out"), report(tmp_path / "two" / "out")
    assert all(one[key] == two[key] for key in MEASURED)
