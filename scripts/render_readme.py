"""Fills in the tables of README.md and docs/ that come from measured figures or from code.

    python scripts/render_readme.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, where NAME is one of TABLES. The figures are read
from the JSON files beside this script; each of these names the command that wrote it.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from hf_moe_lmc.runtime.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FAULTS = (  # a few that show the kinds
    "a truncated shard",
    "weight_map leads to ../",
    "quantized by AWQ",
    "another vocabulary",
    "an output that is a link into the Hub's cache",
    "faults in A, in B and in the output at once",
)
MODELS = {  # as `references` in report.json name them
    "a": "A, trained on prose",
    "b": "B, trained on code",
    "naive": "their average",
    "aligned": "their average, aligned",
    "repaired": "the same, repaired",
    "ensemble": "both models, as an ensemble",
}
_TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "scripts" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def paragraph(text: str) -> str:
    return textwrap.fill(text, 124, break_on_hyphens=False) + "\n"


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """A page with those of `tables` that it has places for; other places stay as they are."""
    return _TABLE.sub(lambda found: found[1] + tables[found[2]]() + found[3] if found[2] in tables else found[0], text)


def names_in(text: str) -> list[str]:
    """The tables that a page has places for."""
    return [found[2] for found in _TABLE.finditer(text)]


def protocol() -> str:
    """The paper's protocol: the mean naive barrier of each setting, and the mean aligned one as a share of that."""
    methods = {
        "default": "left, by default",
        "plain_gate": "plain units, gate order",
        "plain_expert": "plain units, Gram order",
    }
    rows = []
    for setting, found in read("paper_protocol")["settings"].items():
        naive = mean(pair["naive_barrier"] for pair in found["pairs"])
        left = [100 * mean(pair["barrier"][method] for pair in found["pairs"]) / naive for method in methods]
        rows.append((setting, f"{naive:.3f}", *(f"{share:.1f} %" for share in left)))
    return markdown_table(("reinitialised", "naive barrier, nats", *methods.values()), rows)


def demo() -> str:
    """The two pairs of the paper's protocol in the demo."""
    names = {
        "independent": "independent initialisations",
        "shuffled": "one initialisation, other data, B then shuffled",
    }
    note = (
        f"\nThe ranges are those of {len(read('demo')['runs'])} runs, with one and two threads and with the kernels of older "
        "processors. Training is chaotic:\na difference in the last bit of a sum grows. The text is that of the Python "
        "installation. With the same settings on one machine, figures repeat.\n"
    )
    return markdown_table(("pair", "naive barrier, nats", "aligned", "left"), demo_rows(names)) + note


def upcycled() -> str:
    """Losses of the demo's upcycled pair by domain, and the ranges of the mean over its runs."""
    runs = [run["pairs"]["upcycled"]["references"] for run in read("demo")["runs"]]
    first = runs[0]
    rows = []
    for model, words in MODELS.items():
        if first["mean"].get(model) is not None:
            means = _span([found["mean"][model] for found in runs], ".2f")
            rows.append((words, *(f"{found[model]:.2f}" for found in first["texts"].values()), means))
    return markdown_table(("nats per token", *first["texts"], "mean"), rows)


def demo_rows(pairs: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Words for a pair of the demo, and the ranges of its barriers over the runs: naive, aligned, what is left in percent."""
    rows: list[tuple[str, ...]] = []
    for pair, words in pairs.items():
        found = [run["pairs"][pair] for run in read("demo")["runs"]]
        naive, aligned = ([each[path]["barrier"] for each in found] for path in ("naive", "aligned"))
        left = [each["aligned_percent_of_naive"] for each in found]
        rows.append((words, _span(naive, ".2f"), _span(aligned, ".3f"), f"{_span(left, '.1f')} %"))
    return rows


def protocol_in_brief() -> str:
    """What alignment leaves of the barrier on pairs of the paper's protocol, and where the demo's figures come from."""
    left = {name: found["mean_percent_of_naive"]["default"] for name, found in read("paper_protocol")["settings"].items()}
    return paragraph(
        f"On pairs of the paper's protocol alignment leaves {left['first']:.0f} % of the naive barrier with the first MoE "
        f"block, and {left['last']:.0f} % with the last: [matching.md](docs/matching.md). The demo's figures come from "
        f"`{read('demo')['command']}`."
    )


def _span(values: list[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def verdict() -> str:
    """What `barrier` said of a pair of the demo."""
    return "```text\n" + "\n".join(read("demo")["runs"][0]["sentences"]["upcycled"]) + "\n```\n"


def families() -> str:
    """How many model types are known."""
    from hf_moe_lmc import known_families

    return f"{known_families().summary} [docs/families.md](docs/families.md) lists them.\n"


def costs() -> str:
    """What the benchmarks of docs/costs.md come to."""
    cost = _costs()
    rows = [
        ("plain merge of two checkpoints of 2 GB", "reading A and copying B", cost["large", "floor"]),
        ("the same", "mergekit", cost["large", "mergekit"]),
        ("plain merge of 18,867 small tensors", "mergekit", cost["many", "mergekit"]),
        ("`align` where B is a shuffled fine-tune (noise 0.03)", "the rewrite alone", cost["align", "0.03"]),
        ("`align` at a noise of 0.5", "the rewrite alone", cost["align", "0.5"]),
        ("`align` of unrelated experts", "the rewrite alone", cost["align", "inf"]),
        ("25 points of a path, in one pass over both checkpoints", "25 merges, written and loaded", cost["path", "merges"]),
    ]
    return markdown_table(("work", "compared with", "times as long"), rows)


def costs_in_brief() -> str:
    cost = _costs()
    return paragraph(
        f"On two cores a merge of two checkpoints of 2 GB takes {cost['large', 'floor']} times as long as reading A and "
        f"copying B. It takes {cost['large', 'mergekit']} of mergekit's time. Evaluating 25 points takes one pass over both "
        f"checkpoints, and {cost['path', 'merges']} of the time of 25 merges."
    )


def _costs() -> dict[tuple[str, str], str]:
    """Ratios of times, imports apart: what was measured, and what it is compared with or the noise between A and B."""
    merges = {one["pair"]: one["ours_relative_to_without_imports"] for one in read("merge_bench")["results"]}
    of_noise = read("match_bench")["results"] + read("match_bench_unrelated")["results"]
    seconds = {one["way"]: one["seconds"] for one in read("sweep_bench")["results"] if one["points"] == 25}
    found = {(pair, way): ratio for pair, ways in merges.items() for way, ratio in ways.items()}
    found |= {("align", one["noise"]): one["ratio"] for one in of_noise}
    found["path", "merges"] = seconds["sweep"] / seconds["merges"]
    return {key: f"{ratio:.2f}" for key, ratio in found.items()}


def depth() -> str:
    """Peak memory of the evaluator by the number of layers."""
    rows = [
        (str(one["layers"]), f"{one['checkpoint_bytes'] / 1e9:.1f}", str(one["points"]), f"{one['peak_bytes'] / 1e9:.1f}")
        for one in read("sweep_memory")["results"]
    ]
    return markdown_table(("layers", "each checkpoint, GB", "points", "peak memory, GB"), rows)


def verbs() -> str:
    """The verbs of the command line, in its own words."""
    from render_command_line import parsers

    from hf_moe_lmc.cli.parser import VERBS

    rows = []
    for name, verb in parsers().items():
        usage = str(verb.usage).removeprefix("hf-moe-lmc ").removesuffix(" [options]")
        rows.append((f"`{usage}`", f"{VERBS[name].summary[0].upper()}{VERBS[name].summary[1:]}."))
    return markdown_table(("verb", "does"), rows)


def order_gap() -> str:
    """How far two stages are from the joint optimum, on the protocol's models."""
    settings = read("paper_protocol")["settings"].values()
    ratios = [gap["ratio"] for found in settings for pair in found["pairs"] for gap in pair["order_gap"]]
    optimal = sum(ratio < 1 + 1e-9 for ratio in ratios)
    return paragraph(
        f"On the models of the paper's protocol the order that was kept is the joint optimum in {optimal} of {len(ratios)} "
        f"layers. In the others the distance after stage 2 is at most {100 * (max(ratios) - 1):.1f} % above it: `order_gap` in "
        "`scripts/paper_protocol.json`."
    )


def faults() -> str:
    """Some rows of docs/faults.md."""
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    head = next(line for line in page if line.startswith("| fault |"))
    rows = [line for fault in FAULTS for line in page if line.startswith(f"| {fault} |")]
    return "\n".join([head, "|---|---|---|---|---|", *rows]) + "\n"


def ways() -> str:
    """How the hidden units of an expert may have been matched."""
    from hf_moe_lmc.matching.certificate import CERTIFICATES

    return markdown_table(("way", "says"), [(f"`{way}`", words) for way, words in CERTIFICATES.items()])


def decided() -> str:
    """How the order of the experts may have been chosen."""
    from hf_moe_lmc.matching.result import DECIDED

    return markdown_table(("order_decided", "says"), [(f"`{word}`", words) for word, words in DECIDED.items()])


TABLES: dict[str, Callable[[], str]] = {
    "protocol": protocol,
    "demo": demo,
    "upcycled": upcycled,
    "protocol in brief": protocol_in_brief,
    "verdict": verdict,
    "families": families,
    "costs in brief": costs_in_brief,
    "depth": depth,
    "verbs": verbs,
    "order gap": order_gap,
    "faults": faults,
    "ways": ways,
    "decided": decided,
}


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (filled := fill(text, TABLES)) != text:
            page.write_text(filled, encoding="utf-8")
            print(f"written: {page}")


if __name__ == "__main__":
    main()
