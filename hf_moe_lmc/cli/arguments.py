"""Arguments that several verbs have, a function for each group, and how their values are read."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from hf_moe_lmc.cli.usage import Parser
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.repair.options import RepairName, RepairOptions

BEST = "best"
WHERE = "local folder or Hub id, OWNER/NAME[@REVISION]"


def default(options: type, name: str) -> object:
    """The default of a field of an option value."""
    return next(field.default for field in fields(options) if field.name == name)


def size(text: str) -> int:
    """Bytes of a size such as 4GiB, 500 MB or 1048576."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 4GiB, 500MB or a number of bytes")
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" kmgt".index(unit.lower()) if unit else 0))


def point(text: str) -> float | str:
    """A t, or the word for the best one."""
    if text == BEST:
        return BEST
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 (A) to 1 (B), or {BEST}") from None


def separator(text: str) -> str:
    r"""What stands between rows; shells do not make new lines of \n."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def add_model(verb: Parser, more: str = "") -> None:
    verb.add_argument("model", metavar="MODEL", help=f"the checkpoint: a {WHERE}{more}")


def add_pair(verb: Parser) -> None:
    verb.add_argument("a", metavar="A", help=f"the model that stays where it is: a {WHERE}")
    verb.add_argument("b", metavar="B", help="the model that is brought close to A; likewise, and of one architecture with A")


def add_output(verb: Parser, metavar: str) -> None:
    verb.add_argument("-o", "--output", metavar=metavar, type=Path, required=True, help="a new or empty folder")


def add_matching(verb: Parser) -> None:
    group = verb.add_argument_group("matching")
    group.add_argument(
        "--order",
        choices=get_args(OrderMethod),
        help="order the experts by router rows, by Gram matrices, or keep the better "
        f"(default: {default(WeightMatching, 'order')})",
    )
    group.add_argument(
        "--units",
        choices=get_args(UnitMethod),
        help=f"match hidden units as they are, or up to sign and scale (default: {default(WeightMatching, 'units')})",
    )
    group.add_argument(
        "--exact", action="store_true", help="compute all costs in full for wide experts, too; without, sketches come first"
    )


def add_repair(verb: Parser, *, widen: bool = False) -> None:
    """What a merge has in place of the point of the straight line.

    Args:
        widen: the verb writes a model, which may grow.
    """
    group = verb.add_argument_group("repair")
    group.add_argument(
        "--repair",
        choices=get_args(RepairName),
        help="leave the straight line where it is no good: norms and crossover need no text, ridge and regmean are fitted on "
        f"calibration text, auto takes the best of all on it (default: {default(RepairOptions, 'repair')})",
    )
    group.add_argument(
        "--calibration",
        metavar="[NAME=]FILE",
        action="append",
        help="text of both models, as for --text; repairs are fitted and chosen on one half, accepted on the other; repeatable",
    )
    for side in ("a", "b"):
        group.add_argument(
            f"--calibration-{side}",
            metavar="[NAME=]FILE",
            action="append",
            help=f"text of {side.upper()}'s own domain, together with --calibration-{'b' if side == 'a' else 'a'}; repeatable",
        )
    group.add_argument(
        "--calibration-tokens",
        metavar="N",
        type=int,
        help=f"tokens to read of each calibration text (default: {default(RepairOptions, 'calibration_tokens')})",
    )
    if widen:
        group.add_argument(
            "--widen",
            action="store_true",
            help="no hidden units are averaged: each expert has those of both, and the model grows; needs no text; experts are "
            "paired by their router rows unless --order is given",
        )


def add_running(verb: Parser, *, weights: bool = True) -> None:
    """How the output comes to stand where it belongs.

    Args:
        weights: the verb writes a checkpoint.
    """
    group = verb.add_argument_group("running")
    group.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be read and written; change nothing"
    )
    add_resuming(group)
    if weights:
        group.add_argument("--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite as they are")


def add_resuming(group: argparse._ActionsContainer) -> None:
    """--resume and --overwrite, for a verb or a group of its options."""
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="continue from what a stopped call with the same inputs and options had done (the default), or start afresh",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what this package wrote in that folder before, once the new output is whole",
    )


def add_publishing(
    verb: Parser, what: str = "publish the result; a repository that holds weights is refused, see push", *, card: bool = True
) -> None:
    """Where an output is published.

    Args:
        card: the verb writes a model card.
    """
    group = verb.add_argument_group("publishing")
    group.add_argument("--push-to-hub", metavar="REPO_ID", help=what)
    group.add_argument("--private", action="store_true", help="publish it privately")
    if card:
        group.add_argument(
            "--license",
            metavar="ID",
            help="licence that the card names, such as apache-2.0 (default: what the cards of all parents name alike)",
        )


def add_messages(verb: Parser) -> None:
    """What every verb has."""
    group = verb.add_argument_group("messages")
    group.add_argument("--json", action="store_true", help="print the result as one JSON document, and nothing else on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress and no notes; warnings and the result remain")
