"""The table of model types says what the data say, in every form."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hf_moe_lmc.moe.catalogue import COLUMNS, freedom, known_families
from hf_moe_lmc.moe.notation import ROUTER_KINDS, UNIT_KINDS
from hf_moe_lmc.moe.registry import families, refusals

ROOT = Path(__file__).resolve().parents[2]
ENTRIES = {entry.model_type: entry for entry in known_families().entries}


def test_the_committed_table_is_the_one_that_the_data_give() -> None:
    committed = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert committed == known_families().markdown(), "run: python scripts/render_families.py"
    named = set(re.findall(r"^\| `([^`]+)` \|", committed, re.MULTILINE))
    assert families().keys() | refusals().keys() <= named and all(reason in committed for reason in refusals().values())


def test_the_terminal_and_json_have_a_row_for_every_model_type() -> None:
    known = known_families()
    lines = known.table().splitlines()
    starts = {line.split()[0] for line in lines if line}
    assert families().keys() | refusals().keys() | UNIT_KINDS.keys() <= starts
    assert max(map(len, lines)) <= 160
    listed = json.loads(json.dumps(known.to_dict()))
    assert [row["model_type"] for row in listed["supported"]] == sorted(families())
    assert listed["refused"] == refusals()


@pytest.mark.parametrize(
    ("model_type", "cells"),
    [
        ("mixtral", {"router": "softmax", "experts": "S_E", "hidden units": "swiglu: sign and scale", "moves along": "-"}),
        ("mixtral", {"shared expert": "-", "on disk": "per expert; fused"}),
        ("qwen2_moe", {"shared expert": "swiglu, gated"}),
        ("deepseek_v3", {"experts": "S_E or S_{E/G} wr S_G where n_group groups bind", "moves along": "correction bias"}),
        ("deepseek_v4", {"router": "as scoring_func says", "moves along": "correction bias, expert table"}),
        ("deepseek_v4", {"hidden units": "clamped: sign, or swiglu: sign and scale", "shared expert": "clamped or swiglu"}),
        ("hy_v4", {"hidden units": "clamped: sign", "shared expert": "swiglu"}),
        ("phimoe", {"router": "sparsemixer or softmax"}),
        ("gpt_oss", {"on disk": "fused transposed interleaved", "moves along": "router bias, biases of experts"}),
        ("gemma4_text", {"moves along": "expert scale"}),
        ("dbrx", {"on disk": "block-stacked"}),
        ("switch_transformers", {"on disk": "module dict"}),
        ("qwen3_vl_moe", {"on disk": "fused; fused transposed"}),
        ("step3p5", {"on disk": "fused; fused, gate and up apart"}),
        ("longcat_flash", {"experts": "S_E; zero: S_{zero_expert_num}"}),
        ("zaya", {"experts": "S_E; skip: fixed"}),
        ("ernie4_5_vl_moe_text", {"experts": "S_E; vision: S_E", "hidden units": "swiglu: sign and scale; vision: swiglu"}),
        ("jetmoe", {"hidden units": "swiglu: sign and scale; attention: rigid"}),
    ],
)
def test_a_row_is_what_the_notation_says(model_type: str, cells: dict[str, str]) -> None:
    row = ENTRIES[model_type].cells(brief=False)
    assert {name: row[name] for name in cells} == cells


def test_every_kind_that_data_can_give_is_a_known_one_and_every_cell_is_filled() -> None:
    for entry in ENTRIES.values():
        assert all(kind in ROUTER_KINDS or kind.startswith("as ") for kind in entry.router), entry
        assert {kind for bank in entry.banks for kind in bank.units} | set(entry.shared) <= UNIT_KINDS.keys(), entry
        for brief in (True, False):
            assert list(entry.cells(brief=brief)) == list(COLUMNS) and all(entry.cells(brief=brief).values()), entry
    # different words for what differs in sign, scale or order
    assert len({freedom(kind) for kind in UNIT_KINDS.values()}) == len(
        {(kind.permutation, kind.sign, kind.scale) for kind in UNIT_KINDS.values()}
    )
