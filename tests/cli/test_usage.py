"""Help for a newcomer, and mistakes: all of a call at once, each with the word that was meant."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys

import pytest

from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.cli.parser import VERBS, parser
from hf_moe_lmc.cli.usage import Parser

SUBPARSERS = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))


def refused(capsys: pytest.CaptureFixture[str], line: str) -> list[str]:
    """What a call is told that is wrong usage; the last line is the usage."""
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(line))
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    *problems, usage = captured.err.splitlines()
    assert problems and all(problem.startswith("error: ") for problem in problems)
    assert usage.startswith("usage: hf-moe-lmc ") and usage.endswith("--help")
    return [problem.removeprefix("error: ") for problem in problems]


def test_without_arguments_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0 and capsys.readouterr().out == bare.out and bare.err == ""
    assert all(f"\n  {verb} " in bare.out for verb in VERBS)
    assert "examples:" in bare.out and "130  interrupted" in bare.out


@pytest.mark.parametrize("columns", ["80", "120"])
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and max(map(len, shown.splitlines())) <= int(columns) + 10  # an example may stick out
    assert all(part in shown for part in ("examples:\n", "exit codes:\n", "  0    done\n", "  130  interrupted\n"))
    for action in SUBPARSERS.choices[verb]._actions:
        assert action.help and action.help != argparse.SUPPRESS, f"{verb}: {action.dest} is not described"


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_a_verb_are_calls_of_it(verb: str) -> None:
    calls = "\n".join(VERBS[verb].examples).replace("\\\n", " ").splitlines()
    for call in calls:
        words = shlex.split(call, comments=True)
        words = words[: words.index(">") if ">" in words else None]
        assert words[0] == "hf-moe-lmc" and parser().parse_args(words[1:]).verb == verb


@pytest.mark.parametrize(
    ("line", "problems"),
    [
        ("mrege a b", ["unknown verb mrege; did you mean merge?"]),
        ("xyz", [f"unknown verb xyz; the verbs are {', '.join(VERBS)}"]),
        ("--jsn", ["unknown option --jsn", "missing: VERB"]),
        ("merge a b --ovrwrite", ["unknown option --ovrwrite; did you mean --overwrite?", "missing: -o OUT"]),
        (
            "merge --outptu x a b --layrwise 3",
            ["unknown option --outptu; did you mean --output?", "unknown option --layrwise", "missing: -o OUT"],
        ),
        ("merge a b -o c --over", ["unknown option --over; did you mean --overwrite?"]),  # no abbreviations
        ("merge a b -o c --o=d", ["unknown option --o; did you mean -o?"]),
        ("merge a b -o c -overwrite", ["unknown option -overwrite; did you mean --overwrite?"]),  # nor -o verwrite
        ("merge", ["missing: A, B, -o OUT"]),
        ("barrier a b -o c", ["missing: --text [NAME=]FILE or --dataset NAME"]),
        ("barrier a", ["missing: B, -o DIR, --text [NAME=]FILE or --dataset NAME"]),
        ("inspect a b c", ["unexpected argument b", "unexpected argument c"]),
        ("align a b -o c --order gaet", ["argument --order: gaet: expected one of gate, expert, best; did you mean gate?"]),
        ("barrier a b -o c --text x --points many", ["argument --points: invalid int value: 'many'"]),
        ("merge a b -o", ["argument -o/--output: expected one argument"]),
    ],
)
def test_mistakes_are_told_together(capsys: pytest.CaptureFixture[str], line: str, problems: list[str]) -> None:
    assert refused(capsys, line) == problems


def test_what_looks_like_a_mistake_and_is_none() -> None:
    given = vars(parser().parse_args(["merge", "a", "-t", "0.3", "b", "-oc"]))
    assert (given["b"], str(given["output"])) == ("b", "c")
    given = vars(parser().parse_args(["inspect", "--", "-overwrite"]))
    assert given["model"] == "-overwrite"


def test_nothing_of_a_message_can_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "merge a b -o c '--\x1b[31m'") == [r"unknown option --\x1b[31m"]


def test_the_control_argparse_hides_the_unknown_behind_the_missing(capsys: pytest.CaptureFixture[str]) -> None:
    plain = argparse.ArgumentParser()
    plain.add_argument("-o", required=True)
    with pytest.raises(SystemExit):
        plain.parse_args(["--nonsense"])
    assert "--nonsense" not in capsys.readouterr().err
    ours = Parser(prog="p", usage="p -o O")
    ours.add_argument("-o", required=True)
    with pytest.raises(SystemExit):
        ours.parse_args(["--nonsense"])
    assert "--nonsense" in capsys.readouterr().err


def test_what_needs_no_model_imports_no_library_of_models() -> None:
    lines = [
        "",
        "--help",
        "--version",
        "barrier --help",
        "merge a b --nonsense",
        "completion zsh",
        "families",
        "push none me/x",
    ]
    source = """
import sys
from hf_moe_lmc.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:
        pass
    heavy = {"torch", "transformers", "datasets", "scipy", "matplotlib"} & sys.modules.keys()
    assert not heavy, (line, heavy)
import hf_moe_lmc.verbs.merge
assert "torch" in sys.modules  # the control
"""
    done = subprocess.run([sys.executable, "-c", source, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
