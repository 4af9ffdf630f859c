from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # only tests/test_hub.py talks to a server, its own

import pytest
import torch
import transformers

from tests import tiny

torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], Path]:
    """(family, layout, seed) -> folder of a tiny checkpoint, made once. Read only: copy before changing it."""
    made: dict[tuple[str, str, int], Path] = {}

    def get(family: str, layout: str = "per-expert", seed: int = 0) -> Path:
        key = (family, layout, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}-{seed}-")
            made[key] = tiny.save(tiny.make_model(family, seed), folder, layout)
        return made[key]

    return get


@pytest.fixture
def copy(saved: Callable[[str, str, int], Path], tmp_path: Path) -> Callable[..., Path]:
    """(family, layout, seed) -> a copy that the test may change."""

    def get(family: str, layout: str = "per-expert", seed: int = 0, name: str = "copy") -> Path:
        return Path(shutil.copytree(saved(family, layout, seed), tmp_path / name))

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("The expert that answers is the one the router picked. " * 12, encoding="utf-8")
    return path
