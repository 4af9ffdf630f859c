"""Reads ranges of quantized weights as float32, straight from their parts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.formats.fp8 import read_scales
from hf_moe_lmc.formats.protocol import CODES, Part, StoredWeight
from hf_moe_lmc.runtime.memory import reused


def read_part(checkpoint: Checkpoint, part: Part, matrix: int, first: int, count: int) -> Tensor:
    """The rows of a part that hold rows `first` to `first + count` of a matrix, in its own dtype, [rows, width]."""
    start, end = part.window(matrix, first, count)
    return checkpoint.read(part.info.name, start * part.width, (end - start) * part.width).view(end - start, part.width)


def read_rows(checkpoint: Checkpoint, weight: StoredWeight, matrix: int, first: int, count: int) -> Tensor:
    """Rows of one of the matrices that a weight is stored as, float32 [count, columns], in memory of their own.

    Raises:
        CheckpointError: a scale is NaN or infinite, or is 0 where a code is not.
    """
    parts = {role: read_part(checkpoint, part, matrix, first, count) for role, part in weight.parts.items()}
    begin = first % (weight.format.rows or weight.rows)
    values = weight.format.decode(parts, begin, weight.columns)
    _check_scales(checkpoint, weight, parts, begin)
    return values


def _check_scales(checkpoint: Checkpoint, weight: StoredWeight, parts: dict[str, Tensor], begin: int) -> None:
    for role, stored in parts.items():
        if role == CODES:
            continue
        scales = read_scales(stored)
        name = weight.parts[role].info.name
        low, high = (float(bound) for bound in scales.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            raise CheckpointError(f"{checkpoint.name}: {name}: a scale is NaN or infinite; fetch the checkpoint again")
        if low <= 0 <= high and bool((scales == 0).any()):
            ones = torch.where(scales == 0, torch.ones_like(scales), scales)
            with_ones = weight.format.decode({**parts, role: ones}, begin, weight.columns)
            without = weight.format.decode(parts, begin, weight.columns)
            if bool(((without == 0) & (with_ones != 0)).any()):
                raise CheckpointError(
                    f"{checkpoint.name}: {name}: a scale is 0 where codes of {weight.name} are not; fetch the checkpoint again"
                )


def read_range(checkpoint: Checkpoint, weight: StoredWeight, first: int, count: int) -> Tensor:
    """`count` elements of a weight from element `first` of its shape, a row in float32.

    Rows are read whole. Of a weight that is stored transposed, the matrices that the range touches are.
    """
    size = weight.rows * weight.columns
    if count == size and first % size == 0:
        return flat(weight, read_rows(checkpoint, weight, first // size, 0, weight.rows))
    out = reused(count, torch.float32)
    done = 0
    while done < count:
        matrix, at = divmod(first + done, size)
        if weight.transposed:
            found, skip = flat(weight, read_rows(checkpoint, weight, matrix, 0, weight.rows)), at
        else:
            row, skip = divmod(at, weight.columns)
            rows = min(weight.rows - row, -(-(skip + count - done) // weight.columns))
            found = read_rows(checkpoint, weight, matrix, row, rows).view(-1)
        step = min(len(found) - skip, count - done)
        out[done : done + step] = found[skip : skip + step]
        done += step
    return out


def flat(weight: StoredWeight, values: Tensor) -> Tensor:
    """Rows as they are stored, whole matrices where these are transposed, as a row in the shape of the weight."""
    if not weight.transposed:
        return values.view(-1)
    out = reused((weight.columns, weight.rows), torch.float32)
    return out.copy_(values.t()).view(-1)
