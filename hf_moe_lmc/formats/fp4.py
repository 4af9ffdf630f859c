"""FP4 with a power of 2 for each 32 values of a row: MXFP4 of the Open Compute Project, in gpt-oss and DeepSeek-V4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.formats.blocks import apply_scales, largest_of_blocks, quotients
from hf_moe_lmc.formats.fp8 import read_scales, stored_scales
from hf_moe_lmc.formats.numbers import from_float4, or_one, power_below, to_float4
from hf_moe_lmc.formats.protocol import CODES, SCALES
from hf_moe_lmc.runtime.memory import reused

GROUP = 32
_LARGEST_POWER = 4.0  # of FP4: 2 ** 2; its largest number is 6


@dataclass(frozen=True)
class Float4:
    """Bytes with two FP4 values, the low half first, and an exponent for each GROUP values of a row.

    The scale of a group is 2 ** (floor(log2(amax)) - 2), and values beyond 6 times it become 6 times it: section 6.3 of the
    OCP Microscaling Formats specification, version 1.0.
    """

    kind: str = "MXFP4"
    rows: int = 1
    signs: bool = True

    def decode(self, parts: Mapping[str, Tensor], first: int, columns: int) -> Tensor:
        values = from_float4(parts[CODES])
        apply_scales(values, read_scales(parts[SCALES]), (1, GROUP), first)
        return values

    def encode(self, values: Tensor, dtypes: Mapping[str, torch.dtype], largest: Tensor | None) -> dict[str, Tensor]:
        sizes = largest_of_blocks(values, (1, GROUP))
        powers = torch.where(sizes == 0, torch.ones_like(sizes), power_below(or_one(sizes)) / _LARGEST_POWER)
        scales, stored = stored_scales(powers, dtypes[SCALES])
        return {CODES: float4_quotients(values, scales, GROUP).view(dtypes[CODES]), SCALES: stored}

    def negatable(self, codes: Tensor) -> bool:
        return True

    def negated(self, codes: Tensor, sign: Tensor) -> Tensor:
        return flip_float4(codes, sign)


def float4_quotients(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """Packed FP4 codes of values [rows, columns] over the scales of their groups."""
    codes = reused((len(values), values.shape[1] // 2), torch.uint8)
    for rows, part in quotients(values, scales, (1, group)):
        codes[rows] = to_float4(part)
    return codes


def flip_float4(codes: Tensor, sign: Tensor) -> Tensor:
    """Packed FP4 codes [rows, columns / 2] of the values times `sign`, which broadcasts to [rows, columns]."""
    down = (sign < 0).to(torch.uint8)
    bits = (down << 3) | (down << 7) if sign.shape[-1] == 1 else (down[..., ::2] << 3) | (down[..., 1::2] << 7)
    return (codes.view(torch.uint8) ^ bits).view(codes.dtype)
