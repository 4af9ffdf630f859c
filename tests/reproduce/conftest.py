"""A run so small that it takes seconds: tiny models, few steps, a text of random tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

from hf_moe_lmc.moe import registry
from tests.scripts import script


@pytest.fixture(scope="package")
def reproduce() -> Iterator[dict[str, ModuleType]]:
    """The modules of scripts/reproduce by name; what they register is known to these tests alone."""
    names = ("models", "data", "settings", "training", "paths", "claims", "work", "tables", "drawing", "__main__")
    found = {name: script(f"reproduce.{name}") for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found["training"], "INIT_STD", 0.3)  # so that blocks which were hardly trained matter
        patch.setattr(registry, "_FAMILIES", dict(registry.families()))
        mappings = CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        for mapping in mappings:
            patch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
        found["models"].register_models()
        yield found
        found["models"].register_models.cache_clear()


def tiny_text(data: ModuleType) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (3000,), generator=generator)
    facts = {"source": "random tokens", "train_tokens": 3000, "test_tokens": 256}
    test = torch.randint(64, (8, 32), generator=generator)
    return data.Text(rows, test, 64, {**data.proof_of_no_overlap(rows, test.flatten()), "training_tokens_cut_out": 0}, facts)


def tiny_images(data: ModuleType) -> Any:
    generator = torch.Generator().manual_seed(0)
    pixels, labels = torch.randn(60, 1, 8, 8, generator=generator), torch.arange(60) % 10
    facts = {"source": "noise", "train_images": 40, "test_images": 20, "training_images_left_out_because_tested": 0}
    return data.Images(pixels[:40], labels[:40], pixels[40:], labels[40:], 10, facts)


@pytest.fixture(scope="package")
def tiny_run(reproduce: dict[str, ModuleType]) -> Any:
    """QUICK with models of 16 units that are trained for a few steps."""
    settings = reproduce["settings"]
    size = settings.Size(16, 2, 16, 8, settings.Recipe(4, 1e-2, 4), settings.Recipe(12, 5e-2, 4))
    return replace(settings.QUICK, sizes={"text": size, "vision": size}, deep=size, test_tokens=256)


@pytest.fixture(scope="package")
def place(reproduce: dict[str, ModuleType], tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Its folder, with the data already prepared."""
    root: Path = tmp_path_factory.mktemp("reproduction")
    place = reproduce["work"].Place(root, tiny_run, "cpu", {}, None, time.time() + 600)
    for name, make in (("docs", tiny_text), ("digits", tiny_images)):
        place.data(name).parent.mkdir(exist_ok=True)
        reproduce["data"].save(make(reproduce["data"]), place.data(name))
    return place
