"""Matched layers in a workspace: read back as they were, those of the first release too."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.errors import OutputError
from hf_moe_lmc.matching.records import matchings, write_matching
from hf_moe_lmc.matching.report import layer_report
from hf_moe_lmc.matching.result import BankMatching, Matching, SharedMatching
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.workspace import ResultFolder

DATA = Path(__file__).parent / "data"  # layer 7 as release 0.1.0 wrote it, in a workspace and in alignment.json


def matching() -> Matching:
    """That layer, put together anew."""
    first = BankMatching(
        symmetry=BankSymmetry(
            torch.tensor([2, 3, 1, 0]),
            torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1]]),
            torch.tensor([[1.0, -0.5], [2, 1], [-1, 1], [1, 0.25]]),
        ),
        order_method="expert",
        candidates={"gate": 1.5, "expert": 1.25},
        expert_cost_form="sketch of 16 columns from both sides",
        norm=2.5,
        distance_before=2.25,
        distance_after_order=2.0,
        distance_after_units=1.25,
        router_distance_before=1.0,
        router_distance_after=0.5,
        order_decided="margin",
        order_margin=0.375,
        certificates=["small", "sketch", "exact", "partly exact"],
    )
    vision = BankMatching(
        symmetry=BankSymmetry(
            torch.tensor([1, 0]), torch.tensor([[2, 0, 1], [0, 1, 2]]), torch.tensor([[1.0, -1, 1], [-1, 1, 1]])
        ),
        order_method="gate",
        candidates={"gate": 3.25, "expert": 3.5},
        expert_cost_form="gram",
        norm=5.0,
        distance_before=4.5,
        distance_after_order=4.0,
        distance_after_units=3.25,
        router_distance_before=2.0,
        router_distance_after=1.0,
        order_decided="distance",
        order_margin=None,
        certificates=["small", "sketch"],
    )
    shared = SharedMatching(UnitSymmetry(torch.tensor([3, 1, 0, 2]), torch.tensor([-1.0, 1, 4, 1])), 0.75, 0.25, "small")
    return Matching({FIRST: first, "vision": vision}, shared, {FIRST: 0.5, "vision": 0.125})


def test_a_layer_of_the_first_release_is_read_and_written_again_to_its_bytes(tmp_path: Path) -> None:
    ((index, found),) = matchings(ResultFolder(DATA))
    assert (index, found) == (7, matching())
    assert (found.first.scales_kept, found.banks["vision"].scales_kept, found.shared.scales_kept) == (3, 0, 1)
    write_matching(ResultFolder(tmp_path), 7, matching())
    assert (tmp_path / "layer-7.safetensors").read_bytes() == (DATA / "layer-7.safetensors").read_bytes()
    assert json.dumps(layer_report(7, found)) + "\n" == (DATA / "layer-7.json").read_text()


def test_without_shared_expert_and_further_banks_it_is_read_back_as_well(tmp_path: Path) -> None:
    whole = matching()
    alone = Matching({FIRST: whole.first}, SharedMatching(UnitSymmetry.identity(0)), {FIRST: 0.5})
    write_matching(ResultFolder(tmp_path), 3, alone)
    assert dict(matchings(ResultFolder(tmp_path))) == {3: alone} != {3: whole}
    report = layer_report(3, alone)
    assert (
        "banks" not in report and report["shared_way"] is None and report["ways"] == dict.fromkeys(whole.first.certificates, 1)
    )


@pytest.mark.parametrize(
    "damage",
    [lambda text: text.replace("norm", "mron"), lambda text: text.replace("vision", "image"), lambda text: text[:-9]],
)
def test_a_damaged_layer_is_refused_by_name(tmp_path: Path, damage: Callable[[str], str]) -> None:
    saved = ModelSymmetry.load(DATA / "layer-7.safetensors")
    file = tmp_path / "layer-7.safetensors"
    saved.save(file)
    assert len(list(matchings(ResultFolder(tmp_path)))) == 1
    replace(saved, metadata={"matching": damage(saved.metadata["matching"])}).save(file)
    with pytest.raises(OutputError, match=r"layer-7\.safetensors: cannot be continued from"):
        list(matchings(ResultFolder(tmp_path)))
