"""How far two models are apart outside their MoE blocks, where no expert alignment helps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.matching.rows import BLOCK
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.runtime.memory import reused
from hf_moe_lmc.runtime.progress import tracked

UNRELATED_COSINE = 0.5  # median over matrices outside the MoE blocks; independent initialisations have about 0


@dataclass(frozen=True)
class OutsideDistance:
    """How far apart two models are outside their MoE blocks, which no expert alignment changes.

    Attributes:
        relative_distance: ||A - B|| / ||A|| over all tensors outside.
        median_cosine: median over the matrices among them of <A, B> / (||A|| ||B||); gains and biases, which start out
            equal in unrelated models, do not count. None without matrices.
        furthest: the tensors with the largest relative distances, largest first.
    """

    relative_distance: float
    median_cosine: float | None
    furthest: dict[str, float]

    @property
    def unrelated(self) -> bool:
        return self.median_cosine is not None and self.median_cosine < UNRELATED_COSINE


def outside_distance(a: MoEModel, b: MoEModel, *, allow_nonfinite: bool = False) -> OutsideDistance:
    """Compares the tensors outside the MoE blocks that both models have, streaming; quantized ones do not count.

    Raises:
        CheckpointError: a weight that is NaN or infinite, unless allowed: then its tensor does not count.
    """
    relative, cosines = {}, []
    total = total_norm = 0.0
    in_both = set(b.outside)
    for name in tracked([name for name in a.outside if name in in_both], desc="comparing the rest", unit="tensor"):
        info = a.checkpoint.tensors[name]
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2 or info.numel == 0:
            continue  # quantized values mean nothing without their scales
        if b.checkpoint.tensors[name].shape != info.shape:
            continue  # a vocabulary that grew
        moments = _moments(a.checkpoint, b.checkpoint, name, allow_nonfinite=allow_nonfinite)
        if moments is None:
            continue
        distance, norm_a, norm_b, inner = moments
        total, total_norm = total + distance, total_norm + norm_a
        relative[name] = math.sqrt(distance / (norm_a or norm_b or 1.0))
        if len(info.shape) > 1 and norm_a and norm_b:
            cosines.append(inner / math.sqrt(norm_a * norm_b))
    furthest = sorted(relative, key=lambda name: -relative[name])[:5]
    return OutsideDistance(
        relative_distance=math.sqrt(total / total_norm) if total_norm else 0.0,
        median_cosine=float(torch.tensor(cosines).median()) if cosines else None,
        furthest={name: relative[name] for name in furthest},
    )


def _moments(
    a: Checkpoint, b: Checkpoint, name: str, *, allow_nonfinite: bool, dtype: torch.dtype = torch.float32
) -> tuple[float, float, float, float] | None:
    """||a - b||^2, ||a||^2, ||b||^2, <a, b> of one tensor; None where weights that are not finite are allowed and there."""
    sums = torch.zeros(4, dtype=torch.float64)
    room = [reused(min(BLOCK, a.tensors[name].numel), dtype) for _ in range(2)]  # of each block in turn
    for first, values in a.chunks(name):
        for block_a, block_b in zip(values.split(BLOCK), b.read(name, first, len(values)).split(BLOCK), strict=True):
            x, y = (memory[: len(block)].copy_(block) for memory, block in zip(room, (block_a, block_b), strict=True))
            parts = [torch.dot(left, right) for left, right in ((x, x), (y, y), (x, y))]
            x.sub_(y)
            sums += torch.stack([torch.dot(x, x), *parts]).double()
    if not bool(sums.isfinite().all()):
        for checkpoint in (a, b):
            place = checkpoint.first_not_finite(name)
            if place and allow_nonfinite:
                return None
            if place:
                raise CheckpointError(
                    f"{checkpoint.name}/{checkpoint.tensors[name].shard}: tensor {name} holds NaN or infinite weights, the "
                    f"first at {place}. Repair the checkpoint, or write it as it is with --allow-nonfinite"
                )
        if dtype != torch.float64:  # squares beyond the range of float32
            return _moments(a, b, name, allow_nonfinite=allow_nonfinite, dtype=torch.float64)
    distance, norm_a, norm_b, inner = sums.tolist()
    return distance, norm_a, norm_b, inner
