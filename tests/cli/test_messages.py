"""What goes where: one result on stdout, in words or as JSON; progress, notes and complaints on stderr, as far as asked for."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.cli.parser import VERBS
from hf_moe_lmc.proof.verdict import Check, SelfTest
from hf_moe_lmc.publishing.push import Published
from hf_moe_lmc.runtime.notices import note, warn
from hf_moe_lmc.verbs.inspect import inspect
from tests.perplexity.reports import on_documents
from tests.schemas import FAMILIES, INSPECTION, PLAN, SELFTEST, check, check_alignment, check_report

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(arguments) -> exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def document(run: Run, *arguments: object, code: int = 0) -> Any:
    """The one JSON document that a call prints."""
    found, out, _ = run(*arguments, "--json")
    assert found == code
    return json.loads(out)


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
def test_each_verb_that_computes_prints_one_document(
    saved: Callable[..., Path], run: Run, tmp_path: Path, text_file: Path
) -> None:
    a, b, out = saved("olmoe"), saved("olmoe", "fused", 1), tmp_path
    inspected = document(run, "inspect", a)
    check(inspected, INSPECTION)
    assert inspected == json.loads(json.dumps(inspect(a).to_dict()))
    tested = document(run, "selftest", a)
    check(tested, SELFTEST)
    assert tested["passed"]
    check(document(run, "families"), FAMILIES)
    aligned = document(run, "align", a, b, "-o", out / "aligned")
    check_alignment(aligned)
    assert aligned == json.loads((out / "aligned/alignment/alignment.json").read_text())
    assert document(run, "apply", out / "aligned", b, "-o", out / "applied") == {"output": str(out / "applied")}
    report = document(run, "barrier", a, b, "-o", out / "barrier", "--text", text_file, "--points", 3)
    check_report(report)
    assert report == json.loads((out / "barrier/report.json").read_text())
    merged = document(run, "merge", a, b, "-o", out / "merged")
    check_alignment(merged["alignment"])
    assert merged["output"] == str(out / "merged")
    assert document(run, "merge", a, b, "-o", out / "plain", "--no-align") == {"output": str(out / "plain"), "alignment": None}
    for verb in ("align", "merge"):
        plan = document(run, verb, a, b, "-o", out / "planned", "--dry-run")
        check(plan, PLAN)
        assert plan["verb"] == verb and plan["problem"] is None and not (out / "planned").exists()


def test_so_do_the_others(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def demo(output: Path, *, tell: Callable[[str], None]) -> dict[str, Any]:
        tell("training")
        return {"independent": on_documents().to_dict()}

    published = Published("me/x", "https://hub/commit/1", changed=True)
    monkeypatch.setattr("hf_moe_lmc.publishing.push.push", lambda *_, **__: published)
    monkeypatch.setattr("hf_moe_lmc.example.demo.demo", demo)
    assert document(run, "push", tmp_path, "me/x") == {"url": "https://hub/commit/1", "changed": True}
    check_report(document(run, "demo", "-o", tmp_path / "demo")["independent"])
    assert document(run, "completion", "fish").keys() == {"shell", "script"}
    assert run("demo", "-o", "d") == (0, "training\nwritten: d\n", "")
    assert run("demo", "-o", "d", "--json")[2] == "training\n"
    assert run("demo", "-o", "d", "--quiet") == (0, "written: d\n", "")


def test_every_verb_takes_both_options(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = capsys.readouterr().out
        assert "--json" in shown and "--quiet" in shown


def test_what_is_not_finite_is_null(run: Run, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SelfTest("olmoe", "olmoe", (Check("expert order", float("nan"), False),))
    monkeypatch.setattr("hf_moe_lmc.proof.checks.prove", lambda *_: failed)
    assert document(run, "selftest", saved("olmoe"), code=1)["checks"][0]["difference"] is None


@pytest.fixture
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that says all that can be said; `inspect` stands for any."""

    def inspected(model: str) -> Any:
        sys.stdout.write("a library prints\n")
        note("continuing: half of it was done")
        warn("mind this")
        return type("Found", (), {"table": lambda _: "the result", "to_dict": lambda _: {"model": model}})()

    monkeypatch.setattr("hf_moe_lmc.verbs.inspect.inspect", inspected)


@pytest.mark.usefixtures("talkative")
@pytest.mark.filterwarnings("always:mind this")
@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ([], "the result\n", "a library prints\nnote: continuing: half of it was done\nwarning: mind this\n"),
        (["--quiet"], "the result\n", "a library prints\nwarning: mind this\n"),
        (["--json", "--quiet"], '{\n  "model": "m"\n}\n', "a library prints\nwarning: mind this\n"),
    ],
)
def test_only_the_result_is_on_stdout(run: Run, options: list[str], out: str, err: str) -> None:
    shown = warnings.showwarning
    assert run("inspect", "m", *options) == (0, out, err)
    assert warnings.showwarning is shown and not logging.getLogger("hf_moe_lmc").handlers


def test_an_error_prints_no_document(run: Run) -> None:
    code, out, err = run("inspect", "./nowhere", "--json")
    assert code == 2 and out == "" and err.startswith("error: ./nowhere")


def test_a_note_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "hf_moe_lmc"):
        warnings.simplefilter("error")
        note("news")
    assert [(record.levelname, record.message) for record in caplog.records] == [("INFO", "news")]


@pytest.mark.parametrize("line", [["families"], ["--help"], ["families", "--json"], ["merge", "--nonsense"]])
def test_a_reader_who_has_seen_enough_is_no_failure_to_report(line: list[str]) -> None:
    """Both streams go to a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen([sys.executable, "-m", "hf_moe_lmc", *line], stdout=writing, stderr=writing)
    os.close(writing)
    assert process.wait(timeout=60) in (0, 1, 2)
    process = subprocess.Popen([sys.executable, "-m", "hf_moe_lmc", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=60) in (0, 1, 2) and "Traceback" not in said and "BrokenPipe" not in said
