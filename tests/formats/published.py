"""Small quantized checkpoints in the layouts that are published, and their values worked out by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from hf_moe_lmc.proof.miniature import build, shrink
from tests import tiny

BLOCK = (16, 16)
BLOCKS = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
WHOLE = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
EXPONENTS = {**BLOCKS, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
NOTHING = "no such name"

Parts = dict[str, Tensor]


# --- by hand ----------------------------------------------------------------------------------------------------------


def by_blocks(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Each block of a matrix times its scale, block by block."""
    result = weight.clone()
    for i, row in enumerate(scales.tolist()):
        for j, scale in enumerate(row):
            result[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] *= scale
    return result


def float8(weight: Tensor, block: tuple[int, int] | None, *, powers: bool = False) -> tuple[Tensor, Tensor]:
    """A matrix (or a stack of them) in float8, and a scale per block, the last blocks cut short; a power of 2 with `powers`."""
    if weight.ndim > 2:
        values, scales = zip(*(float8(one, block, powers=powers) for one in weight), strict=True)
        return torch.stack(values), torch.stack(scales)
    rows, columns = block or weight.shape
    largest = [[part.abs().max() / 448 for part in row.split(columns, dim=1)] for row in weight.split(rows)]
    scales = torch.tensor(largest)
    if powers:
        scales = scales.log2().ceil().exp2()
    return by_blocks(weight, 1 / scales, (rows, columns)).to(torch.float8_e4m3fn), scales


def float4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as bytes with two FP4 values each, [rows, columns / 2], and exponents, [rows, columns / 32], from 127."""
    largest = weight.unflatten(-1, (-1, 32)).abs().amax(dim=-1)
    exponents = (largest / 6).log2().ceil()
    values = weight / exponents.exp2().repeat_interleave(32, dim=-1)
    known = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (values.abs()[..., None] - known).abs().argmin(dim=-1) + 8 * (values < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def per_block(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, BLOCK)
    return {name: values, f"{name}_scale_inv": scales}


def halves(name: str, weight: Tensor) -> Parts:
    """As per_block, with blocks that begin anew where the up rows do."""
    if "gate_up" not in name:
        return per_block(name, weight)
    parts = [float8(half, BLOCK) for half in weight.chunk(2, dim=1)]
    return {name: torch.cat([part[0] for part in parts], 1), f"{name}_scale_inv": torch.cat([part[1] for part in parts], 1)}


def per_tensor(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, None)
    activation = torch.rand(())  # not used when transformers dequantizes
    stem = name.removesuffix(".weight")
    return {name: values, f"{name}_scale_inv": scales.view(()), f"{stem}.activation_scale": activation}


def per_tensor_fused(name: str, weight: Tensor) -> Parts:
    """As transformers writes them: one number for gate and one for up."""
    count = 2 if "gate_up" in name else 1
    parts = [float8(part, None) for part in weight.chunk(count, dim=1)]
    return {
        name: torch.cat([part[0] for part in parts], 1),
        f"{name}_scale_inv": torch.cat([part[1] for part in parts], 1),
        f"{name}_activation_scale": torch.rand(len(weight)),
    }


def vllm(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, None)
    stem = name.removesuffix(".weight")
    return {name: values, f"{stem}.weight_scale": scales.view(1), f"{stem}.input_scale": torch.rand(1)}


def deepseek_v4(name: str, weight: Tensor) -> Parts:
    """Routed experts in FP4, the shared one in float8; exponents as scales."""
    stem = name.removesuffix(".weight")
    if "shared" in name:
        values, scales = float8(weight, BLOCK, powers=True)
        return {name: values, f"{stem}.scale": scales.to(torch.float8_e8m0fnu)}
    packed, exponents = float4(weight)
    return {name: packed.view(torch.int8), f"{stem}.scale": exponents.view(torch.float8_e8m0fnu)}


def mistral(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, BLOCK)
    return {name: values, name.removesuffix("weight") + "qscale_weight": scales}


def inkling(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, (1, 32), powers=True)
    return {name: values, f"{name}_scale": (scales.log2() + 127).to(torch.uint8)}


def mxfp4(name: str, weight: Tensor) -> Parts:
    packed, exponents = float4(weight.transpose(1, 2).contiguous())
    return {f"{name}_blocks": packed.unflatten(-1, (-1, 16)), f"{name}_scales": exponents}


@dataclass(frozen=True)
class Layout:
    """A way in which quantized experts lie on disk.

    Attributes:
        sizes: changes of the miniature's configuration.
        outside: ending of the names outside the MoE blocks that are quantized as well.
        hub: layout on the Hub, or as in memory.
        loads: transformers dequantizes it rightly without a GPU.
    """

    family: str
    quantize: Callable[[str, Tensor], Parts]
    declared: Mapping[str, Any]
    sizes: Mapping[str, int] = field(default_factory=dict)
    outside: str = "o_proj.weight"
    hub: bool = True
    loads: bool = True


LAYOUTS = {
    "qwen3_moe": Layout("qwen3_moe", per_block, BLOCKS, {"moe_intermediate_size": 48}),
    "deepseek_v3": Layout("deepseek_v3", per_block, BLOCKS, {"moe_intermediate_size": 16}),
    "mixtral": Layout("mixtral", per_block, BLOCKS, {"intermediate_size": 32}),
    "one scale per tensor": Layout("mixtral", per_tensor, WHOLE, {"intermediate_size": 24}),
    "deepseek_v4": Layout("deepseek_v4", deepseek_v4, EXPONENTS, {"moe_intermediate_size": 64}, NOTHING),
    "mistral_large4": Layout("mistral_large4", mistral, BLOCKS, {"moe_intermediate_size": 16}, "wo.weight"),
    "gpt_oss": Layout("gpt_oss", mxfp4, {"quant_method": "mxfp4"}, {"intermediate_size": 64}, NOTHING),
    # what follows, transformers 5.23 and 5.24 read without its scales or not at all, see `test_what_transformers_gets_wrong`
    "blocks cut short": Layout("qwen3_moe", per_block, BLOCKS, {"moe_intermediate_size": 40}, loads=False),
    "blocks cut short, two": Layout("deepseek_v3", per_block, BLOCKS, {"moe_intermediate_size": 24}, loads=False),
    "fused": Layout("qwen3_moe", per_block, BLOCKS, {"moe_intermediate_size": 24}, hub=False, loads=False),
    "fused, halves": Layout("qwen3_moe", halves, BLOCKS, {"moe_intermediate_size": 24}, hub=False, loads=False),
    "fused, one scale per tensor": Layout("qwen3_moe", per_tensor_fused, WHOLE, outside=NOTHING, hub=False, loads=False),
    "step3p7": Layout("step3p7", per_block, BLOCKS, {"moe_intermediate_size": 24}, loads=False),
    "inputs first": Layout("qwen3_vl_moe", per_block, BLOCKS, {"moe_intermediate_size": 24}, loads=False),
    "vllm": Layout("qwen3_moe", vllm, {"quant_method": "fp8"}, loads=False),
    "inkling2": Layout("inkling2", inkling, {}, {"moe_intermediate_size": 64}, NOTHING, loads=False),
}
LOADED = [name for name, layout in LAYOUTS.items() if layout.loads]
SCALES = ("_scale_inv", "_scale")


def save(layout: Layout, folder: Path, seed: int = 0) -> Path:
    config = shrink(transformers.CONFIG_MAPPING[layout.family]())
    for key, value in layout.sizes.items():
        setattr(config.get_text_config(), key, value)
    build(config, seed).save_pretrained(folder, save_original_format=layout.hub)

    def quantized(name: str, weight: Tensor) -> Parts:
        expert = re.search(r"expert|\.moe\.", name) and weight.ndim > 1 and not name.endswith(("gate.weight", "_bias"))
        if expert or name.endswith(layout.outside):
            return layout.quantize(name, weight)
        return {name: weight.bfloat16() if layout.quantize is mxfp4 else weight}

    def change(content: Parts) -> None:
        for name in list(content):
            content |= quantized(name, content.pop(name))

    tiny.edit(folder, change)
    # a configuration that transformers did not write is taken for the released Inkling 2, which declares nothing
    tiny.edit_config(
        folder, **({"quantization_config": layout.declared} if layout.declared else {"transformers_version": None})
    )
    return folder


def plain(layout: Layout, folder: Path, output: Path) -> Path:
    """The checkpoint dequantized by hand, for what transformers cannot read without a GPU."""
    content, result = tiny.tensors(folder), {}

    def value(name: str, weight: Tensor, scales: Tensor) -> Tensor:
        if weight.ndim > 2:
            return torch.stack([value(name, *pair) for pair in zip(weight, scales, strict=True)])
        if layout.quantize in (halves, per_tensor_fused) and "gate_up" in name:
            return torch.cat([value("", *pair) for pair in zip(weight.chunk(2), scales.chunk(2), strict=True)])
        if scales.numel() == 1:
            return weight * scales.view(())
        return by_blocks(weight, scales, (1, 32) if layout.quantize is inkling else BLOCK)

    used = set()
    for name, weight in content.items():
        if weight.dtype == torch.float8_e4m3fn:
            stem = name.removesuffix(".weight")
            beside = next(other for end in SCALES for other in (name + end, stem + end) if other in content)
            scales = content[beside].float()
            scales = (scales - 127).exp2() if content[beside].dtype == torch.uint8 else scales
            result[name] = value(name, weight.float(), scales)
            used.add(beside)
        elif not name.endswith(("activation_scale", "input_scale")):
            result[name] = weight
    result = {name: tensor for name, tensor in result.items() if name not in used}
    output.mkdir()
    save_file(result, output / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = transformers.__version__  # see `save`
    config.pop("quantization_config", None)
    (output / "config.json").write_text(json.dumps(config))
    return output
