"""Quantised experts: which tensors move with an expert, and the values that matching needs.

Whole experts can change places: all tensors of an expert move with it, and every byte is kept. Anything finer (hidden units,
signs, scales, interpolation) would need new scales. Two methods are read:

- `fp8`: a float8 tensor, or an int8 one with two FP4 values a byte (DeepSeek-V4's experts), and beside it its scales, one
  for each block or one for the tensor, and perhaps a scale of the activations. Their names differ, see `_PARTS`.
- `mxfp4`: `X_blocks` and `X_scales` in place of a tensor X, outputs before inputs whatever the order of X.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.errors import CheckpointError, worded
from hf_moe_lmc.runtime.progress import size_of

DEQUANTIZE_ADVICE = (
    "Take the model in bfloat16, or dequantize it with transformers: from_pretrained(..., dtype='bfloat16', "
    "quantization_config=FineGrainedFP8Config(dequantize=True)), or Mxfp4Config for mxfp4, then "
    "save_pretrained(..., save_original_format=False). Of fp8, transformers 5.23 and 5.24 dequantize rightly only one tensor "
    "per expert with sizes that are multiples of the block, and may leave scales out without an error (their load report "
    "then names them as unexpected); for the rest, use the conversion script of the model's makers"
)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_BLOCK = 32
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# What transformers adds to configurations that it did not write itself.
_IMPLIED = {"inkling2": {"quant_method": "fp8", "weight_block_size": [1, 32]}}
# Name of a part -> name of the weight that it belongs to, and the ending of its role.
_PARTS = {
    "fp8": (
        (r"(.+)_scale_inv", r"\1", "_scales"),
        (r"(.+)\.scale", r"\1.weight", "_scales"),  # DeepSeek-V4
        (r"(.+)\.qscale_weight", r"\1.weight", "_scales"),  # Mistral Large 4
        (r"(.+weight)_scale", r"\1", "_scales"),  # Inkling 2; one scale per tensor in vLLM's fp8
        (r"(.+)\.(?:activation_scale|input_scale|qscale_act)", r"\1.weight", "_activation_scales"),
        (r"(.+)_activation_scale", r"\1", "_activation_scales"),
    ),
    "mxfp4": ((r"(.+)_blocks", r"\1", "_blocks"), (r"(.+)_scales", r"\1", "_scales")),
}


@dataclass(frozen=True)
class Quantization:
    """A declared quantization whose experts can change places.

    Attributes:
        method: `fp8` or `mxfp4`, see the module.
        block: rows and columns that share one scale; None: a tensor has one.
    """

    method: str
    block: tuple[int, int] | None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of what stands in place of a weight."""
        return ("_blocks", "_scales") if self.method == "mxfp4" else ()

    def part_of(self, key: str) -> tuple[str, str] | None:
        """The weight that a tensor would belong to by its name, and the ending of its role; None if to none."""
        for pattern, weight, ending in _PARTS[self.method]:
            if match := re.fullmatch(pattern, key):
                return match.expand(weight), ending
        return None

    def scales_of(self, weight: str) -> tuple[str, ...]:
        """The names that the scales of a weight may have, the usual one first."""
        if self.method == "mxfp4":
            return (f"{weight}_scales",)
        stem = weight.removesuffix(".weight")
        return (f"{weight}_scale_inv", f"{weight}_scale", f"{stem}.scale", f"{stem}.qscale_weight")

    def block_of(self, dtype: torch.dtype) -> tuple[int, int] | None:
        """Rows and columns of a weight in `dtype` that share one scale."""
        return self.block if dtype in FLOAT8 else (1, FP4_BLOCK)


def declared_in(config: Mapping[str, Any]) -> Any:
    """What config.json says, or implies, of quantized weights; nothing that counts as true: nothing."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    if compression := config.get("compression_config") or inner.get("compression_config"):
        return compression
    declared = config.get("quantization_config") or inner.get("quantization_config")
    if "quantization_config" not in config and "transformers_version" not in config:
        declared = declared or _IMPLIED.get(str(config.get("model_type")))
    return declared


def read_quantization(name: str, config: Mapping[str, Any]) -> Quantization | None:
    """What config.json declares: a supported quantization, or None for plain floats.

    Raises:
        CheckpointError: a quantization that is not read here, with the way out.
    """
    if config.get("compression_config"):
        raise refused(name, "compression_config")
    declared = declared_in(config)
    if not declared:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if method == "mxfp4":
        return Quantization("mxfp4", (1, FP4_BLOCK))
    if method != "fp8" or not isinstance(declared, dict):
        raise refused(name, f"quantization_config: quant_method {worded(method)}")
    block = declared.get("weight_block_size", [128, 128])  # as transformers has it
    if block is None:
        return Quantization("fp8", None)
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and 0 < size < 2**31 for size in block):
        return Quantization("fp8", (block[0], block[1]))
    raise refused(name, f"quantization_config: fp8 with weight_block_size {worded(block)}")


def refused(name: str, what: str, where: str = "config.json") -> CheckpointError:
    """The error for a quantization that is not read."""
    verb = "hold" if where == "the shards" else "declares"
    return CheckpointError(
        f"{name}: {where} {verb} quantized weights ({what}); only transformers' fp8 and mxfp4 are read, to move whole "
        "experts. Use the model that it was quantized from"
    )


def kind_of_weights(quantization: Quantization | None, tensors: Mapping[str, TensorInfo]) -> str:
    """What most weights are in, in words: MXFP4, FP8 in blocks of 128 x 128, bfloat16."""
    if quantization is None:
        sizes: dict[torch.dtype, int] = {}
        for info in tensors.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return str(max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)).removeprefix("torch.")
    if quantization.method == "mxfp4":
        return "MXFP4"
    rows, columns = quantization.block or (0, 0)
    return f"FP8 in blocks of {rows} x {columns}" if quantization.block else "FP8 with one scale a tensor"


def way_out(tensors: Mapping[str, TensorInfo]) -> str:
    """How to get plain weights, and the memory that it takes."""
    needed = 0
    for name, info in tensors.items():
        if info.dtype in FLOAT8:
            needed += 2 * info.nbytes
        elif info.dtype in (torch.int8, torch.uint8):
            needed += 4 * info.nbytes if info.numel and not name.endswith("_scales") else 0  # two values a byte
        else:
            needed += info.nbytes
    return (
        f"{DEQUANTIZE_ADVICE}. Dequantized, the model takes about {size_of(needed)} of memory: where that is too much, "
        "take a release of it in bfloat16, or a script that converts shard by shard"
    )


def not_interpolated(name: str, quantization: Quantization, tensors: Mapping[str, TensorInfo]) -> CheckpointError:
    """The error for quantized weights where points between two models are asked for."""
    return CheckpointError(
        f"{name}: config.json declares quantized weights ({quantization.method}), which cannot be interpolated; align and "
        f"apply can move whole experts. {way_out(tensors)}"
    )


def scale_grid(
    scales_shape: tuple[int, ...], shape: tuple[int, int], block: tuple[int, int] | None, halves: int = 1
) -> tuple[int, int] | None:
    """Numbers of blocks in the rows and columns of a weight [rows, columns], from the shape of its scales.

    None if the two do not fit.

    Args:
        halves: weights that are stacked in the rows; the blocks of each may begin anew.
    """
    count = 1
    for size in scales_shape:
        count *= size
    if count == 1:
        return 1, 1
    size, width = block or shape
    rows = {_block_count(shape[0], size), halves * _block_count(shape[0] // halves, size)}
    columns = _block_count(shape[1], width)
    if block is None:
        return (count, 1) if count in rows else None
    fits = len(scales_shape) == 2 and scales_shape[0] in rows and scales_shape[1] == columns
    return (scales_shape[0], scales_shape[1]) if fits else None


def _block_count(size: int, block: int) -> int:
    return -(-size // block)


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int] | None = None, halves: int = 1) -> Tensor:
    """The matrix that a quantized one stands for, float32 [rows, columns].

    Args:
        weight: float8 [rows, columns], or bytes with two FP4 values each, the low one first, [rows, ...].
        scales: one for each block (`scale_grid`); numbers, or in uint8 exponents of 2 that count from 127.
    """
    values = weight.float() if weight.dtype in FLOAT8 else _unpack(weight)
    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    if factors.numel() == 1:
        return values * factors.view(())
    rows, columns = values.shape
    size, width = block or (rows, columns)
    row_blocks = _block_of_each(rows, len(factors), size, halves)
    column_blocks = _block_of_each(columns, factors.shape[1], width, 1)
    return values * factors[row_blocks][:, column_blocks]


def _block_of_each(count: int, blocks: int, size: int, halves: int) -> Tensor:
    index = torch.arange(count)
    if blocks == _block_count(count, size):
        return index // size
    half = count // halves
    return index // half * _block_count(half, size) + index % half // size


def _unpack(packed: Tensor) -> Tensor:
    codes, table = packed.view(torch.uint8), torch.tensor(FP4_VALUES)
    return torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=-1).flatten(1)
