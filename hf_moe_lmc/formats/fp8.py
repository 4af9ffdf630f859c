"""FP8: a scale for each block of a matrix, for each row, or for all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.formats.blocks import block_count, largest_of_blocks, quotients, spread, tiles
from hf_moe_lmc.formats.numbers import (
    from_exponents,
    from_float8,
    or_one,
    power_above,
    round_to_float8,
    to_exponents,
)
from hf_moe_lmc.formats.protocol import CODES, SCALES
from hf_moe_lmc.runtime.memory import reused

EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)


@dataclass(frozen=True)
class Float8:
    """FP8 codes and their scales.

    Attributes:
        block: rows and columns that share a scale; 0: all of them.
        powers: scales are powers of 2, in whatever dtype they are stored.
    """

    block: tuple[int, int]
    powers: bool = False

    @property
    def kind(self) -> str:
        rows, columns = self.block
        if rows == 0:
            return "FP8 with one scale a tensor"
        if columns == 0:
            return "FP8 with one scale a row"
        return f"FP8 in blocks of {rows} x {columns}"

    @property
    def rows(self) -> int:
        return self.block[0]

    @property
    def signs(self) -> bool:
        return True

    def decode(self, parts: Mapping[str, Tensor], first: int, columns: int) -> Tensor:
        codes = parts[CODES]
        block = self.block[0] or first + len(codes), self.block[1] or columns
        factors = spread(read_scales(parts[SCALES]).view(-1, block_count(columns, block[1])), block[1], columns)
        values = reused(codes.shape, torch.float32)
        for number, start, end in tiles(len(codes), columns, block[0], first):
            factor = factors[start:end] if block[0] == 1 else factors[number]
            from_float8(codes[start:end], values[start:end]).mul_(factor)
        return values

    def encode(self, values: Tensor, dtypes: Mapping[str, torch.dtype], largest: Tensor | None) -> dict[str, Tensor]:
        block = self.block[0] or len(values), self.block[1] or values.shape[1]
        sizes = largest.view(1, 1) if largest is not None else largest_of_blocks(values, block)
        scales = or_one(sizes / torch.finfo(dtypes[CODES]).max)
        scales, stored = stored_scales(power_above(scales) if self.powers else scales, dtypes[SCALES])
        codes = reused(values.shape, dtypes[CODES])
        for rows, part in quotients(values, scales, block):
            round_to_float8(part, codes[rows])
        return {CODES: codes, SCALES: stored}

    def negatable(self, codes: Tensor) -> bool:
        return True

    def negated(self, codes: Tensor, sign: Tensor) -> Tensor:
        flipped = codes.view(torch.uint8) ^ ((sign < 0).to(torch.uint8) << 7)
        return flipped.view(codes.dtype)


def read_scales(stored: Tensor) -> Tensor:
    """Scales as float32: numbers, or exponents of 2 that count from 127."""
    return from_exponents(stored) if stored.dtype in EXPONENTS else stored.float()


def stored_scales(scales: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as they are read back, float32, and as they are stored. None of them is 0."""
    if dtype in EXPONENTS:
        codes = to_exponents(scales)
        return from_exponents(codes), codes.view(dtype)
    stored = or_one(scales.to(dtype))
    return stored.float(), stored
