"""What a storage format is: the numbers that stored tensors stand for, and how numbers are stored.

A quantized weight lies in parts: its codes, its scales, perhaps one scale above these. Every part has a row for each group of
rows of the weight. So a range of rows of the weight is a range of rows of every part, and can be read and written alone.

A format is one value with two directions, `decode` and `encode`, on such ranges. It knows neither files nor names; which
tensors are the parts of which weight, `recognition` finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.header import TensorInfo

CODES, SCALES, GLOBAL = "codes", "scales", "global"


class Format(Protocol):
    """A way to store the rows of a matrix [rows, columns].

    Attributes:
        kind: in words, with its sizes: `FP8 in blocks of 128 x 128`.
        rows: of a matrix that are encoded together, as they share a scale. 0: all of them.
        signs: rows and columns of a matrix can change sign without another rounding, see also `negatable`.
    """

    @property
    def kind(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def signs(self) -> bool: ...

    def decode(self, parts: Mapping[str, Tensor], first: int, columns: int) -> Tensor:
        """The values of some rows, float32 [rows, columns], in memory of their own.

        Args:
            parts: the rows of each part that these rows lie in, [rows of the part, width].
            first: number of the first row among those that share the first row of scales.
        """

    def encode(self, values: Tensor, dtypes: Mapping[str, torch.dtype], largest: Tensor | None) -> dict[str, Tensor]:
        """The parts of some rows: values float32 [rows, columns] that begin where a row of every part does.

        Args:
            dtypes: of the parts.
            largest: the largest absolute value of the matrix, where `rows` is 0; else None.
        """

    def negatable(self, codes: Tensor) -> bool:
        """Whether the negative of each of these codes is a code."""

    def negated(self, codes: Tensor, sign: Tensor) -> Tensor:
        """Codes [rows, width] of the values times `sign`: 1 or -1, broadcast to [rows, columns]."""


@dataclass(frozen=True)
class Part:
    """One tensor of a quantized weight.

    Attributes:
        per: rows of a matrix that share one row of this tensor.
        rows: of this tensor for each matrix.
        width: elements of one of its rows.
    """

    info: TensorInfo
    per: int
    rows: int
    width: int

    def window(self, matrix: int, first: int, count: int) -> tuple[int, int]:
        """First and last but one of the rows of this tensor that hold rows `first` to `first + count` of a matrix."""
        start = matrix * self.rows
        return start + first // self.per, start + -(-(first + count) // self.per)


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is stored in parts, under the name and with the shape that it would have unquantized.

    Attributes:
        parts: by role: CODES, SCALES, GLOBAL.
        beside: tensors that say the shape again, which nothing changes.
        activations: scales of what goes into the weight; they move with it.
        matrices, rows, columns: it is stored as so many matrices one after the other.
        transposed: inputs and outputs are exchanged in what is stored: each matrix is that of `shape` transposed.
    """

    name: str
    shape: tuple[int, ...]
    format: Format
    parts: Mapping[str, Part]
    beside: tuple[TensorInfo, ...]
    activations: tuple[TensorInfo, ...]
    matrices: int
    rows: int
    columns: int
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """All tensors on disk that belong to it."""
        return (*(part.info for part in self.parts.values()), *self.beside, *self.activations)

    @property
    def layout(self) -> tuple[object, ...]:
        """What two weights must have in common for the bytes of one to take the place of the other's."""
        parts = tuple((role, part.info.dtype, part.rows, part.width) for role, part in self.parts.items())
        stem = self.name.removesuffix(".weight")
        beside = tuple((info.name.removeprefix(stem), info.dtype, info.shape) for info in self.activations)
        return self.format, self.rows, self.columns, self.transposed, parts, beside
