"""The words of the command line. What is not given is not passed on: defaults stand in the values behind the verbs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_args

from hf_moe_lmc import __version__
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.path.options import LAYERWISE, ComputeOptions, DType, GridOptions

JOIN = "\n\n"  # where --join has no separator: what perplexity recipes on WikiText do
REFINE = 3  # halvings where --refine has no number


def parser() -> argparse.ArgumentParser:
    """The parser: a parsed namespace holds the given options, and as `verb` the name of one of VERBS."""
    whole = argparse.ArgumentParser(
        prog="hf-moe-lmc",
        description="Align, interpolate and merge Mixture-of-Experts language models. "
        "MODEL, A and B are local folders or Hub ids, OWNER/NAME[@REVISION].",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = whole.add_subparsers(required=True, metavar="VERB")
    for name, (describe, description) in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=description,
            description=description[0].upper() + description[1:] + ".",
            argument_default=argparse.SUPPRESS,
        )
        verb.set_defaults(verb=name)
        describe(verb)
    return whole


def _inspect(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL")
    _json(verb)


def _selftest(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", help="its weights are not read")
    _json(verb)


def _align(verb: argparse.ArgumentParser) -> None:
    _pair(verb)
    _output(verb, "OUT")
    _matching(verb)
    _resuming(verb)
    verb.add_argument("--symmetry-only", action="store_true", help="write the symmetry and its report, no checkpoint")
    _writing(verb)
    _publishing(verb)
    _licence(verb)


def _apply(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("symmetry", metavar="SYMMETRY", help="symmetry.safetensors, or a folder that holds it")
    verb.add_argument("b", metavar="B")
    _output(verb, "OUT")
    verb.add_argument("--inverse", action="store_true", help="undo it")
    _resuming(verb)
    _writing(verb)
    _publishing(verb)
    _licence(verb)


def _barrier(verb: argparse.ArgumentParser) -> None:
    _pair(verb)
    _output(verb, "DIR")
    text = verb.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        help="UTF-8 text, one document; or .json, .jsonl, .csv, .tsv, .parquet or .arrow, each row a document; any of them may "
        "be compressed (.gz); repeatable",
    )
    text.add_argument("--dataset", metavar="NAME", help="dataset on the Hub or in a folder; each row is a document")
    verb.add_argument("--dataset-config", metavar="C")
    verb.add_argument("--split", metavar="S", help="(default: test)")
    verb.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of a dataset on the Hub")
    verb.add_argument("--column", metavar="COL", help="where the text of a row stands (default: text)")
    verb.add_argument(
        "--join",
        metavar="SEPARATOR",
        type=separator,
        nargs="?",
        const=JOIN,
        help="put rows together into one document, with SEPARATOR between them (an empty line if not given), in which \\n and "
        "\\t stand for a new line and a tab",
    )
    points = _default(GridOptions, "points")
    verb.add_argument("--points", metavar="N", type=int, help=f"grid points, both ends included (default: {points})")
    verb.add_argument("--no-naive", dest="naive", action="store_false", help="skip the path to B as it is")
    verb.add_argument("--symmetry", metavar="FILE", help="take a saved symmetry instead of matching")
    _matching(verb)
    _resuming(verb)
    verb.add_argument("--context", metavar="N", type=int, help="tokens per window (default: 2048, or the model's maximum)")
    verb.add_argument(
        "--stride", metavar="N", type=int, help="let windows overlap, N tokens apart, each scored where the last ended"
    )
    verb.add_argument("--max-tokens", metavar="N", type=int, help="tokens to read of each text (default: all)")
    verb.add_argument("--batch-size", metavar="N", type=int, help="windows per forward pass (default: 4096 tokens' worth)")
    verb.add_argument("--dtype", choices=get_args(DType), help=f"(default: {_default(ComputeOptions, 'dtype')})")
    verb.add_argument("--device", help="where the layers run (default: a GPU if there is one)")
    verb.add_argument(
        "--activation-memory",
        metavar="SIZE",
        type=size,
        help="hidden states of all points and windows on their way, e.g. 4GiB; the smaller, the more often A and B are read "
        "(default: half of the free memory)",
    )
    verb.add_argument(
        "--layerwise",
        metavar="N",
        type=int,
        nargs="?",
        const=LAYERWISE,
        help="also the barrier of each MoE layer alone, the rest staying A, with N points between its ends "
        f"({LAYERWISE} if not given)",
    )
    verb.add_argument(
        "--layers",
        metavar="LAYERS",
        help="layers for --layerwise, e.g. each,0-3,8: every MoE layer alone, 0 to 3 together, 8 alone (default: each)",
    )
    verb.add_argument(
        "--refine",
        metavar="N",
        type=int,
        nargs="?",
        const=REFINE,
        help=f"halve the intervals beside the aligned maximum N times ({REFINE} if not given), reading both models again each "
        "time",
    )
    verb.add_argument("--no-routing", dest="routing", action="store_false", help="do not record which experts the tokens take")
    _dry_run(verb)
    _publishing(verb, "publish the folder; what is there stays")


def _merge(verb: argparse.ArgumentParser) -> None:
    _pair(verb)
    _output(verb, "OUT")
    verb.add_argument("-t", type=float, help="0 is A, 1 is B (default: 0.5)")
    how = verb.add_mutually_exclusive_group()
    verb.add_argument(
        "--tokenizer",
        choices=("a", "b"),
        help="whose tokenizer, chat template, generation configuration and special ids the output has (default: a)",
    )
    how.add_argument("--no-align", dest="align", action="store_false", help="take B as it is")
    how.add_argument("--symmetry", metavar="FILE", help="take a saved symmetry instead of matching")
    _matching(verb)
    _resuming(verb)
    _writing(verb)
    _publishing(verb)
    _licence(verb)


def _push(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("folder", metavar="DIR")
    verb.add_argument("repo_id", metavar="REPO_ID")
    verb.add_argument("--private", action="store_true")
    verb.add_argument("--revision", metavar="BRANCH")
    verb.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    verb.add_argument("--commit-message", metavar="TEXT")
    verb.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the weights that the repository holds; those which transformers could take instead go in the same commit",
    )
    verb.add_argument("--overwrite-card", action="store_true", help="replace its README.md, whoever wrote it")


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "inspect": (_inspect, "what a checkpoint is, from its headers alone"),
    "families": (lambda verb: _json(verb), "the model types that are supported or refused, with their symmetries"),
    "selftest": (
        _selftest,
        "prove on a small random model of the same configuration that the symmetries of MODEL are understood",
    ),
    "align": (_align, "write B with its experts and hidden units where A has them"),
    "apply": (_apply, "apply a saved symmetry to B"),
    "barrier": (_barrier, "measure the perplexity barrier between A and B, naive and aligned"),
    "merge": (_merge, "write (1 - t) A + t B, aligned"),
    "push": (_push, "publish a finished folder in one commit"),
    "demo": (lambda verb: _output(verb, "DIR"), "train small models, measure their barriers, merge; no network needed"),
}


def _default(options: type, name: str) -> object:
    """The default of a field of an option value."""
    return next(field.default for field in fields(options) if field.name == name)


def _json(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--json", action="store_true", help="print JSON")


def _pair(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("a", metavar="A")
    verb.add_argument("b", metavar="B")


def _output(verb: argparse.ArgumentParser, metavar: str) -> None:
    verb.add_argument("-o", "--output", metavar=metavar, type=Path, required=True, help="a new or empty folder")


def size(text: str) -> int:
    """Bytes of a size such as 4GiB, 500 MB or 1048576."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 4GiB, 500MB or a number of bytes")
    number, unit, binary = found.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" kmgt".index(unit.lower()) if unit else 0))


def separator(text: str) -> str:
    r"""What stands between rows; shells do not make new lines of \n."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _matching(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--order",
        choices=get_args(OrderMethod),
        help="order the experts by router rows, by Gram matrices, or keep the better "
        f"(default: {_default(WeightMatching, 'order')})",
    )
    verb.add_argument(
        "--units",
        choices=get_args(UnitMethod),
        help=f"match hidden units as they are, or up to sign and scale (default: {_default(WeightMatching, 'units')})",
    )
    verb.add_argument(
        "--exact", action="store_true", help="compute all costs in full for wide experts, too; without, sketches come first"
    )


def _resuming(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="continue from what a stopped call with the same inputs and options had done (the default), or start afresh",
    )
    verb.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what this package wrote in that folder before, once the new output is whole",
    )


def _writing(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--allow-nonfinite", action="store_true", help="write weights that are NaN or infinite as they are")
    _dry_run(verb)


def _dry_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be read and written; change nothing"
    )


def _publishing(
    verb: argparse.ArgumentParser, what: str = "publish the result; a repository that holds weights is refused, see push"
) -> None:
    verb.add_argument("--push-to-hub", metavar="REPO_ID", help=what)
    verb.add_argument("--private", action="store_true", help="publish it privately")


def _licence(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--license",
        metavar="ID",
        help="licence that the card names, such as apache-2.0 (default: what the cards of all parents name alike)",
    )
