"""Checks of JSON documents against the schemas in the package, and the key paths of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from referencing import Registry, Resource

Schema = Mapping[str, Any]
KeyPaths = set[tuple[str, str]]  # (key path, type): `layers[].candidates.*` is a number


def _schema(room: str, file: str) -> Schema:
    found: Schema = json.loads(files(f"hf_moe_lmc.{room}").joinpath(f"{file}.schema.json").read_text(encoding="utf-8"))
    return found


ALIGNMENT, REPORT = _schema("matching", "alignment"), _schema("perplexity", "report")
INSPECTION, PLAN, COMPARISON = (_schema("verbs", name) for name in ("inspection", "plan", "comparison"))
SELFTEST, FAMILIES = _schema("proof", "selftest"), _schema("moe", "families")
BY_ID = {schema["$id"]: schema for schema in (REPORT, ALIGNMENT, INSPECTION, PLAN, SELFTEST, FAMILIES, COMPARISON)}
REGISTRY = Registry().with_resources((uri, Resource.from_contents(schema)) for uri, schema in BY_ID.items())
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object", type(None): "null"}


def check_report(report: dict[str, Any]) -> None:
    """Fails, naming the place, unless this is the content of a report.json."""
    check(report, REPORT)


def check_alignment(alignment: dict[str, Any]) -> None:
    """Fails, naming the place, unless this is the content of an alignment.json."""
    check(alignment, ALIGNMENT)


def check(value: Any, schema: Schema) -> None:
    """Fails, naming the place, unless a value is what a schema describes."""
    error = best_match(Draft202012Validator(schema, registry=REGISTRY).iter_errors(value))
    assert error is None, f"{schema['title']}, {error.json_path}: {error.message}"


@dataclass(frozen=True)
class Node:
    """A part of a schema at a key path.

    Attributes:
        root: the schema that its references are looked up in.
        entered: key path of each definition that it lies in; a definition within itself keeps the key path of the outer one.
    """

    schema: Schema
    root: Schema
    path: str = ""
    entered: Mapping[str, str] = field(default_factory=dict)

    def alternatives(self) -> Iterator[Node]:
        """What the part stands for, references resolved: itself, or the members of its `anyOf`."""
        reference = self.schema.get("$ref")
        if reference is not None:
            uri, _, name = reference.partition("#/$defs/")
            root = BY_ID[uri] if uri else self.root
            place = f"{root['$id']}#{name}"
            path = self.entered.get(place, self.path)
            entered = {**self.entered, place: path}
            yield from Node(root["$defs"][name] if name else root, root, path, entered).alternatives()
        elif "anyOf" in self.schema:
            for member in self.schema["anyOf"]:
                yield from replace(self, schema=member).alternatives()
        else:
            yield self

    def fitting(self, value: Any) -> Node:
        """The first alternative that a value is valid for, or else the first."""
        nodes = list(self.alternatives())
        return next((node for node in nodes if node.accepts(value)), nodes[0])

    def accepts(self, value: Any) -> bool:
        standalone = {**{key: self.root[key] for key in ("$id", "$defs")}, **self.schema}
        return Draft202012Validator(standalone, registry=REGISTRY).is_valid(value)

    def below(self, key: str | None) -> Node:
        """The part for a key of an object, or with None for an element of an array; an empty one where there is none."""
        if key is None:
            schema, step = self.schema.get("items"), "[]"
        elif key in self.schema.get("properties", {}):
            schema, step = self.schema["properties"][key], f".{key}"
        else:
            schema = self.schema.get("additionalProperties")
            step = f".{key}" if schema is None else ".*"
        return replace(self, schema=schema or {}, path=self.path + step)


def declared(schema: Schema, root: Schema | None = None) -> KeyPaths:
    """All key paths of a schema, or of a part of the schema `root`, with their types.

    A definition within itself is entered once: a bank of experts has the key paths of its layer.
    """
    return set(_declared(Node(schema, root or schema)))


def _declared(parent: Node) -> Iterator[tuple[str, str]]:
    for node in parent.alternatives():
        types = node.schema.get("type", [])
        yield from ((node.path, name) for name in ([types] if isinstance(types, str) else types))
        if node.path != parent.path:
            continue  # within itself
        for key in node.schema.get("properties", {}):
            yield from _declared(node.below(key))
        if "items" in node.schema:
            yield from _declared(node.below(None))
        if "additionalProperties" in node.schema:
            yield from _declared(node.below("*"))


def seen(value: Any, schema: Schema) -> KeyPaths:
    """All key paths of a value with their types, in the terms of `declared`; others than the schema's by their own names."""
    return set(_seen(value, Node(schema, schema)))


def _seen(value: Any, parent: Node) -> Iterator[tuple[str, str]]:
    node = parent.fitting(value)
    yield node.path, TYPES[type(value)]
    if isinstance(value, dict):
        for key, member in value.items():
            yield from _seen(member, node.below(key))
    elif isinstance(value, list):
        for member in value:
            yield from _seen(member, node.below(None))
