"""The README quotes what scripts measured, and describes the commands that exist."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import hf_moe_lmc
from hf_moe_lmc.cli.parser import parser
from hf_moe_lmc.moe.family import MoEFamily

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_measured_figure_is_in_the_json_beside_its_script() -> None:
    protocol = json.loads((ROOT / "scripts" / "paper_protocol.json").read_text())
    for name, setting in protocol["settings"].items():
        shares = " | ".join(f"{value:.1f} %" for value in setting["mean_percent_of_naive"].values())
        assert f"| {name} | {setting['mean_naive_barrier']:.3f} | {shares} |" in README
    # the goals: mean aligned barrier with default options, as a share of the naive one
    assert protocol["settings"]["first"]["mean_percent_of_naive"]["default"] <= 28
    assert protocol["settings"]["last"]["mean_percent_of_naive"]["default"] <= 42
    for pair in json.loads((ROOT / "scripts" / "demo.json").read_text())["pairs"].values():
        barriers = f"{pair['naive']['barrier']:.3f} | {pair['aligned']['barrier']:.3f}"
        assert f"{barriers} | {pair['aligned_percent_of_naive']:.1f} %" in README


def test_the_commands_parse_and_the_links_lead_somewhere() -> None:
    commands = re.findall(r"^hf-moe-lmc ((?:.*\\\n)*.*)", README, re.MULTILINE)
    assert len(commands) >= 6
    for command in commands:
        parser().parse_args(command.replace("\\\n", " ").split())
    for path in re.findall(r"(?:\]\(|bash )((?:model_cards|scripts|docs|hf_moe_lmc)/[\w./-]+)", README):
        assert (ROOT / path).exists(), path


def test_every_module_has_its_place_on_the_map_and_every_verb_is_described() -> None:
    modules = {path.stem for path in (ROOT / "hf_moe_lmc").glob("*.py")} - {"__init__", "__main__"}
    table = README[README.index("### Where things live") : README.index("## Families")]
    assert not [module for module in modules if f"`{module}`" not in table]
    assert all(f"lmc.{verb}(" in README or f"`{verb}" in README for verb in hf_moe_lmc.__all__ if verb.islower())
    verbs = next(action for action in parser()._actions if action.choices is not None).choices
    assert not [verb for verb in verbs if not re.search(rf"^\| `{verb}[ `]", README, re.MULTILINE)]


def test_the_readme_counts_the_families_and_leads_to_their_table() -> None:
    assert hf_moe_lmc.known_families().summary.removesuffix(".") in README
    assert "](docs/families.md)" in README


def test_the_example_of_a_family_is_one() -> None:
    example = README[README.index("register(\n    MoEFamily(") :]
    example = example[: example.index("\n```")]
    family = eval(example, {"MoEFamily": MoEFamily, "register": lambda family: family})
    config = SimpleNamespace(n_routed_experts=8, zero_expert_num=2, moe_intermediate_size=4, hidden_size=6, use_bias=True)
    facts = family.at(config, 0)
    assert family.banks == ("", "zero") and facts.units["zero"].name == "rigid" and facts.sizes["zero.expert"] == 2
    assert family.evaluate(family.moe_layers, config, layer=0)


def test_the_costs_are_those_that_were_measured() -> None:
    spec = importlib.util.spec_from_file_location("render_costs", ROOT / "scripts" / "render_costs.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (ROOT / "docs" / "costs.md").read_text() == script.markdown(), "run: python scripts/render_costs.py"
    merges = {one["pair"]: one for one in script.read("merge_bench")["results"]}
    of_noise = script.read("match_bench")["results"] + script.read("match_bench_unrelated")["results"]
    ratio = {one["noise"]: one["ratio"] for one in of_noise}
    seconds = {one["way"]: one["seconds"] for one in script.read("sweep_bench")["results"] if one["points"] == 25}
    large, many = (merges[name]["ours_relative_to_without_imports"] for name in ("large", "many"))
    text = " ".join(README[README.index("### Costs") : README.index("### Conventions")].split())
    for said in (
        f"{large['floor']:.2f} times as long as reading A and copying B",
        f"{large['mergekit']:.2f} of mergekit's time",
        f"it takes {many['mergekit']:.2f} of that",
        f"{ratio['0.03']:.1f} times as long as the rewrite",
        f"{ratio['0.5']:.1f} times at a noise of 0.5",
        f"{ratio['inf']:.0f} times where the experts",
        f"{seconds['sweep'] / seconds['merges']:.2f} of the time of 25 merges",
    ):
        assert said in text, said
