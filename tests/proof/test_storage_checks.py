"""Storage formats carry the order of experts, and a move that leaves the scales is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.moe.reading import read_model
from hf_moe_lmc.proof import storage_checks as proof
from hf_moe_lmc.proof.miniature import build, shrink
from tests.formats.published import LAYOUTS

CASES = ["qwen3_moe", "mixtral", "gpt_oss", "int4", "int8", "nvfp4, modelopt"]


def _checks(folder: Path, name: str, output: Path) -> list[proof.Check]:
    layout = LAYOUTS[name]
    config = shrink(transformers.CONFIG_MAPPING[layout.family]())
    for key, value in layout.sizes.items():
        setattr(config.get_text_config(), key, value)
    with Checkpoint.open(folder) as checkpoint:
        family = read_model(checkpoint).family
    output.mkdir()
    return list(proof.storage_checks(family, build(config), folder, output))


@pytest.mark.parametrize("name", CASES)
def test_formats_carry_the_order_of_experts(quantized: Callable[..., Path], tmp_path: Path, name: str) -> None:
    values, outputs, control = _checks(quantized(name), name, tmp_path / "out")
    assert values.difference == 0
    assert outputs.passed and control.passed and control.control


def test_a_move_that_leaves_the_scales_fails(
    quantized: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, right = quantized("qwen3_moe"), proof.write

    def broken(stream: Any, output: Path) -> Path:
        right(stream, output)
        with Checkpoint.open(folder) as checkpoint:
            proof._leave_scales(read_model(checkpoint), folder, output)
        return output

    monkeypatch.setattr(proof, "write", broken)
    values, outputs, _ = _checks(folder, "qwen3_moe", tmp_path / "out")
    assert not values.passed and not outputs.passed
