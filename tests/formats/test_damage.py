"""Quantized checkpoints that are not whole: every fault is named before any work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.verbs.align import plan_align
from hf_moe_lmc.verbs.merge import merge
from tests import tiny
from tests.formats.published import Parts, per_block


def drop(*patterns: str) -> Callable[[Parts], None]:
    def change(content: Parts) -> None:
        for name in [name for name in content if any(re.search(pattern, name) for pattern in patterns)]:
            del content[name]

    return change


def recast(pattern: str, dtype: torch.dtype) -> Callable[[Parts], None]:
    def change(content: Parts) -> None:
        content.update({name: tensor.to(dtype) for name, tensor in content.items() if re.search(pattern, name)})

    return change


def reshape(pattern: str, view: Callable[[Tensor], Tensor]) -> Callable[[Parts], None]:
    def change(content: Parts) -> None:
        content.update({name: view(tensor) for name, tensor in content.items() if re.search(pattern, name)})

    return change


def no_experts_weight(content: Parts) -> None:
    """One expert in bfloat16, without scales."""
    drop(r"layers\.1\..*experts\.3\..*_scale_inv")(content)
    recast(r"layers\.1\..*experts\.3\.", torch.bfloat16)(content)


DAMAGE: dict[str, tuple[str, Callable[[Parts], None], str]] = {
    "scales of one expert": (
        "qwen3_moe",
        drop(r"layers\.1\..*experts\.3\.up_proj\.weight_scale_inv"),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight_scale_inv",
    ),
    "scales of the shared expert": (
        "deepseek_v3",
        drop(r"layers\.2\..*shared_experts\.up_proj\.weight_scale_inv"),
        r"missing: model\.layers\.2\.mlp\.shared_experts\.up_proj\.weight_scale_inv",
    ),
    "scales outside": (
        "qwen3_moe",
        drop(r"layers\.1\.self_attn\.o_proj\.weight_scale_inv"),
        r"missing: model\.layers\.1\.self_attn\.o_proj\.weight_scale_inv",
    ),
    "all scales": ("mixtral", drop("_scale_inv"), r"missing: .*experts\.0\.w1\.weight_scale_inv"),
    "values of one expert": (
        "qwen3_moe",
        drop(r"layers\.1\..*experts\.3\.up_proj\.weight$"),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight \(the values",
    ),
    "a whole weight": (
        "qwen3_moe",
        drop(r"layers\.1\..*experts\.3\.up_proj"),
        r"missing: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight \(up\)",
    ),
    "scales of FP4": (
        "deepseek_v4",
        drop(r"layers\.1\.ffn\.experts\.2\.w3\.scale"),
        r"missing: model\.layers\.1\.ffn\.experts\.2\.w3\.weight_scale_inv",
    ),
    "mxfp4 scales": ("gpt_oss", drop(r"0\..*down_proj_scales"), r"missing: model\.layers\.0\.mlp\.experts\.down_proj_scales"),
    "mxfp4 blocks": ("gpt_oss", drop(r"0\..*down_proj_blocks"), r"missing: model\.layers\.0\.mlp\.experts\.down_proj_blocks"),
    "a fused weight's scales": (
        "fused",
        drop(r"0\..*gate_up_proj_scale"),
        r"missing: .*0\.mlp\.experts\.gate_up_proj_scale_inv",
    ),
    "an expert in bfloat16": (
        "qwen3_moe",
        no_experts_weight,
        r"experts\.3\..*in plain numbers: they cannot change places",
    ),
    "scales beside bfloat16": ("qwen3_moe", recast(r"experts.*weight$", torch.bfloat16), "which is not quantized"),
    "a quantized router": (
        "qwen3_moe",
        recast(r"mlp\.gate\.weight$", torch.float8_e4m3fn),
        r"missing: .*gate\.weight_scale_inv",
    ),
    "a scaled router": (
        "qwen3_moe",
        lambda content: content.update(per_block("model.layers.0.mlp.gate.weight", content["model.layers.0.mlp.gate.weight"])),
        "a quantized router: moving its rows would need new scales",
    ),
    "scales of other blocks": (
        "qwen3_moe",
        reshape(r"experts.*_scale_inv", lambda tensor: tensor[:1]),
        r"do not fit a weight .* in blocks of \[16, 16\]",
    ),
    "an activation scale that others have": (
        "one scale per tensor",
        drop(r"experts\.3\.w1\.activation_scale"),
        r"experts\.3\.w1\.weight is stored in other parts than .*: they cannot change places",
    ),
    "one scale for all experts": (
        "fused, one scale per tensor",
        reshape(r"_scale_inv", lambda tensor: tensor.view(-1)[:1]),
        r"expected one for each of the 12 experts",
    ),
    "scales in integers": ("qwen3_moe", recast("_scale_inv", torch.int32), "expected floats, or exponents in uint8"),
    "an int8 tensor that is not FP4": (
        "qwen3_moe",
        recast(r"layers\.0\..*experts\.3\.up_proj\.weight$", torch.int8),
        r"expected exponents \[48, 2\]: .* would hold two FP4 values a byte",
    ),
    "scales of a bias": (
        "deepseek_v3",
        lambda content: content.update({"model.layers.1.mlp.gate.e_score_correction_bias_scale_inv": torch.ones(12)}),
        r"scales of .*e_score_correction_bias, which is not quantized",
    ),
    "scales of a router in float32": (
        "deepseek_v3",
        lambda content: content.update({"model.layers.1.mlp.gate.scale": torch.ones(12)}),
        r"mlp\.gate\.scale: not a tensor of an MoE block",
    ),
    "an unknown companion": (
        "qwen3_moe",
        lambda content: content.update({"model.layers.0.mlp.experts.0.up_proj.zero_point": torch.zeros(1)}),
        r"up_proj\.zero_point: not a tensor of an MoE block",
    ),
    "two kinds of scales": (
        "qwen3_moe",
        lambda content: content.update({"model.layers.0.mlp.experts.0.up_proj.scale": torch.ones(3, 2)}),
        "a part of it is given twice, by .*up_proj",
    ),
    "float8 under mxfp4": ("gpt_oss", recast("down_proj_bias", torch.float8_e4m3fn), "missing: .*down_proj_bias_scale_inv"),
    "a float8 bias": ("deepseek_v3", recast("correction_bias", torch.float8_e4m3fn), "expected floats of 16 bits or more"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(quantized: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    name, change, message = DAMAGE[damage]
    folder = shutil.copytree(quantized(name), tmp_path / "damaged")
    tiny.edit(folder, change)
    with pytest.raises(InputError, match=message):
        plan_align(quantized(name), folder, tmp_path / "out")


def test_what_cannot_move_in_bytes_can_be_merged_and_moved_as_numbers(quantized: Callable[..., Path], tmp_path: Path) -> None:
    for number, damage in enumerate(("an expert in bfloat16", "a scaled router", "an activation scale that others have")):
        name, change, _ = DAMAGE[damage]
        folder = shutil.copytree(quantized(name), tmp_path / f"mixed {number}")
        tiny.edit(folder, change)
        plan_align(quantized(name), folder, tmp_path / "out", format="bf16")
        merge(folder, quantized(name), tmp_path / f"merged {number}", 0.5, align=False)
        one, other = tiny.tensors(folder), tiny.tensors(tmp_path / f"merged {number}")
        assert {key: value.dtype for key, value in one.items()} == {key: value.dtype for key, value in other.items()}


BAD_SCALES: dict[str, tuple[str, str, float, str]] = {
    "NaN": ("qwen3_moe", r"experts\.3\.up_proj\.weight_scale_inv", float("nan"), "a scale is NaN or infinite"),
    "infinite, outside": ("mixtral", r"o_proj\.weight_scale_inv", float("inf"), "a scale is NaN or infinite"),
    "zero": ("deepseek_v3", r"experts\.3\.up_proj\.weight_scale_inv", 0.0, "a scale is 0 where codes of"),
    "zero, INT4": ("int4", r"experts\.3\.up_proj\.weight_scale$", 0.0, "a scale is 0 where codes of"),
    "NaN, MXFP4": ("gpt_oss", r"down_proj_scales", 255, "a scale is NaN or infinite"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_scales_that_cannot_be_are_named(quantized: Callable[..., Path], tmp_path: Path, case: str) -> None:
    name, pattern, value, message = BAD_SCALES[case]
    folder = shutil.copytree(quantized(name), tmp_path / "bad")

    def change(content: Parts) -> None:
        key = next(key for key in content if re.search(pattern, key))
        content[key].view(-1)[0] = value

    tiny.edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        merge(folder, quantized(name), tmp_path / "out", 0.5, align=False)
    assert not (tmp_path / "out").exists()


def test_a_scale_of_zero_beside_zeros_is_none(quantized: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(quantized("mixtral"), tmp_path / "zeros")
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"

    def change(content: Parts) -> None:
        content[key].view(torch.uint8).zero_()
        content[f"{key}_scale_inv"].zero_()

    tiny.edit(folder, change)
    other = shutil.copytree(folder, tmp_path / "other")
    merge(folder, other, tmp_path / "same", 0.5, align=False)
    merge(folder, quantized("mixtral"), tmp_path / "out", 0.5, align=False)
    assert tiny.tensors(tmp_path / "same")[f"{key}_scale_inv"].eq(0).all()
    assert tiny.tensors(tmp_path / "out")[f"{key}_scale_inv"].gt(0).all()
