"""The worked examples in docstrings run."""

from __future__ import annotations

import doctest
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch

import hf_moe_lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe import registry
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof.checks import write
from hf_moe_lmc.writing.streams import rewritten

ROOMS = ("matching", "moe", "symmetry")
MODULES = [
    f"hf_moe_lmc.{room}.{module.name}"
    for room in ROOMS
    for module in iter_modules(import_module(f"hf_moe_lmc.{room}").__path__)
]
WORKED = {  # public things that show how they are used
    "hf_moe_lmc.matching.alignment": "align_models",
    "hf_moe_lmc.matching.blocks": "match_layer",
    "hf_moe_lmc.matching.options": "WeightMatching",
    "hf_moe_lmc.moe.family": "MoEFamily",
    "hf_moe_lmc.moe.registry": "register",
    "hf_moe_lmc.symmetry.group": "LayerSymmetry ModelSymmetry",
}


@pytest.fixture(scope="module")
def names(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What examples call `a` (a small model), `b` (the same in other coordinates) and `g` (what has moved it there)."""
    a = read_model(Checkpoint.open(saved("mixtral")))
    g = a.random(torch.Generator().manual_seed(0), scale=2.0)
    moved = write(rewritten(a, g.layers), tmp_path_factory.mktemp("docstrings") / "b")
    return {"a": a, "b": read_model(Checkpoint.open(moved)), "g": g, "lmc": hf_moe_lmc}


@pytest.fixture(scope="module")
def folder(saved: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where examples find the checkpoints `model-a` and `model-b`."""
    place = tmp_path_factory.mktemp("examples")
    for seed, name in enumerate(("model-a", "model-b")):
        shutil.copytree(saved("mixtral", "per-expert", seed), place / name)
    return place


@pytest.mark.filterwarnings("ignore:outside the MoE blocks")
@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_run(
    module: str, names: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_FAMILIES", registry.families())  # examples may register families: in a copy
    found = import_module(module)
    examples = doctest.DocTestFinder(exclude_empty=True).find(found, module, extraglobs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for example in examples:
        runner.run(example, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)
    with_examples = {example.name.removeprefix(f"{module}.") for example in examples if example.examples}
    assert set(WORKED.get(module, "").split()) <= with_examples
