"""Scales that blocks of a matrix share: found, applied, divided by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def block_count(size: int, block: int) -> int:
    """Blocks in so many rows or columns, the last one perhaps cut short."""
    return -(-size // block)


def spread(scales: Tensor, width: int, columns: int) -> Tensor:
    """A scale for each column: [rows, blocks] becomes [rows, columns]; a single block stays one column, which broadcasts."""
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(width, dim=1)[:, :columns]


def apply_scales(values: Tensor, scales: Tensor, block: tuple[int, int], first: int) -> None:
    """Multiplies values [rows, columns] in place by the scales [row blocks, column blocks] of their blocks.

    Args:
        block: rows and columns that share a scale.
        first: number of the first row within the first block.
    """
    rows, columns = values.shape
    if block[0] == 1 and columns % block[1] == 0:
        values.view(rows, -1, block[1]).mul_(scales.unsqueeze(2))
        return
    factors = spread(scales, block[1], columns)
    if block[0] == 1:
        values.mul_(factors)
        return
    start = 0
    for i in range(len(factors)):
        end = min(rows, (i + 1) * block[0] - first)
        values[start:end].mul_(factors[i])
        start = end


def largest_of_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest absolute value of each block: [rows, columns] becomes [row blocks, column blocks]. NaN if there is one."""
    rows, columns = values.shape
    short = -columns % block[1]
    sizes = pad(values, (0, short)) if short else values
    if block[0] > 1:
        by_rows = [part.abs().amax(dim=0) for part in sizes.split(block[0])]
        return torch.stack(by_rows).view(len(by_rows), -1, block[1]).amax(dim=2)
    blocks = sizes.view(rows, -1, block[1])
    low, high = torch.aminmax(blocks, dim=2)
    return torch.maximum(high, -low)


def divide(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Values [rows, columns], which begin with a block, divided by the scales of their blocks: a new tensor."""
    rows, columns = values.shape
    if block[0] == 1 and columns % block[1] == 0:
        return (values.view(rows, -1, block[1]) / scales.unsqueeze(2)).view(rows, columns)
    factors = spread(scales, block[1], columns)
    if block[0] == 1:
        return values / factors
    return torch.cat([part / factors[i] for i, part in enumerate(values.split(block[0]))])
