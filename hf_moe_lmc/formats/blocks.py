"""Scales that blocks of a matrix share: found, applied, divided by.

All of it works on a few rows at a time: what lies between two steps then stays in the cache of a processor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_moe_lmc.runtime.memory import reused

AT_ONCE = 1 << 17  # elements of one step: half a megabyte in float32


def block_count(size: int, block: int) -> int:
    """Blocks in so many rows or columns, the last one perhaps cut short."""
    return -(-size // block)


def tiles(rows: int, columns: int, block: int, first: int = 0) -> Iterator[tuple[int, int, int]]:
    """(row block, first row, last but one) of the steps that rows are worked on in. None of them crosses two row blocks.

    Args:
        block: rows that share a scale; with 1, a step has several, and counts as that of the first.
        first: number of the first row within the first block.
    """
    step = max(1, AT_ONCE // columns)
    start = 0
    while start < rows:
        number = (first + start) // block
        end = min(rows, start + step, rows if block == 1 else (number + 1) * block - first)
        yield number, start, end
        start = end


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
    for number, start, end in tiles(rows, columns, block[0], first):
        values[start:end].mul_(factors[number])


def largest_of_blocks(values: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest absolute value of each block: [rows, columns] becomes [row blocks, column blocks]. NaN if there is one."""
    rows, columns = values.shape
    if block[0] == 1:
        short = -columns % block[1]
        blocks = (pad(values, (0, short)) if short else values).view(rows, -1, block[1])
        low, high = torch.aminmax(blocks, dim=2)
        return torch.maximum(high, -low)
    found = torch.zeros(block_count(rows, block[0]), block_count(columns, block[1]) * block[1])
    for number, start, end in tiles(rows, columns, block[0]):
        highest = found[number, :columns]
        torch.maximum(highest, values[start:end].abs().amax(dim=0), out=highest)
    return found.view(len(found), -1, block[1]).amax(dim=2)


def quotients(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Values [rows, columns], which begin with a block, divided by the scales of their blocks: rows, and what they become.

    Each step has the memory of the one before it.
    """
    rows, columns = values.shape
    even = block[0] == 1 and columns % block[1] == 0
    factors = scales if even else spread(scales, block[1], columns)
    memory = reused((min(rows, max(1, AT_ONCE // columns)), columns), torch.float32)
    for number, start, end in tiles(rows, columns, block[0]):
        part, out = values[start:end], memory[: end - start]
        if even:
            shape = end - start, -1, block[1]
            torch.div(part.view(shape), factors[start:end].unsqueeze(2), out=out.view(shape))
        else:
            torch.div(part, factors[start:end] if block[0] == 1 else factors[number], out=out)
        yield slice(start, end), out
