"""Small numbers: FP8, FP4 and E8M0 as float32 and back.

Torch's own conversion of FP8 on a CPU takes a code at a time. Here the bits are put in the places that they have in float16,
many at once. Of FP4, two codes are looked up at once, in a table of pairs of float32. Both are ten times as fast.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import is_finite
from hf_moe_lmc.runtime.memory import reused

FP8_LARGEST = 448.0  # of E4M3
FP4_LARGEST = 6.0
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_NO_SECOND_SIGN = ~0x4000  # a sign that was copied into the bit beside it
EXPONENT_BIAS = 127  # of E8M0: code 127 is 1, code 255 is NaN
# Midpoints between neighbouring FP4 values, by whether a tie goes up: to the code whose last bit is 0.
_TIES_UP, _TIES_DOWN = (0.75, 1.75, 3.5), (0.25, 1.25, 2.5, 5.0)


def from_float8(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """FP8 values as float32, in the shape of `codes`.

    Args:
        out: where they are put; None: memory from `reused`.

    Example:
        >>> from_float8(torch.tensor([1.0, -448.0]).to(torch.float8_e4m3fn))
        tensor([   1., -448.])
    """
    out = reused(codes.shape, torch.float32) if out is None else out
    if codes.dtype == torch.float8_e5m2:  # the upper half of a float16
        return out.copy_(codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(8).view(torch.float16))
    if codes.dtype != torch.float8_e4m3fn or not is_finite(codes):
        return out.copy_(codes)
    # Sign, exponent and mantissa in the places that they have in a float16, whose exponent counts from 15, not from 7.
    halves = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(_NO_SECOND_SIGN)
    return out.copy_(halves.view(torch.float16)).mul_(2.0**8)


def from_float4(packed: Tensor) -> Tensor:
    """Bytes with two FP4 values each, the low half first, as float32: [..., columns / 2] becomes [..., columns].

    Example:
        >>> from_float4(torch.tensor([[0x2F]], dtype=torch.uint8))
        tensor([[-6.,  1.]])
    """
    found = _looked_up(_pairs_of_float4(), packed.contiguous().view(-1).view(torch.uint8))
    return found.view(*packed.shape[:-1], 2 * packed.shape[-1])


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """Pairs of float32 from a table of 64-bit entries, one row of twice as many numbers as `codes`."""
    index = reused(codes.numel(), torch.int32)
    index.copy_(codes)
    out = reused(2 * codes.numel(), torch.float32)
    torch.index_select(table, 0, index, out=out.view(torch.int64))
    return out


@cache
def _pairs_of_float4() -> Tensor:
    return _pairs(torch.tensor(FP4_VALUES))


def _pairs(values: Tensor) -> Tensor:
    """All pairs of values, the first one's code in the low part of the index, as 64-bit entries."""
    count = len(values)
    return torch.stack([values.repeat(count), values.repeat_interleave(count)], dim=1).view(torch.int64).view(-1)


def to_float8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to the nearest FP8 number, ties to even; larger ones become the largest. NaN stays NaN."""
    out = torch.empty(values.shape, dtype=dtype)
    round_to_float8(values.clone(), out)
    return out


def round_to_float8(values: Tensor, out: Tensor) -> None:
    """As `to_float8`, into `out`; what was in `values` is lost."""
    largest = torch.finfo(out.dtype).max
    out.copy_(values.clamp_(-largest, largest))


def to_float4(values: Tensor) -> Tensor:
    """Values rounded to the nearest FP4 number, ties to even, packed: [..., columns] becomes bytes [..., columns / 2].

    Values beyond 6 become 6.

    Example:
        >>> to_float4(torch.tensor([[-7.0, 1.25]]))
        tensor([[47]], dtype=torch.uint8)
    """
    size = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    for middle in _TIES_UP:
        codes += size >= middle
    for middle in _TIES_DOWN:
        codes += size > middle
    codes += values.signbit().to(torch.uint8) << 3
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def from_exponents(codes: Tensor) -> Tensor:
    """Powers of 2 that E8M0 codes (uint8, or float8_e8m0fnu) stand for, float32; code 255 is NaN."""
    index = codes.contiguous().view(torch.uint8).view(-1).to(torch.int32)
    return _powers().index_select(0, index).view(codes.shape)


@cache
def _powers() -> Tensor:
    exponents = torch.arange(256, dtype=torch.int32) - EXPONENT_BIAS
    return torch.ldexp(torch.ones(256), exponents).masked_fill(exponents == 255 - EXPONENT_BIAS, float("nan"))


def to_exponents(powers: Tensor) -> Tensor:
    """The E8M0 codes of powers of 2, uint8; NaN gives 255."""
    codes = (torch.frexp(powers).exponent - 1 + EXPONENT_BIAS).clamp(0, 254)
    return codes.masked_fill(powers.isnan(), 255).to(torch.uint8)


def power_above(values: Tensor) -> Tensor:
    """2 ** ceil(log2(value)) of positive float32 numbers, without rounding; between 2 ** -127 and 2 ** 127.

    Example:
        >>> power_above(torch.tensor([0.75, 1.0, 1.5]))
        tensor([1., 1., 2.])
    """
    mantissa, exponent = torch.frexp(values)
    return _power(exponent - (mantissa == 0.5).to(torch.int32), values)


def power_below(values: Tensor) -> Tensor:
    """2 ** floor(log2(value)) of positive float32 numbers, without rounding; between 2 ** -127 and 2 ** 127.

    Example:
        >>> power_below(torch.tensor([0.75, 1.0, 1.5]))
        tensor([0.5000, 1.0000, 1.0000])
    """
    return _power(torch.frexp(values).exponent - 1, values)


def _power(exponents: Tensor, values: Tensor) -> Tensor:
    powers = torch.ldexp(torch.ones(exponents.shape), exponents.clamp(-EXPONENT_BIAS, EXPONENT_BIAS))
    return powers.masked_fill(~values.isfinite(), float("nan"))


def or_one(scales: Tensor) -> Tensor:
    """Scales, and 1 where a scale is 0: of a block of zeros, or of one so small that float32 has no scale for it."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
