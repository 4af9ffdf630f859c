"""The words of the command line: each verb with its arguments.

An option is the keyword of the verb's function that its name says: `--max-tokens` is `max_tokens`. What is not given is not
passed on, since defaults stand in the values behind the verbs. So a new option is one `add_argument` here, and one keyword
there.
"""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from hf_moe_lmc import __version__
from hf_moe_lmc.cli.arguments import (
    WHERE,
    add_matching,
    add_messages,
    add_model,
    add_output,
    add_pair,
    add_publishing,
    add_repair,
    add_resuming,
    add_running,
    default,
    point,
    separator,
    size,
)
from hf_moe_lmc.cli.usage import Parser, short_usage
from hf_moe_lmc.path.options import LAYERWISE, QUESTIONS, ComputeOptions, DType, GridOptions
from hf_moe_lmc.plots.options import PlotKind, PlotOptions
from hf_moe_lmc.runtime.tables import definitions

JOIN = "\n\n"  # where --join has no separator: what perplexity recipes on WikiText do
REFINE = 3  # halvings where --refine has no number
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Verb:
    """What the help of a verb says.

    Attributes:
        add: adds its arguments.
        summary: one line, for the list of verbs.
        examples: calls as one would type them.
        more: what a newcomer should know besides.
        failure: what exit code 1 means; fault: what 2 does.
    """

    add: Callable[[Parser], None]
    summary: str
    examples: tuple[str, ...]
    more: str = ""
    failure: str = "failed"
    fault: str = "refused: wrong usage or input"

    @property
    def description(self) -> str:
        return f"{self.summary[0].upper()}{self.summary[1:]}.{' ' if self.more else ''}{self.more}"

    @property
    def epilog(self) -> str:
        return "\n".join([*_listed("examples", self.examples), "", *_exit_codes(self.failure, self.fault)])


def parser() -> Parser:
    """The parser: a parsed namespace holds the given options, and as `verb` the name of one of VERBS."""
    whole = Parser(
        prog="hf-moe-lmc",
        description=f"Align, interpolate and merge Mixture-of-Experts language models. MODEL, A and B are each a {WHERE}.",
        epilog="\n".join(
            [
                *_listed("examples", EXAMPLES),
                "",
                "hf-moe-lmc VERB --help describes a verb, with examples.",
                "",
                *_exit_codes("failed, or a check did not pass", "refused: wrong usage or input"),
            ]
        ),
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = whole.add_subparsers(required=True, metavar="VERB", dest="verb", title="verbs", prog=whole.prog)
    for name, words in VERBS.items():
        verb = verbs.add_parser(name, help=words.summary, description=words.description, epilog=words.epilog)
        words.add(verb)
        add_messages(verb)
        verb.usage = short_usage(verb)
    whole.usage = short_usage(whole)
    return whole


def _inspect(verb: Parser) -> None:
    add_model(verb)


def _compare(verb: Parser) -> None:
    verb.add_argument("a", metavar="A", help=f"the model that the others are held against: a {WHERE}")
    verb.add_argument("b", metavar="B", help="another model; likewise")
    verb.add_argument("others", metavar="C", nargs="*", default=SUPPRESS, help="further models; likewise")


def _families(verb: Parser) -> None:
    """Nothing but what every verb has."""


def _selftest(verb: Parser) -> None:
    add_model(verb, "; its weights are not read")


def _format(verb: Parser, *choices: str) -> None:
    verb.add_argument(
        "--format",
        choices=choices,
        help=f"how weights are stored: as in {' or '.join(one.upper() for one in choices if one != 'bf16')}, or quantized ones "
        f"in bfloat16 (default: {choices[0]})",
    )


def _align(verb: Parser) -> None:
    add_pair(verb)
    add_output(verb, "OUT")
    _format(verb, "b", "bf16")
    verb.add_argument("--symmetry-only", action="store_true", help="write the symmetry and its report, no checkpoint")
    add_matching(verb)
    add_running(verb)
    add_publishing(verb)


def _apply(verb: Parser) -> None:
    verb.add_argument("symmetry", metavar="SYMMETRY", help="symmetry.safetensors, or a folder that holds it")
    verb.add_argument("b", metavar="B", help=f"the model that it is applied to: a {WHERE}")
    add_output(verb, "OUT")
    verb.add_argument("--inverse", action="store_true", help="undo it: take an output of apply or align back to B")
    _format(verb, "b", "bf16")
    add_running(verb)
    add_publishing(verb)


def _barrier(verb: Parser) -> None:
    add_pair(verb)
    add_output(verb, "DIR")
    _text(verb)
    _path(verb)
    add_repair(verb)
    add_matching(verb)
    _computing(verb)
    add_running(verb, weights=False)
    add_publishing(verb, "publish the folder; what is there stays", card=False)


def _text(verb: Parser, *, required: bool = True) -> None:
    group = verb.add_argument_group("text to evaluate on")
    text = group.add_mutually_exclusive_group(required=required)
    text.add_argument(
        "--text",
        metavar="[NAME=]FILE",
        action="append",
        help="UTF-8 text, one document; or .json, .jsonl, .csv, .tsv, .parquet or .arrow, each row a document; any of them may "
        "be compressed (.gz); repeatable: each text is reported by its name (default: the file's stem), and their mean",
    )
    text.add_argument(
        "--dataset", metavar="NAME", help="dataset on the Hub or in a folder, also one of save_to_disk; each row is a document"
    )
    group.add_argument("--dataset-config", metavar="C", help="configuration of the dataset, such as wikitext-2-raw-v1")
    group.add_argument("--split", metavar="S", help="of the dataset (default: test)")
    group.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of a dataset on the Hub")
    group.add_argument("--column", metavar="COL", help="where the text of a row stands (default: text)")
    group.add_argument(
        "--join",
        metavar="SEPARATOR",
        type=separator,
        nargs="?",
        const=JOIN,
        help="put rows together into one document, with SEPARATOR between them (an empty line if not given), in which \\n and "
        "\\t stand for a new line and a tab",
    )
    group.add_argument("--context", metavar="N", type=int, help="tokens per window (default: 2048, or the model's maximum)")
    group.add_argument(
        "--stride", metavar="N", type=int, help="let windows overlap, N tokens apart, each scored where the last ended"
    )
    group.add_argument("--max-tokens", metavar="N", type=int, help="tokens to read of each text (default: all)")
    group.add_argument(
        "--ensemble", action="store_true", help="also the ensemble of A and B: the mean of their logits, and of probabilities"
    )
    group.add_argument(
        "--cloze",
        metavar="N",
        type=int,
        nargs="?",
        const=QUESTIONS,
        help=f"also a cloze task of N questions made from each text ({QUESTIONS} if not given): which of four continuations "
        "follows",
    )


def _path(verb: Parser) -> None:
    group = verb.add_argument_group("path")
    points = default(GridOptions, "points")
    group.add_argument("--points", metavar="N", type=int, help=f"grid points, both ends included (default: {points})")
    group.add_argument("--no-naive", dest="naive", action="store_false", help="skip the path to B as it is")
    group.add_argument("--symmetry", metavar="FILE", help="take a saved symmetry (symmetry.safetensors) instead of matching")
    group.add_argument(
        "--layerwise",
        metavar="N",
        type=int,
        nargs="?",
        const=LAYERWISE,
        help="also the barrier of each MoE layer alone, the rest staying A, with N points between its ends "
        f"({LAYERWISE} if not given)",
    )
    group.add_argument(
        "--layers",
        metavar="LAYERS",
        help="layers for --layerwise, e.g. each,0-3,8: every MoE layer alone, 0 to 3 together, 8 alone (default: each)",
    )
    group.add_argument(
        "--refine",
        metavar="N",
        type=int,
        nargs="?",
        const=REFINE,
        help=f"halve the intervals beside the aligned maximum N times ({REFINE} if not given), reading both models again each "
        "time",
    )
    group.add_argument("--no-routing", dest="routing", action="store_false", help="do not record which experts the tokens take")
    group.add_argument(
        "--plot",
        choices=get_args(PlotKind),
        help="interactive: also barrier.html, one page with all plots, which needs Plotly (pip install "
        f"'hf_moe_lmc[interactive]') (default: {default(PlotOptions, 'plot')})",
    )


def _computing(verb: Parser) -> None:
    group = verb.add_argument_group("computing")
    group.add_argument(
        "--dtype", choices=get_args(DType), help=f"of the models while they run (default: {default(ComputeOptions, 'dtype')})"
    )
    group.add_argument(
        "--device", metavar="DEVICE", help="where the layers run, e.g. cuda:1 or cpu (default: a GPU if there is one)"
    )
    group.add_argument("--batch-size", metavar="N", type=int, help="windows per forward pass (default: 4096 tokens' worth)")
    group.add_argument(
        "--activation-memory",
        metavar="SIZE",
        type=size,
        help="hidden states of all points and windows on their way, e.g. 4GiB; the smaller, the more often A and B are read "
        "(default: half of the free memory)",
    )


def _merge(verb: Parser) -> None:
    add_pair(verb)
    add_output(verb, "OUT")
    verb.add_argument(
        "-t",
        type=point,
        action="append",
        help="which point to write: 0 is A, 1 is B (default: 0.5), or `best` for the one of the least loss on --text; "
        "repeatable: A and B are read once, and OUT/t0.3 and so on hold a checkpoint each",
    )
    verb.add_argument(
        "--tokenizer",
        choices=("a", "b"),
        help="whose tokenizer, chat template, generation configuration and special ids the output has (default: a)",
    )
    _format(verb, "a", "b", "bf16")
    how = verb.add_mutually_exclusive_group()
    how.add_argument("--no-align", dest="align", action="store_false", help="take B as it is, without matching")
    how.add_argument("--symmetry", metavar="FILE", help="take a saved symmetry (symmetry.safetensors) instead of matching")
    verb.add_argument("--report", metavar="DIR", help="put the figures and the plot of what barrier wrote there into the card")
    _text(verb, required=False)
    verb.add_argument(
        "--points",
        metavar="N",
        type=int,
        help=f"grid points of the path that -t best looks at, both ends included (default: {default(GridOptions, 'points')})",
    )
    add_repair(verb, widen=True)
    add_matching(verb)
    _computing(verb)
    add_running(verb)
    add_publishing(verb)


def _push(verb: Parser) -> None:
    verb.add_argument("folder", metavar="DIR", help="what align, apply, merge or barrier finished")
    verb.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the Hub; created where it does not exist")
    verb.add_argument("--private", action="store_true", help="create it as a private repository")
    verb.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    verb.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    verb.add_argument("--commit-message", metavar="TEXT", help="first line of the commit (default: what the folder holds)")
    verb.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the weights that the repository holds; those which transformers could take instead go in the same commit",
    )
    verb.add_argument("--overwrite-card", action="store_true", help="replace its README.md, whoever wrote it")


def _demo(verb: Parser) -> None:
    add_output(verb, "DIR")
    add_resuming(verb)


def _completion(verb: Parser) -> None:
    verb.add_argument("shell", choices=SHELLS, help="the shell that you use")


EXAMPLES = (
    "hf-moe-lmc demo -o demo",
    "hf-moe-lmc inspect allenai/OLMoE-1B-7B-0924",
    "hf-moe-lmc barrier ./model-a ./model-b --text held_out.txt -o barrier",
    "hf-moe-lmc merge ./model-a ./model-b -o merged",
)
VERBS: dict[str, Verb] = {
    "inspect": Verb(
        _inspect,
        "what a checkpoint is, from its headers alone",
        ("hf-moe-lmc inspect ./model-a", "hf-moe-lmc inspect allenai/OLMoE-1B-7B-0924 --json"),
        "Its sizes, its experts, and what may change places in it without changing what it computes. "
        "Of a Hub id only headers are fetched.",
    ),
    "compare": Verb(
        _compare,
        "whether models belong together: the verdict before anything is downloaded",
        (
            "hf-moe-lmc compare ./model-a ./model-b",
            "hf-moe-lmc compare Qwen/Qwen3-30B-A3B Qwen/Qwen3-Coder-30B-A3B-Instruct --json",
        ),
        "For each MoE layer: same lineage in place, same lineage but shuffled, or unrelated. Then what differs, and which "
        "verbs are possible. Of a Hub id, headers, router rows and a small sample are fetched, by ranges.",
        failure="a merge makes no sense",
        fault="wrong usage or input, or a failure",
    ),
    "families": Verb(
        _families,
        "the model types that are supported or refused, with their symmetries",
        ("hf-moe-lmc families", "hf-moe-lmc families --json"),
    ),
    "selftest": Verb(
        _selftest,
        "prove on a small random model of the same configuration, stored as MODEL is, that its symmetries are understood",
        ("hf-moe-lmc selftest ./model-a",),
        failure="failed, or a check did not pass",
    ),
    "align": Verb(
        _align,
        "write B with its experts and hidden units where A has them",
        (
            "hf-moe-lmc align ./model-a ./model-b -o aligned",
            "hf-moe-lmc align ./model-a ./model-b -o symmetry --symmetry-only",
        ),
        "What B computes stays the same, so that A and the output can be averaged weight by weight.",
    ),
    "apply": Verb(
        _apply,
        "apply a saved symmetry to B",
        (
            "hf-moe-lmc apply symmetry.safetensors ./model-b -o applied",
            "hf-moe-lmc apply aligned aligned -o restored --inverse",
        ),
        "The output computes what B computes.",
    ),
    "barrier": Verb(
        _barrier,
        "measure the perplexity barrier between A and B, naive and aligned",
        (
            "hf-moe-lmc barrier ./model-a ./model-b --text held_out.txt -o barrier",
            "hf-moe-lmc barrier ./model-a ./model-b --text held_out.txt -o quick \\",
            "    --points 5 --max-tokens 20000",
            "hf-moe-lmc barrier ./model-a ./model-b -o barrier --join \\",
            "    --dataset Salesforce/wikitext --dataset-config wikitext-2-raw-v1",
        ),
        "The loss on a held-out text is measured at points of the straight line from A to B, and from A to aligned B.",
        failure="failed, or the two paths disagree at t = 1",
    ),
    "merge": Verb(
        _merge,
        "write (1 - t) A + t B, aligned",
        (
            "hf-moe-lmc merge ./model-a ./model-b -o merged",
            "hf-moe-lmc merge ./model-a ./model-b -o merges -t 0.3 -t 0.5 -t 0.7 --dry-run",
            "hf-moe-lmc merge ./model-a ./model-b -o best -t best --text held_out.txt",
            "hf-moe-lmc merge ./model-a ./model-b -o average --no-align",
        ),
        "The output is a complete checkpoint with a model card.",
    ),
    "push": Verb(
        _push,
        "publish a finished folder in one commit",
        ("hf-moe-lmc push merged me/merged --private", "hf-moe-lmc push merged me/merged --create-pr"),
        "The repository is looked at first. What would replace weights there is refused, unless --overwrite is given.",
    ),
    "demo": Verb(
        _demo,
        "train small models, measure their barriers, merge; no network needed",
        ("hf-moe-lmc demo -o demo",),
    ),
    "completion": Verb(
        _completion,
        "print a script that completes verbs and options in your shell",
        (
            "hf-moe-lmc completion bash > ~/.local/share/bash-completion/completions/hf-moe-lmc",
            "hf-moe-lmc completion zsh > ~/.zfunc/_hf-moe-lmc  # a folder of $fpath",
            "hf-moe-lmc completion fish > ~/.config/fish/completions/hf-moe-lmc.fish",
        ),
    ),
}


def _exit_codes(failure: str, fault: str) -> list[str]:
    codes = {"0": "done", "1": failure, "2": fault, "130": "interrupted"}
    return ["exit codes:", *definitions(codes, width=78)]


def _listed(title: str, lines: tuple[str, ...]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)]
