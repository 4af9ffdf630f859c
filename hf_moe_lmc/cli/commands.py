"""What each verb of the command line does: it calls the function of that name, and says what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hf_moe_lmc as lmc  # each verb imports what it needs when it is called

Given = dict[str, Any]  # the options that were given, by name
Tell = Callable[[str], None]  # takes a line of a story that is told as it goes


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say.

    Attributes:
        text: for a terminal.
        document: the same for a program.
        code: exit code.
        problem: an error that comes with it: a plan that is not possible.
    """

    text: str
    document: Mapping[str, Any]
    code: int = 0
    problem: str | None = None


def inspect(given: Given, tell: Tell) -> Outcome:
    found = lmc.inspect(**given)
    return Outcome(found.table(), found.to_dict())


def compare(given: Given, tell: Tell) -> Outcome:
    found = lmc.compare(given["a"], given["b"], *given.get("others", ()))
    return Outcome(found.table(), found.to_dict(), code=0 if found.makes_sense else 1)


def families(given: Given, tell: Tell) -> Outcome:
    known = lmc.known_families()
    return Outcome(known.table(), known.to_dict())


def selftest(given: Given, tell: Tell) -> Outcome:
    found = lmc.selftest(**given)
    return Outcome(found.table(), found.to_dict(), code=0 if found.passed else 1)


def align(given: Given, tell: Tell) -> Outcome:
    if given.pop("dry_run", False):
        return _planned(lmc.plan_align(**given))
    alignment = lmc.align(**given)
    return Outcome("\n".join([*alignment.sentences(), _place(given)]), alignment.to_dict())


def apply(given: Given, tell: Tell) -> Outcome:
    if given.pop("dry_run", False):
        return _planned(lmc.plan_apply(**given))
    lmc.apply(**given)
    return Outcome(_place(given), {"output": str(given["output"])})


def barrier(given: Given, tell: Tell) -> Outcome:
    if given.pop("dry_run", False):
        return _planned(lmc.plan_barrier(**given))
    report = lmc.barrier(**given)
    return Outcome("\n".join([report.table(), _place(given)]), report.to_dict(), code=1 if report.disagreement else 0)


def merge(given: Given, tell: Tell) -> Outcome:
    if given.pop("dry_run", False):
        return _planned(lmc.plan_merge(**given))
    alignment = lmc.merge(**given)
    reports = _documents(given["output"], "report.json")
    verdicts = [sentence for report in reports.values() for sentence in _said(report)]
    document = {"output": str(given["output"]), "alignment": alignment.to_dict() if alignment else None}
    repairs = _documents(given["output"], "repair.json")
    document |= {"reports": reports} if reports else {}
    document |= {"repairs": repairs} if repairs else {}
    text = "\n".join([*verdicts, *(alignment.sentences() if alignment else ()), _place(given)])
    return Outcome(text, document, code=1 if any(report["disagreement"] for report in reports.values()) else 0)


def push(given: Given, tell: Tell) -> Outcome:
    published = lmc.push(**given)
    return Outcome(str(published), {"url": published.address, "changed": published.changed})


def demo(given: Given, tell: Tell) -> Outcome:
    reports = lmc.demo(**given, tell=tell)
    return Outcome(_place(given), reports)


def completion(given: Given, tell: Tell) -> Outcome:
    from hf_moe_lmc.cli.completion import script

    text = script(given["shell"])
    return Outcome(text, {"shell": given["shell"], "script": text})


COMMANDS: dict[str, Callable[[Given, Tell], Outcome]] = {
    command.__name__: command
    for command in (inspect, compare, families, selftest, align, apply, barrier, merge, push, demo, completion)
}
RESUMING = ("align", "apply", "barrier", "merge", "demo")  # the verbs that continue what a stopped call has done
ASKING = ("compare",)  # the verbs whose exit code 1 is an answer: whatever fails is 2
SHARED = ("align", "apply", "barrier", "merge")  # the verbs that several processes may call together


def _planned(plan: lmc.Plan) -> Outcome:
    """The plan, also of what there is no room for; that is then an error, as it would be in the run."""
    return Outcome(plan.table(), plan.to_dict(), problem=plan.problem)


def _documents(output: Path, name: str) -> dict[str, Any]:
    """What a merge says of itself in files of a name, by folder within the output: one, or one for each point, or none."""
    files = sorted([*output.glob(name), *output.glob(f"t*/{name}")])
    return {file.parent.relative_to(output).as_posix(): json.loads(file.read_text(encoding="utf-8")) for file in files}


def _said(report: Mapping[str, Any]) -> list[str]:
    """The verdict of a report on a merge, and its figures; what makes it void comes first."""
    from hf_moe_lmc.perplexity.rendering import void
    from hf_moe_lmc.publishing.measured import Measured

    merge = report["merge"]
    measured = Measured(report=report, t=merge["t"], path=merge["path"])
    figures, mind = measured.table(), [f"Mind: {one}." for one in measured.cautions()]
    return [*void(report["disagreement"]), *report["verdict"]["sentences"], *mind, *(["", *figures, ""] if figures else [])]


def _place(given: Mapping[str, Any]) -> str:
    published = f", published: {given['push_to_hub']}" if given.get("push_to_hub") else ""
    return f"written: {given['output']}{published}"
