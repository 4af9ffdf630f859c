"""NVFP4: FP4 with an FP8 scale for each 16 values of a row, and one scale of these scales for each matrix.

Two tools write it. ModelOpt stores the number that scales are multiplied by, compressed-tensors the number that they are
divided by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.formats.blocks import apply_scales, largest_of_blocks
from hf_moe_lmc.formats.fp4 import flip_float4, float4_quotients
from hf_moe_lmc.formats.numbers import FP4_LARGEST, FP8_LARGEST, from_float4, or_one, to_float8
from hf_moe_lmc.formats.protocol import CODES, GLOBAL, SCALES

GROUP = 16
LEAST_SCALE = 2.0**-9  # the smallest FP8 number


@dataclass(frozen=True)
class NvFloat4:
    """Bytes with two FP4 values, FP8 scales, and one float32 number above these.

    With g = amax / (6 * 448) of the matrix, the scale of a group is the FP8 number nearest to amax / 6 / g. A group
    whose scale would be 0 gets the smallest one, a group of zeros 1.

    Attributes:
        divides: the number that is stored is 1 / g (compressed-tensors), not g (ModelOpt).
    """

    divides: bool
    rows: int = 0
    signs: bool = True

    @property
    def kind(self) -> str:
        return f"NVFP4 as {'compressed-tensors' if self.divides else 'ModelOpt'} has it"

    def decode(self, parts: Mapping[str, Tensor], first: int, columns: int) -> Tensor:
        values = from_float4(parts[CODES])
        apply_scales(values, self._scales(parts[SCALES].float(), parts[GLOBAL].float().view(1, 1)), (1, GROUP), first)
        return values

    def encode(self, values: Tensor, dtypes: Mapping[str, torch.dtype], largest: Tensor | None) -> dict[str, Tensor]:
        assert largest is not None
        above = largest.view(1, 1)
        stored = (
            torch.full_like(above, FP4_LARGEST * FP8_LARGEST) / or_one(above)
            if self.divides
            else above / (FP4_LARGEST * FP8_LARGEST)
        )
        stored = torch.where(above == 0, torch.ones_like(above), or_one(stored))
        wanted = largest_of_blocks(values, (1, GROUP)) / FP4_LARGEST
        scales = to_float8(wanted * stored if self.divides else wanted / stored, dtypes[SCALES])
        least = torch.where(wanted == 0, 1.0, LEAST_SCALE)  # where a scale is 0
        scales = torch.where(scales.float() == 0, least, scales.float()).to(dtypes[SCALES])
        codes = float4_quotients(values, self._scales(scales.float(), stored), GROUP)
        return {CODES: codes.view(dtypes[CODES]), SCALES: scales, GLOBAL: stored}

    def _scales(self, scales: Tensor, above: Tensor) -> Tensor:
        return scales / above if self.divides else scales * above

    def negatable(self, codes: Tensor) -> bool:
        return True

    def negated(self, codes: Tensor, sign: Tensor) -> Tensor:
        return flip_float4(codes, sign)
