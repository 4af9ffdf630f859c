"""The self-test of quantized models: every format carries the symmetry, what is broken is found, what is left out is said."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_moe_lmc as lmc
from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.formats.decoded import DecodedCheckpoint, decoded
from hf_moe_lmc.moe.reading import model_type, read_config, read_model
from hf_moe_lmc.moe.registry import get_family
from hf_moe_lmc.proof import storage_checks as proof
from hf_moe_lmc.proof import stored_miniature as making
from hf_moe_lmc.proof.stored_like import stored_like
from hf_moe_lmc.proof.verdict import StorageCheck, StorageProof
from tests import tiny
from tests.formats.published import BLOCKS, LAYOUTS, compressed, numbers

Shapes = Mapping[str, tuple[str, list[int]]]
UNSIGNED = ("gpt_oss",)  # the clamp of its hidden units leaves no sign


def proved(folder: Path) -> StorageProof:
    with Checkpoint.open(folder) as opened:
        checkpoint = decoded(opened)
        assert isinstance(checkpoint, DecodedCheckpoint)
        config = read_config(opened)
        return proof.prove_storage(checkpoint, config, lambda small: get_family(model_type(small), "test"))


def by_name(found: StorageProof) -> dict[str, StorageCheck]:
    return {check.name: check for check in found.checks}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_published_format_carries_the_symmetry_of_its_families(quantized: Callable[..., Path], name: str) -> None:
    found = proved(quantized(name))
    assert found.passed and not found.not_covered, list(found.lines())
    checks = by_name(found)
    assert checks["expert order: values"].exact and checks["expert order: values"].difference == 0
    assert checks["merge at t = 0: bytes of A"].exact
    assert checks["merge at t = 0.5: decoded, interpolated in float32, stored again"].exact
    assert checks["experts moved, scales left"].control and checks["experts moved, scales left"].difference > 0.1
    assert any(one.startswith("signs") for one in checks) == (name not in UNSIGNED)


def test_a_move_that_leaves_the_scales_fails(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = proof.write

    def broken(stream: Any, output: Path) -> Path:
        right(stream, output)
        if output.name == proof.ORDER:
            with Checkpoint.open(output.parent / "stored-a") as checkpoint:
                assert proof._leave_scales(read_model(checkpoint), output.parent / "stored-a", output)
        return output

    monkeypatch.setattr(proof, "write", broken)
    found = proved(quantized("qwen3_moe"))
    failed = {check.name for check in found.checks if not check.passed}
    assert failed == {"expert order: values", "expert order: outputs"} and found.passed is False
    assert "FAILED" in next(found.lines())


def test_a_merge_that_rounds_otherwise_fails(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = proof.write

    def broken(stream: Any, output: Path) -> Path:
        right(stream, output)
        if output.name == "merged-0.5":
            file = next(output.glob("*.safetensors"))
            content = load_file(file)
            name = next(name for name in content if name.endswith("up_proj.weight"))
            content[name].view(torch.uint8).view(-1)[0] ^= 1  # the last bit of one code
            save_file(content, file, {"format": "pt"})
        return output

    monkeypatch.setattr(proof, "write", broken)
    failed = [check for check in proved(quantized("qwen3_moe")).checks if not check.passed]
    assert [check.name for check in failed] == ["merge at t = 0.5: decoded, interpolated in float32, stored again"]
    assert 0 < failed[0].difference < 0.02


def test_layers_that_are_stored_in_two_ways_are_both_tried(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized("qwen3_moe"), tmp_path / "mixed"))

    def unpack(content: dict[str, torch.Tensor]) -> None:
        last = {name: content.pop(name) for name in list(content) if ".layers.1." in name}
        content |= {name: values.bfloat16() for name, values in numbers(last).items()}

    tiny.edit(folder, unpack)
    with Checkpoint.open(folder) as opened:
        checkpoint = decoded(opened)
        assert isinstance(checkpoint, DecodedCheckpoint)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        like = stored_like(checkpoint, checkpoint.storage, shapes)
        assert like.weights.keys() == checkpoint.storage.weights.keys() and not like.missed
        assert like.dtypes["model.layers.1.mlp.experts.3.up_proj.weight"] == torch.bfloat16
        # by kind of layer and role: other numbers, and another tower's prefix
        moved = {
            name.replace("model.", "language_model.model.").replace("layers.", "layers.4"): s for name, s in shapes.items()
        }
        again = stored_like(checkpoint, checkpoint.storage, moved)
        assert len(again.weights) == len(like.weights) and not again.missed
        # what the small model does not have, or not in a fitting shape, is named
        few = {name: shape for name, shape in shapes.items() if "o_proj" not in name}
        (sentence,) = stored_like(checkpoint, checkpoint.storage, few).missed
        assert "o_proj.weight (FP8 in blocks of 16 x 16): the small model has no such weight" in sentence
    assert proved(folder).passed


def test_what_a_small_model_cannot_have_is_said(quantized: Callable[..., Path]) -> None:
    with Checkpoint.open(quantized("int4")) as opened:
        checkpoint = decoded(opened)
        assert isinstance(checkpoint, DecodedCheckpoint)
        shapes = {name: (*info.shape[:-1], 40) if info.shape[1:] else info.shape for name, info in checkpoint.tensors.items()}
        found = stored_like(checkpoint, checkpoint.storage, shapes)
        assert not found.weights
        assert any(one.endswith("40 columns, which are no whole groups of 32") for one in found.missed)


def test_where_nothing_can_be_stored_nothing_is_claimed(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise FamilyError("its widths cannot be chosen")

    monkeypatch.setattr(proof, "stored_miniature", refuse)
    found = lmc.selftest(quantized("qwen3_moe"))
    assert found.storage and found.storage.passed is None and found.passed and not found.storage.checks
    first, *_, heading, sentence = found.table().splitlines()
    assert first.endswith("passed for plain weights, not tested for the format that these have")
    assert heading == "in the format of its weights, FP8 in blocks of 16 x 16: NOT TESTED"
    assert sentence.endswith("not covered: no small model can be stored as this one is: its widths cannot be chosen")


def test_experts_that_cannot_move_are_named(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "unmovable", lambda *_: ["two experts share a scale"])
    found = proved(quantized("qwen3_moe"))
    assert found.passed and "expert order: values" not in by_name(found)
    assert "two experts share a scale" in found.not_covered[0] and "but for what is named below" in next(found.lines())


def test_plain_models_are_tested_as_before(saved: Callable[..., Path]) -> None:
    found = lmc.selftest(saved("olmoe"))
    assert found.storage is None and "storage" not in found.to_dict() and "format of its weights" not in found.table()


# --- of published sizes, from headers alone -----------------------------------------------------------------------------


def hollow(folder: Path, config: transformers.PreTrainedConfig, declared: Mapping[str, Any], tensors: Shapes) -> Path:
    """A checkpoint whose headers are whole, and whose weights are a hole in the file."""
    sizes = {"F8_E4M3": 1, "U8": 1, "I8": 1, "F8_E8M0": 1, "BF16": 2, "F32": 4, "I32": 4}
    config.save_pretrained(folder)
    tiny.edit_config(folder, quantization_config=declared)
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * sizes[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return folder


def blocks_of_128(name: str, shape: list[int]) -> Shapes:
    return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", [-(-size // 128) for size in shape])}


def groups_of_128(name: str, shape: list[int]) -> Shapes:
    rows, columns = shape
    return {
        f"{name}_packed": ("I32", [rows, columns // 8]),
        f"{name}_scale": ("BF16", [rows, columns // 128]),
        f"{name}_shape": ("I32", [2]),
    }


PUBLISHED: dict[str, tuple[Callable[[str, list[int]], Shapes], Mapping[str, Any], int]] = {
    "FP8 in blocks of 128 x 128": (blocks_of_128, {**BLOCKS, "weight_block_size": [128, 128]}, 192),
    "INT4 in groups of 128": (groups_of_128, compressed("pack-quantized", 4, "int", "group", 128), 384),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_small_model_has_several_groups_or_a_block_and_a_part_of_one(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, declared, units = PUBLISHED[kind]
    config = transformers.Qwen3MoeConfig(num_hidden_layers=2, num_experts=8, moe_intermediate_size=768, vocab_size=1000)
    tensors: dict[str, tuple[str, list[int]]] = {"model.embed_tokens.weight": ("BF16", [1000, config.hidden_size])}
    for expert in [f"model.layers.{layer}.mlp.experts.{number}" for layer in range(2) for number in range(8)]:
        for role, shape in (("gate", [768, 2048]), ("up", [768, 2048]), ("down", [2048, 768])):
            tensors |= quantize(f"{expert}.{role}_proj.weight", shape)
    made: list[making.StoredMiniature] = []
    monkeypatch.setattr(
        proof, "stored_miniature", lambda *arguments: made.append(making.stored_miniature(*arguments)) or made[0]
    )
    found = proved(hollow(tmp_path / "model", config, declared, tensors))
    assert found.passed and not found.not_covered and found.format == kind, list(found.lines())
    assert made[0].built.config.moe_intermediate_size == units
