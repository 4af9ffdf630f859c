"""Quantized weights by their specifications, number by number in numpy: what the package is held against.

FP8 E4M3 and E5M2, FP4 E2M1 and E8M0: OCP Microscaling Formats 1.0 and OFP8. compressed-tensors: integers plus half their range
in words of 32 bits. Nothing here is taken from the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

F32 = np.float32
Array = np.ndarray[Any, Any]


def e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, (code >> 1) & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


E4M3 = np.array([e4m3(code) for code in range(256)], F32)
E2M1 = np.array([e2m1(code) for code in range(16)], F32)


def nearest(values: Array, table: Array, sign_bit: int) -> Array:
    """Codes of the numbers in `table` that are nearest to `values`; of two, the even code. Saturating."""
    finite = [code for code in range(sign_bit) if math.isfinite(table[code])]
    sizes = table[finite].astype(np.float64)
    size = np.minimum(np.abs(values.astype(np.float64)), sizes[-1])
    above = np.searchsorted(sizes, size)  # the first that is not smaller
    below = np.maximum(above - 1, 0)
    up, down = sizes[above] - size, size - sizes[below]
    code = np.where(up < down, above, np.where(up > down, below, np.where(above % 2 == 0, above, below)))
    return (code + sign_bit * np.signbit(values)).astype(np.uint8)


def spread(scales: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Array:
    """The scale of each element."""
    return scales.astype(F32).repeat(block[0], axis=0)[: shape[0]].repeat(block[1], axis=1)[:, : shape[1]]


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def times(codes: Array, scales: Array, block: tuple[int, int]) -> Array:
    """Numbers [rows, columns] times the scales of their blocks, each product rounded to float32."""
    return codes.astype(F32) * spread(scales.reshape(grid(codes.shape, block)), codes.shape, block)


def largest(values: Array, block: tuple[int, int]) -> Array:
    sizes = np.maximum.reduceat(np.abs(values), range(0, values.shape[0], block[0]), axis=0)
    return np.maximum.reduceat(sizes, range(0, values.shape[1], block[1]), axis=1).astype(F32)


def over(values: Array, scales: Array, block: tuple[int, int]) -> Array:
    return values.astype(F32) / spread(scales.reshape(grid(values.shape, block)), values.shape, block)


@dataclass(frozen=True)
class Stored:
    """The parts of one matrix, in torch."""

    codes: Tensor
    scales: Tensor
    above: Tensor | None = None


def number(scales: Tensor) -> Array:
    """Scales as float32."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return np.array([2.0 ** (int(code) - 127) for code in scales.view(torch.uint8).flatten()], F32).reshape(scales.shape)
    return scales.float().numpy()


def stored_as(scales: Array, dtype: torch.dtype) -> Tensor:
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        codes = [round(math.log2(scale)) + 127 for scale in scales.flatten()]
        return torch.tensor(codes, dtype=torch.uint8).view(dtype).view(scales.shape)
    return torch.from_numpy(scales.astype(F32)).to(dtype)


# --- FP8 --------------------------------------------------------------------------------------------------------------


def read_fp8(one: Stored, block: tuple[int, int]) -> Array:
    return times(E4M3[one.codes.view(torch.uint8).numpy()], number(one.scales), block)


def write_fp8(values: Array, like: Stored, block: tuple[int, int], *, powers: bool) -> Stored:
    scales = largest(values, block) / F32(448)
    if powers:
        scales = np.array([2.0 ** ceil_log2(scale) if scale else 1.0 for scale in scales.flatten()], F32).reshape(scales.shape)
    scales[scales == 0] = 1
    stored = stored_as(scales, like.scales.dtype)
    codes = nearest(over(values, number(stored), block), E4M3, 128)
    return Stored(torch.from_numpy(codes).view(torch.float8_e4m3fn), stored.view(like.scales.shape))


def ceil_log2(value: float) -> int:
    mantissa, exponent = math.frexp(float(value))
    return exponent - 1 if mantissa == 0.5 else exponent


# --- FP4 --------------------------------------------------------------------------------------------------------------


def unpack_fp4(packed: Tensor) -> Array:
    codes = packed.view(torch.uint8).numpy().reshape(len(packed), -1)
    return np.stack([E2M1[codes & 15], E2M1[codes >> 4]], axis=-1).reshape(len(codes), -1)


def pack_fp4(values: Array) -> Array:
    codes = nearest(values, E2M1, 8)
    return (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)


def read_fp4(one: Stored) -> Array:
    return times(unpack_fp4(one.codes), number(one.scales).reshape(len(one.codes), -1), (1, 32))


def write_fp4(values: Array, like: Stored) -> Stored:
    sizes = largest(values, (1, 32))
    scales = np.array([2.0 ** (math.frexp(float(size))[1] - 3) if size else 1.0 for size in sizes.flatten()], F32)
    scales = scales.reshape(sizes.shape)
    codes = torch.from_numpy(pack_fp4(over(values, scales, (1, 32)))).view(like.codes.dtype)
    return Stored(codes.view(like.codes.shape), stored_as(scales, like.scales.dtype).view(like.scales.shape))


def read_nvfp4(one: Stored, *, divides: bool) -> Array:
    assert one.above is not None
    scales, above = E4M3[one.scales.view(torch.uint8).numpy()], F32(one.above.item())
    return times(unpack_fp4(one.codes), scales / above if divides else scales * above, (1, 16))


def write_nvfp4(values: Array, like: Stored, *, divides: bool) -> Stored:
    assert like.above is not None
    size = np.abs(values).max().astype(F32)
    above = F32(6 * 448) / size if divides else size / F32(6 * 448)
    if not size:
        above = F32(1)
    wanted = largest(values, (1, 16)) / F32(6)
    codes = nearest(wanted * above if divides else wanted / above, E4M3, 128)
    codes[(codes == 0) & (wanted > 0)] = 1
    codes[wanted == 0] = nearest(np.ones(1, F32), E4M3, 128)[0]
    scales = E4M3[codes] / above if divides else E4M3[codes] * above
    packed = torch.from_numpy(pack_fp4(over(values, scales, (1, 16)))).view(like.codes.dtype)
    return Stored(packed, torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.tensor([above]).view(like.above.shape))


# --- integers ---------------------------------------------------------------------------------------------------------


def unpack_integers(words: Tensor, bits: int, columns: int) -> Array:
    raw = words.numpy().astype(np.int64) & 0xFFFFFFFF
    found = [(raw >> (bits * i) & ((1 << bits) - 1)) - (1 << (bits - 1)) for i in range(32 // bits)]
    return np.stack(found, axis=-1).reshape(len(raw), -1)[:, :columns]


def pack_integers(codes: Array, bits: int) -> Tensor:
    per_word = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // per_word) * per_word), np.int64)
    padded[:, : codes.shape[1]] = codes + (1 << (bits - 1))
    words = sum(padded[:, i::per_word] << (bits * i) for i in range(per_word))
    return torch.from_numpy(np.asarray(words)).to(torch.int64).to(torch.int32)


def read_integers(one: Stored, bits: int, columns: int, group: int) -> Array:
    codes = unpack_integers(one.codes, bits, columns) if one.codes.dtype == torch.int32 else one.codes.numpy()
    return times(codes, number(one.scales), (1, group or columns))


def write_integers(values: Array, like: Stored, bits: int, group: int) -> Stored:
    block = 1, group or values.shape[1]
    scales = largest(values, block) / F32((2**bits - 1) / 2)
    scales[scales == 0] = 1
    stored = stored_as(scales, like.scales.dtype)
    half = 1 << (bits - 1)
    codes = np.clip(np.rint(over(values, number(stored), block)), -half, half - 1).astype(np.int64)
    packed = pack_integers(codes, bits) if like.codes.dtype == torch.int32 else torch.from_numpy(codes).to(torch.int8)
    return Stored(packed, stored)
