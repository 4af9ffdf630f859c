from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.formats.published import LAYOUTS, save


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saved checkpoints by layout and seed, each made once."""
    made: dict[tuple[str, int], Path] = {}

    def get(name: str, seed: int = 0) -> Path:
        if (name, seed) not in made:
            made[name, seed] = save(LAYOUTS[name], tmp_path_factory.mktemp("quantized") / "model", seed)
        return made[name, seed]

    return get
