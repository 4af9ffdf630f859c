"""Matched layers on disk in the workspace of an output, read back by the same call after a stop.

A layer is one file: its group element as a saved symmetry, and the rest as JSON in the metadata, the further banks below
`others`. The first bank's entry names the shared expert's distances, and counts it in `scales_kept`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.matching.result import Matching
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.results import ENDING, ResultFolder


def write_matching(kept: ResultFolder, index: int, matching: Matching) -> None:
    """Has a layer on disk, before anything is written that depends on it."""
    entries = {name: {**matching.numbers(name), "others": {}} for name in matching.banks}
    numbers = {**entries.pop(FIRST), "others": entries}
    with kept.new(f"layer-{index}{ENDING}") as path:
        metadata = {"matching": json.dumps(numbers, allow_nan=False)}
        ModelSymmetry("", 1, {index: matching.symmetry}, metadata).save(path)


def matchings(kept: ResultFolder) -> Iterator[tuple[int, Matching]]:
    """What `write_matching` left there; raises OutputError where a file is damaged."""
    for name in sorted(kept.names()):
        index = int(name.removeprefix("layer-"))
        try:
            saved = ModelSymmetry.load(kept.path(name + ENDING))
            numbers = json.loads(saved.metadata["matching"])
            yield index, Matching.of_numbers({FIRST: numbers, **numbers["others"]}, saved.layers[index])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise kept.damaged(name, error) from error
