"""Quantised experts: what can be moved without quantising again, and their values for matching.

Weights in FP8 with block scales, or in MXFP4 blocks, can change places as whole experts: the scales go with them, and
every byte is kept. Anything finer (hidden units, signs, scales, interpolation) would need new scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.errors import CheckpointError

WAY_OUT = (
    "Dequantise first: transformers' from_pretrained(..., dtype='bfloat16') with quantization_config's dequantize=True, then "
    "save_pretrained(..., save_original_format=False)"
)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_BLOCK = 32
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Quantisation:
    """A declared quantisation whose experts can change places.

    Attributes:
        method: `fp8` (a tensor and its block scales) or `mxfp4` (blocks and scales in place of a tensor).
        block: rows and columns that share one scale.
    """

    method: str
    block: tuple[int, int]

    @property
    def suffixes(self) -> dict[str, str]:
        """Ending of a key -> ending of the role: what stands beside or in place of a weight."""
        return {"_scale_inv": "_scales"} if self.method == "fp8" else {"_blocks": "_blocks", "_scales": "_scales"}

    def shape(self, ending: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a part: `ending` of its role, `shape` of the whole weight, outputs before inputs."""
        *experts, rows, columns = shape
        if self.method == "fp8":
            return (*experts, -(-rows // self.block[0]), -(-columns // self.block[1]))
        blocks = (*experts, rows, columns // FP4_BLOCK)
        return (*blocks, FP4_BLOCK // 2) if ending == "_blocks" else blocks


def read_quantisation(name: str, config: Mapping[str, Any]) -> Quantisation | None:
    """What config.json declares: a supported quantisation, or None for plain floats.

    Raises:
        CheckpointError: a quantisation that is not read here, with the way out.
    """
    if config.get("compression_config"):
        raise _refused(name, "compression_config")
    declared = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not declared:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if method == "mxfp4":
        return Quantisation("mxfp4", (1, FP4_BLOCK))
    block = declared.get("weight_block_size") if isinstance(declared, dict) else None
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
        return Quantisation("fp8", (block[0], block[1]))
    raise _refused(name, f"quantization_config: {method}{' without weight_block_size' if method == 'fp8' else ''}")


def _refused(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: config.json declares quantised weights ({what}); only fp8 with block scales and mxfp4 are read, "
        f"to move whole experts. {WAY_OUT}"
    )


def dequantise_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """float8 [out, in] times its block scales [ceil(out / b0), ceil(in / b1)], in float32."""
    rows, columns = weight.shape
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def dequantise_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 blocks [out, in / 32, 16], two values a byte, the low one first, and exponents [out, in / 32]: [out, in]."""
    table = torch.tensor(FP4_VALUES)
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
    return torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127).flatten(-2)
