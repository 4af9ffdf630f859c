"""What each verb of the command line does: it calls the function of that name and prints the result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import hf_moe_lmc as lmc  # each verb imports what it needs when it is called
from hf_moe_lmc.errors import OutputError

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment

Given = dict[str, Any]  # the options that were given, by name


def inspect(given: Given) -> None:
    as_json = given.pop("json", False)
    found = lmc.inspect(**given)
    print(json.dumps(found.to_dict(), indent=2) if as_json else found.table())


def selftest(given: Given) -> int:
    as_json = given.pop("json", False)
    found = lmc.selftest(**given)
    if as_json:
        checks = [
            # JSON has no NaN: null stands for outputs that are not finite
            {**vars(check), "difference": check.difference if math.isfinite(check.difference) else None, "passed": check.passed}
            for check in found.checks
        ]
        print(json.dumps({**vars(found), "passed": found.passed, "checks": checks}, indent=2, allow_nan=False))
    else:
        print(found.table())
    return 0 if found.passed else 1


def families(given: Given) -> None:
    known = lmc.known_families()
    print(json.dumps(known.to_dict(), indent=2) if given.get("json") else known.table())


def align(given: Given) -> None:
    if given.pop("dry_run", False):
        return _print_plan(lmc.plan_align(**given))
    print(_totals(lmc.align(**given)))
    return _print_place(given)


def apply(given: Given) -> None:
    if given.pop("dry_run", False):
        return _print_plan(lmc.plan_apply(**given))
    lmc.apply(**given)
    return _print_place(given)


def barrier(given: Given) -> int | None:
    if given.pop("dry_run", False):
        _print_plan(lmc.plan_barrier(**given))
        return 0
    report = lmc.barrier(**given)
    print(report.table())
    _print_place(given)
    return 1 if report.disagreement else 0


def merge(given: Given) -> None:
    if given.pop("dry_run", False):
        return _print_plan(lmc.plan_merge(**given))
    alignment = lmc.merge(**given)
    if alignment:
        print(_totals(alignment))
    return _print_place(given)


def push(given: Given) -> None:
    print(lmc.push(**given))


def demo(given: Given) -> None:
    lmc.demo(**given, tell=lambda line: print(line, flush=True))
    _print_place(given)


COMMANDS = {command.__name__: command for command in (inspect, families, selftest, align, apply, barrier, merge, push, demo)}
SHARED = ("align", "apply", "barrier", "merge")  # the verbs that several processes may call together


def _print_plan(plan: lmc.Plan) -> None:
    """The plan, also of what there is no room for; that is then an error, as it would be in the run."""
    print(plan.table(), flush=True)
    if plan.problem:
        raise OutputError(plan.problem)


def _totals(alignment: Alignment) -> str:
    totals = alignment.totals()
    return (
        f"moved {totals['experts_moved']} of {totals['experts']} experts and {totals['units_moved']} of {totals['units']} "
        f"hidden units, flipped {totals['signs']} signs, kept the scales of {totals['scales_kept']} experts\n"
        f"distance of the expert weights, relative to A: {totals['relative_distance_before']:.4f} before, "
        f"{totals['relative_distance_after_order']:.4f} after the order, "
        f"{totals['relative_distance_after_units']:.4f} after the units"
    )


def _print_place(given: Mapping[str, Any]) -> None:
    published = f", published: {given['push_to_hub']}" if given.get("push_to_hub") else ""
    print(f"written: {given['output']}{published}")
