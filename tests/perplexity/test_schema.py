"""The schemas in the package describe every key; that of report.json refuses what is no report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.perplexity.reports import on_documents
from tests.schemas import ALIGNMENT, BY_ID, REPORT, check_report, declared, seen


@pytest.fixture
def content() -> dict[str, Any]:
    """Of a report that fits the schema."""
    found: dict[str, Any] = json.loads(on_documents().to_json())
    check_report(found)
    return found


def parts(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """All objects of a schema that stand for a value, by their place."""
    if isinstance(schema, dict):
        if place.split("/")[-1] not in ("properties", "$defs"):
            yield place, schema
        for key, below in schema.items():
            yield from parts(below, f"{place}/{key}")


@pytest.mark.parametrize("schema", BY_ID.values(), ids=lambda schema: schema["title"])
def test_every_key_is_described_and_every_number_has_a_unit(schema: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema)
    described = [(place, node) for place, node in parts(schema) if place.split("/")[-2:-1] == ["properties"]]
    assert len(described) > 40 or schema not in (REPORT, ALIGNMENT)
    assert set(schema["required"]) <= schema["properties"].keys()
    for place, node in described:
        assert node["description"].endswith("."), place
        assert {"type", "$ref", "anyOf"} & node.keys(), place
        if {("", "number"), ("[]", "number"), ("[][]", "number")} & declared(node, schema):
            assert "unit" in node, place


def test_every_key_that_a_report_always_has_is_required(content: dict[str, Any]) -> None:
    for path in ([], ["a"], ["evaluation"], ["paths", "aligned"], ["windows"], ["summary"], ["statistics"]):
        part: Any = content
        for key in path:
            part = part[key]
        for key in part:
            broken = copy.deepcopy(content)
            within: Any = broken
            for step in path:
                within = within[step]
            del within[key]
            with pytest.raises(AssertionError, match=f"'{key}' is a required property"):
                check_report(broken)
    for name in ("aligned", "naive"):  # a merge may have one of them alone
        check_report({**content, "paths": {name: content["paths"][name]}})
    with pytest.raises(AssertionError, match=r"\$\.paths: "):
        check_report({**content, "paths": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=2), r"\$\.version"),
        (lambda r: r.update(seconds="1.0"), r"\$\.seconds: '1.0' is not of type 'number'"),
        (lambda r: r.update(warnings="none"), r"\$\.warnings"),
        (lambda r: r["paths"]["aligned"].update(barrier="0.2"), r"\$\.paths\.aligned\.barrier: '0.2' is not of type"),
        (lambda r: r["paths"]["aligned"].update(barrier=-0.2), r"\$\.paths\.aligned\.barrier"),
        (lambda r: r["paths"]["naive"]["t"].append(1.5), r"\$\.paths\.naive\.t\[9\]: 1.5 is greater than the maximum"),
        (lambda r: r["paths"]["naive"]["t"].insert(0, -0.5), r"\$\.paths\.naive\.t\[0\]"),
        (lambda r: r["paths"]["aligned"]["barrier_interval"].pop(), r"\$\.paths\.aligned\.barrier_interval"),
        (lambda r: r["paths"]["aligned"]["window_nll"][3].clear(), r"\$\.paths\.aligned\.window_nll\[3\]"),
        (lambda r: r["evaluation"].update(mode="elsewhere"), r"\$\.evaluation\.mode"),
        (lambda r: r["evaluation"].update(tokens_read=1.5), r"\$\.evaluation\.tokens_read"),
        (lambda r: r["evaluation"].update(text_hash="none"), r"\$\.evaluation\.text_hash"),
        (lambda r: r["evaluation"].update(text={"kind": "files"}), r"\$\.evaluation\.text"),
        (lambda r: r.update(matching={}), r"\$\.matching"),
        (lambda r: r.update(layerwise=[{"barrier": 0.1, "barrier_interval": None, "t": [0, 1], "nll": [1, 2]}]), "layerwise"),
        (lambda r: r.update(routing=[{"path": "aligned"}]), r"\$\.routing\[0\]: .* is a required property"),
    ],
)
def test_what_is_no_report_is_refused_with_the_place(
    content: dict[str, Any], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(content)
    with pytest.raises(AssertionError, match=message):
        check_report(content)


def test_later_versions_may_add_keys(content: dict[str, Any]) -> None:
    for part in (content, content["paths"]["aligned"], content["summary"], content["evaluation"], content["statistics"]):
        part["new"] = {"of": "a later version"}
    check_report(content)


def test_key_paths_show_what_a_schema_lacks(content: dict[str, Any]) -> None:
    assert seen(content, REPORT) <= declared(REPORT)
    content["paths"]["aligned"]["new"] = [1.0]
    content["windows"]["tokens"][0] = "4"
    content["versions"]["another"] = "1.0"
    assert seen(content, REPORT) - declared(REPORT) == {
        (".paths.aligned.new", "array"),
        (".paths.aligned.new[]", "number"),
        (".windows.tokens[]", "string"),
    }
    assert {(".layers[].banks", "object"), (".layers[].norm", "number")} <= declared(ALIGNMENT)
    assert not [path for path, _ in declared(ALIGNMENT) if ".banks." in path]  # a bank has the key paths of its layer
