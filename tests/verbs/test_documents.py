"""What `inspect`, `selftest`, `families` and a dry run print as JSON: the key paths are those of the schemas, all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_moe_lmc.moe.catalogue import known_families
from hf_moe_lmc.moe.notation import ROUTER_KINDS, UNIT_KINDS
from hf_moe_lmc.proof.verdict import Check, SelfTest, StorageCheck, StorageProof
from hf_moe_lmc.runtime.documents import as_json
from hf_moe_lmc.verbs.inspect import _HEADS, Inspection, inspect
from hf_moe_lmc.verbs.merge import plan_merge
from hf_moe_lmc.verbs.planning import Plan
from tests import tiny, zoo
from tests.matching.test_ties import tie
from tests.schemas import FAMILIES, INSPECTION, PLAN, SELFTEST, KeyPaths, Schema, check, declared, seen
from tests.verbs.test_alignment import miniature

COMMIT = "0" * 40


def paths(schema: Schema, *documents: Any) -> KeyPaths:
    """The key paths of some documents, which fit the schema."""
    found = set()
    for document in documents:
        content = json.loads(as_json(document.to_dict()))
        check(content, schema)
        found |= seen(content, schema)
    return found


@pytest.fixture(scope="module")
def inspections(
    saved: Callable[..., Path], quantized: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Inspection]:
    """With further banks, ties, quantized weights; some with values that tests have no checkpoint for."""
    folder = tmp_path_factory.mktemp("inspected")
    tied = tiny.save(tie(tiny.make_model("mixtral"), [[1, 4]]), folder / "tied", "fused")
    zoo.needs("longcat_flash")
    whole = [
        inspect(saved("qwen2_moe")),
        inspect(miniature("longcat_flash", folder / "banks", 0)),
        inspect(quantized("qwen3_moe")),
        inspect(tied),
    ]
    away = replace(whole[0], commit=COMMIT, router_ties=None, redundant_head="not compared")
    ties = {"1": [[0, "zero.2"]]}
    return [*whole, away, replace(whole[1], tower="model.language_model.", read_as="qwen2_moe", router_ties=ties)]


def test_the_key_paths_of_inspections_are_those_of_the_schema(inspections: list[Inspection]) -> None:
    found = paths(INSPECTION, *inspections, replace(inspections[0], ignored_buffers=("rotary.inv_freq",)))
    assert found == declared(INSPECTION), (found - declared(INSPECTION), declared(INSPECTION) - found)
    assert (".banks.*", "object") in declared(INSPECTION) - paths(INSPECTION, inspections[0])  # the control


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router": "hash"}, r"\$\.router: 'hash' is not one of"),
        ({"commit": "main"}, r"\$\.commit"),
        ({"experts": "8"}, r"\$\.experts"),
        ({"router_ties": {"1": [[3]]}}, r"\$\.router_ties"),
        ({"redundant_head": ""}, r"\$\.redundant_head"),
    ],
)
def test_what_is_no_inspection_is_refused(inspections: list[Inspection], change: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check({**json.loads(as_json(inspections[0].to_dict())), **change}, INSPECTION)


def test_the_key_paths_of_plans_are_those_of_the_schema(saved: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    a, b = saved("qwen2_moe"), saved("qwen2_moe", "per-expert", 1)
    plans: list[Plan] = [
        plan_merge(a, b, tmp_path / "out", [0.3, 0.5]),
        plan_merge(a, b, tmp_path / "out", "best", text=text_file, points=3),
        plan_merge(a, b, tmp_path / "out", align=False),
        plan_merge(a, b, tmp_path / "out", repair="norms"),
    ]
    found = paths(PLAN, *plans, replace(plans[0], problem="no room", read_rate=None, seconds=None))
    assert found == declared(PLAN), (found - declared(PLAN), declared(PLAN) - found)
    with pytest.raises(AssertionError, match=r"\$\.bytes_to_write"):
        check({**plans[0].to_dict(), "bytes_to_write": -1}, PLAN)


def test_the_key_paths_of_selftests_are_those_of_the_schema() -> None:
    checks = Check("expert order", 3e-7, control=False), Check("router left", math.nan, control=True)
    stored = StorageCheck("expert order: values", 0.0, control=False, exact=True), StorageCheck("", math.nan, control=True)
    tests = [
        SelfTest("mixtral", "mixtral", checks, StorageProof("MXFP4", stored, ("a vision tower",))),
        SelfTest("mixtral", "mixtral", checks, StorageProof("MXFP4", (), ("no small model can be stored so",))),
    ]
    found = paths(SELFTEST, *tests)
    assert found == declared(SELFTEST), (found - declared(SELFTEST), declared(SELFTEST) - found)
    plain = paths(SELFTEST, SelfTest("mixtral", "mixtral", checks))
    assert found > plain and not [path for path, _ in plain if "storage" in path]
    with pytest.raises(AssertionError, match=r"\$\.checks"):
        paths(SELFTEST, SelfTest("mixtral", "mixtral", ()))


def test_the_key_paths_of_the_catalogue_are_those_of_the_schema() -> None:
    found = paths(FAMILIES, known_families())
    assert found == declared(FAMILIES), (found - declared(FAMILIES), declared(FAMILIES) - found)


def test_the_words_of_the_schemas_are_those_of_the_code() -> None:
    properties = INSPECTION["properties"]
    for words, expected in (
        (properties["router"]["enum"], ROUTER_KINDS),
        (INSPECTION["$defs"]["unit_kind"]["enum"], UNIT_KINDS),
        ([*properties["redundant_head"]["anyOf"][0]["enum"], None], _HEADS),
    ):
        assert set(words) == set(expected)
