"""What is done of a long job, kept in its workplace: matched layers and losses, read back by the same call after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.matching.blocks import Matching
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.writing.results import ENDING, Kept


def write_matching(kept: Kept, index: int, matching: Matching) -> None:
    """Has a layer on disk, before anything is written that depends on it."""
    with kept.new(f"layer-{index}{ENDING}") as path:
        metadata = {"matching": json.dumps(_numbers(matching), allow_nan=False)}
        ModelSymmetry("", 1, {index: matching.symmetry}, metadata).save(path)


def matchings(kept: Kept) -> Iterator[tuple[int, Matching]]:
    """What `write_matching` left there; raises OutputError where a file is damaged."""
    for name in sorted(kept.names()):
        index = int(name.removeprefix("layer-"))
        try:
            saved = ModelSymmetry.load(kept.path(name + ENDING))
            yield index, _matching(json.loads(saved.metadata["matching"]), saved.layers[index])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise kept.damaged(name, error) from error


def _numbers(matching: Matching) -> dict[str, Any]:
    """All of a matching but its symmetry."""
    plain = [field.name for field in fields(matching) if field.name not in ("symmetry", "others")]
    values = {name: getattr(matching, name) for name in plain}
    return {**values, "others": {name: _numbers(other) for name, other in matching.others.items()}}


def _matching(numbers: Mapping[str, Any], symmetry: LayerSymmetry) -> Matching:
    """The inverse of `_numbers`. A further bank's matching holds that bank's element alone."""
    others = {name: _matching(other, replace(symmetry.others[name], others={})) for name, other in numbers["others"].items()}
    return Matching(**{**numbers, "symmetry": symmetry, "others": others})
