"""Integers of 4 or 8 bits with a scale for each group of a row: compressed-tensors' pack-quantized and int-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hf_moe_lmc.formats.blocks import apply_scales, block_count, largest_of_blocks, quotients
from hf_moe_lmc.formats.fp8 import stored_scales
from hf_moe_lmc.formats.numbers import or_one
from hf_moe_lmc.formats.protocol import CODES, SCALES
from hf_moe_lmc.runtime.memory import reused

WORD = 32  # bits of a packed number


@dataclass(frozen=True)
class Integers:
    """Integers from -2 ** (bits - 1) on, and a scale for each group of a row.

    The scale of a group is amax / (2 ** (bits - 1) - 0.5): half of the range of the codes, as compressed-tensors has it.

    Attributes:
        bits: 4 or 8.
        group: columns that share a scale; 0: all of them.
        packed: in words of 32 bits, the first number in the lowest bits, each plus 2 ** (bits - 1); else one a byte.
    """

    bits: int
    group: int
    packed: bool = True

    @property
    def kind(self) -> str:
        return f"INT{self.bits} in groups of {self.group}" if self.group else f"INT{self.bits} with one scale a row"

    @property
    def rows(self) -> int:
        return 1

    @property
    def signs(self) -> bool:
        return True

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    def decode(self, parts: Mapping[str, Tensor], first: int, columns: int) -> Tensor:
        values = self._unpacked(parts[CODES], columns)
        apply_scales(values, parts[SCALES].float(), (1, self.group or columns), first)
        return values

    def encode(self, values: Tensor, dtypes: Mapping[str, torch.dtype], largest: Tensor | None) -> dict[str, Tensor]:
        block = 1, self.group or values.shape[1]
        scales = or_one(largest_of_blocks(values, block) / (-self.lowest - 0.5))
        scales, stored = stored_scales(scales, dtypes[SCALES])
        parts = [
            self._pack(part.round_().clamp_(self.lowest, -self.lowest - 1)) for _, part in quotients(values, scales, block)
        ]
        return {CODES: torch.cat(parts), SCALES: stored}

    def negated(self, codes: Tensor, sign: Tensor) -> Tensor:
        columns = codes.shape[1] * WORD // self.bits if self.packed else codes.shape[1]
        if sign.shape[-1] > 1 and sign.shape[-1] < columns:  # the last word is not full
            sign = torch.nn.functional.pad(sign, (0, columns - sign.shape[-1]), value=1)
        return self._pack(self._unpacked(codes, columns) * sign)

    def negatable(self, codes: Tensor) -> bool:
        return not bool(
            (self._unpacked(codes, codes.shape[1] * (WORD // self.bits if self.packed else 1)) == self.lowest).any()
        )

    def _unpacked(self, codes: Tensor, columns: int) -> Tensor:
        """Codes as float32 numbers [rows, columns]."""
        if not self.packed:
            return codes.float()
        raw = codes.contiguous().view(torch.uint8)
        if self.bits == 8:
            values = reused(raw.shape, torch.float32).copy_(raw).sub_(128)
        else:
            index = reused(raw.shape, torch.int32).copy_(raw)
            values = reused((raw.shape[0], 2 * raw.shape[1]), torch.float32)
            torch.index_select(_pairs(), 0, index.view(-1), out=values.view(torch.int64).view(-1))
        return values if values.shape[1] == columns else values[:, :columns].contiguous()

    def _pack(self, codes: Tensor) -> Tensor:
        """Numbers [rows, columns] as they are stored; the end of the last word of a row is 0."""
        if not self.packed:
            return codes.to(torch.int8)
        raw = (codes - self.lowest).to(torch.uint8)
        per_word = WORD // self.bits
        short = block_count(raw.shape[1], per_word) * per_word - raw.shape[1]
        raw = torch.nn.functional.pad(raw, (0, short)) if short else raw
        if self.bits == 4:
            raw = raw[:, ::2] | (raw[:, 1::2] << 4)
        return raw.contiguous().view(torch.int32)


@cache
def _pairs() -> Tensor:
    """The two numbers that each byte stands for, as 64-bit entries."""
    byte = torch.arange(256)
    return torch.stack([byte % 16 - 8, byte // 16 - 8], dim=1).float().view(torch.int64).view(-1)
