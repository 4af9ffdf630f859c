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
from tests.formats import reference
from tests.formats.reference import Array, Stored

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


def packed(name: str, weight: Tensor) -> Parts:
    """INT4 of Kimi: 32 of a row share a bfloat16 scale; the codes do not reach the lowest one."""
    stem = name.removesuffix(".weight")
    scales = (weight.unflatten(-1, (-1, 32)).abs().amax(dim=-1) / 7).bfloat16()
    codes = (weight / scales.float().repeat_interleave(32, dim=-1)).round().clamp(-7, 7).long() + 8
    return words_of(stem, codes, 4, scales)


def packed_bytes(name: str, weight: Tensor) -> Parts:
    """INT8 with a scale a row."""
    stem = name.removesuffix(".weight")
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scales).round().long() + 128
    return words_of(stem, codes, 8, scales)


def words_of(stem: str, codes: Tensor, bits: int, scales: Tensor) -> Parts:
    """Unsigned codes in words of 32 bits, the first one lowest."""
    count = 32 // bits
    words = sum(codes[:, i::count] << (bits * i) for i in range(count))
    assert isinstance(words, Tensor)
    return {
        f"{stem}.weight_packed": words.to(torch.int32),
        f"{stem}.weight_scale": scales,
        f"{stem}.weight_shape": torch.tensor(codes.shape),
    }


def per_row(name: str, weight: Tensor) -> Parts:
    values, scales = float8(weight, (1, weight.shape[1]))
    return {name: values, f"{name}_scale": scales.bfloat16()}


def mxfp4_packed(name: str, weight: Tensor) -> Parts:
    stem = name.removesuffix(".weight")
    codes, exponents = float4(weight)
    return {f"{stem}.weight_packed": codes, f"{stem}.weight_scale": exponents}


def _nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    above = weight.abs().max() / (6 * 448)
    scales = (weight.unflatten(-1, (-1, 16)).abs().amax(dim=-1) / 6 / above).to(torch.float8_e4m3fn)
    values = weight / (scales.float() * above).repeat_interleave(16, dim=-1)
    known = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = (values.abs()[..., None] - known).abs().argmin(dim=-1) + 8 * (values < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), scales, above


def nvfp4_packed(name: str, weight: Tensor) -> Parts:
    """NVFP4 as compressed-tensors has it: the number above the scales divides."""
    stem = name.removesuffix(".weight")
    codes, scales, above = _nvfp4(weight)
    return {
        f"{stem}.weight_packed": codes,
        f"{stem}.weight_scale": scales,
        f"{stem}.weight_global_scale": (1 / above).view(1),
        f"{stem}.input_global_scale": torch.rand(1) + 1,
    }


def modelopt(name: str, weight: Tensor) -> Parts:
    """NVFP4 as ModelOpt has it: the number above the scales multiplies."""
    stem = name.removesuffix(".weight")
    codes, scales, above = _nvfp4(weight)
    return {
        name: codes,
        f"{name}_scale": scales,
        f"{name}_scale_2": above.view(()),
        f"{stem}.input_scale": torch.rand(()) + 1,
    }


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


WIDE = {"moe_intermediate_size": 64}


def compressed(form: str, bits: int, kind: str, strategy: str, group: int | None = None) -> Mapping[str, Any]:
    """What compressed-tensors declares."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
    }


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
    "int4": Layout("deepseek_v3", packed, compressed("pack-quantized", 4, "int", "group", 32), WIDE, loads=False),
    "int8": Layout("qwen3_moe", packed_bytes, compressed("pack-quantized", 8, "int", "channel"), loads=False),
    "fp8, rows": Layout("qwen3_moe", per_row, compressed("float-quantized", 8, "float", "channel"), loads=False),
    "mxfp4, packed": Layout(
        "deepseek_v3", mxfp4_packed, compressed("mxfp4-pack-quantized", 4, "float", "group", 32), WIDE, loads=False
    ),
    "nvfp4, packed": Layout(
        "qwen3_moe", nvfp4_packed, compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", 16), WIDE, loads=False
    ),
    "nvfp4, modelopt": Layout("qwen3_moe", modelopt, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, WIDE, loads=False),
    "inkling2": Layout("inkling2", inkling, {}, {"moe_intermediate_size": 64}, NOTHING, loads=False),
}
LOADED = [name for name, layout in LAYOUTS.items() if layout.loads]


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
        for name in [name for name in content if name.endswith("tid2eid")]:  # which no merge interpolates
            content[name] = torch.arange(content[name].numel()).view(content[name].shape) * 7 % 12
        for name in list(content):
            content |= quantized(name, content.pop(name))

    tiny.edit(folder, change)
    # a configuration that transformers did not write is taken for the released Inkling 2, which declares nothing
    tiny.edit_config(
        folder, **({"quantization_config": layout.declared} if layout.declared else {"transformers_version": None})
    )
    return folder


def plain(layout: Layout, folder: Path, output: Path) -> Path:
    """The checkpoint dequantized by the reference."""
    result = numbers(tiny.tensors(folder))
    output.mkdir()
    save_file(result, output / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["transformers_version"] = transformers.__version__  # see `save`
    config.pop("quantization_config", None)
    (output / "config.json").write_text(json.dumps(config))
    return output


@dataclass(frozen=True)
class Weight:
    """A quantized weight as it lies on disk: the names of its parts.

    Attributes:
        kind: fp8, fp4, mxfp4, int4, int8, nvfp4.
        beside: other names that go with it, and are no part of its values.
    """

    name: str
    kind: str
    codes: str
    scales: str
    above: str | None = None
    beside: tuple[str, ...] = ()

    def matrices(self, content: Parts) -> list[tuple[Stored, tuple[int, int]]]:
        """Its matrices as they are stored one by one, and the block of each."""
        codes, scales = content[self.codes], content[self.scales]
        if self.kind == "mxfp4":
            return [(Stored(one.flatten(1), scale), (1, 32)) for one, scale in zip(codes, scales, strict=True)]
        if codes.ndim == 2:
            above = content[self.above] if self.above else None
            return [(Stored(codes, scales, above), self.block(codes, scales))]
        pairs = []
        for one, scale in zip(codes, scales.view(len(codes), -1) if scales.ndim < 3 else scales, strict=True):
            found = self.block(one, scale)
            if found is None:  # gate and up each begin with a block of their own
                halves = list(zip(one.chunk(2), scale.chunk(2), strict=True))
                pairs += [(Stored(*half), self.block(*half) or BLOCK) for half in halves]
            else:
                pairs.append((Stored(one, scale), found))
        return [(one, block) for one, block in pairs if block]

    def block(self, codes: Tensor, scales: Tensor) -> Any:
        rows, columns = codes.shape
        if self.kind != "fp8":
            return {"nvfp4": (1, 16)}.get(self.kind, (1, 32))
        if scales.numel() == 1:
            return rows, columns
        for block in (BLOCK, (1, 32), (1, columns)):
            if tuple(scales.shape) == reference.grid((rows, columns), block):
                return block
        return None


def weights_of(content: Parts) -> list[Weight]:
    """The quantized weights among some tensors, by their names alone."""
    found = []
    for name, tensor in content.items():
        stem = name.removesuffix(".weight")
        beside = tuple(
            other
            for other in content
            if other.startswith(f"{stem.removesuffix('_packed').removesuffix('.weight')}.")
            and other.endswith(("activation_scale", "input_scale", "input_global_scale", "weight_shape"))
        )
        beside += tuple(other for other in content if other == f"{name}_activation_scale")
        if name.endswith("_blocks"):
            found.append(Weight(name.removesuffix("_blocks"), "mxfp4", name, name.removesuffix("_blocks") + "_scales"))
        elif name.endswith(".weight_packed"):
            base = name.removesuffix("_packed")
            above = f"{base}_global_scale" if f"{base}_global_scale" in content else None
            kind = "nvfp4" if above else "fp4"
            if tensor.dtype == torch.int32:
                kind = f"int{32 * tensor.shape[1] // int(content[base + '_shape'][1])}"
            found.append(Weight(base, kind, name, f"{base}_scale", above, beside))
        elif tensor.dtype == torch.float8_e4m3fn and not name.endswith("_scale"):
            scales = [f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight"]
            found.append(Weight(name, "fp8", name, next(one for one in scales if one in content), None, beside))
        elif name.endswith(".weight") and tensor.dtype in (torch.int8, torch.uint8):
            if f"{name}_scale_2" in content:
                found.append(Weight(name, "nvfp4", name, f"{name}_scale", f"{name}_scale_2", beside))
            else:
                found.append(Weight(name, "fp4", name, f"{stem}.scale", None, beside))
    return found


def read_matrix(weight: Weight, one: Stored, block: tuple[int, int]) -> Array:
    """A stored matrix as numbers."""
    if weight.kind == "fp8":
        return reference.read_fp8(one, block)
    if weight.kind in ("fp4", "mxfp4"):
        return reference.read_fp4(one)
    if weight.kind == "nvfp4":
        return reference.read_nvfp4(one, divides=str(weight.above).endswith("global_scale"))
    bits = int(weight.kind[3:])
    columns = one.codes.shape[1] * 32 // bits
    return reference.read_integers(one, bits, columns, 32 if one.scales.shape[1] > 1 else 0)


def write_matrix(weight: Weight, values: Array, like: Stored, block: tuple[int, int]) -> Stored:
    """Numbers stored as `like` is."""
    if weight.kind == "fp8":
        powers = like.scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
        return reference.write_fp8(values, like, block, powers=powers)
    if weight.kind in ("fp4", "mxfp4"):
        return reference.write_fp4(values, like)
    if weight.kind == "nvfp4":
        return reference.write_nvfp4(values, like, divides=str(weight.above).endswith("global_scale"))
    return reference.write_integers(values, like, int(weight.kind[3:]), 32 if like.scales.shape[1] > 1 else 0)


def numbers(content: Parts) -> Parts:
    """All tensors as plain ones, float32 where they are quantized."""
    weights = weights_of(content)
    parts = {one for weight in weights for one in (weight.codes, weight.scales, weight.above, *weight.beside)}
    result = {name: tensor for name, tensor in content.items() if name not in parts}
    for weight in weights:
        result[weight.name] = value_of(weight, content)
    return result


def value_of(weight: Weight, content: Parts) -> Tensor:
    read = [torch.from_numpy(read_matrix(weight, *one)) for one in weight.matrices(content)]
    codes = content[weight.codes]
    if weight.kind == "mxfp4":
        return torch.stack(read).transpose(1, 2).contiguous()
    return torch.cat(read).view(codes.shape) if codes.ndim > 2 else read[0]


def stored_anew(weight: Weight, values: Tensor, content: Parts) -> Parts:
    """The parts of a weight that holds other values, in the form of `content`."""
    matrices = weight.matrices(content)
    rows = values.transpose(1, 2) if weight.kind == "mxfp4" else values
    rows = rows.reshape(-1, rows.shape[-1])
    made = [
        write_matrix(weight, part.contiguous().numpy(), *one)
        for part, one in zip(rows.split(len(rows) // len(matrices)), matrices, strict=True)
    ]
    found = {
        weight.codes: torch.cat([one.codes for one in made]).view(content[weight.codes].shape),
        weight.scales: torch.cat([one.scales.view(-1) for one in made]).view(content[weight.scales].shape),
    }
    if weight.above:
        assert made[0].above is not None
        found[weight.above] = made[0].above
    return found
