"""How two models resemble each other outside their MoE blocks, from a few rows of a few matrices."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, reads_at_once
from hf_moe_lmc.checkpoints.joint import embedding_of
from hf_moe_lmc.matching.distance import UNRELATED_COSINE
from hf_moe_lmc.runtime.ahead import read_ahead

MATRICES = 12  # that are looked at, the input embeddings among them
ROWS = 32  # neighbouring ones, of each


@dataclass(frozen=True)
class OutsideSample:
    """What stands outside the MoE blocks of two models, compared on neighbouring rows of some matrices.

    Attributes:
        cosines: <A, B> / (||A|| ||B||) of the rows of each matrix, by its name.
    """

    cosines: dict[str, float]

    @property
    def median_cosine(self) -> float | None:
        """Median over the matrices; None without any. Unrelated models have about 0."""
        return float(torch.tensor(list(self.cosines.values())).median()) if self.cosines else None

    @property
    def unrelated(self) -> bool | None:
        """Whether the two have nothing in common; None: there is nothing to compare."""
        return None if self.median_cosine is None else self.median_cosine < UNRELATED_COSINE


def sample_outside(a: Checkpoint, b: Checkpoint, names: Collection[str]) -> OutsideSample:
    """Compares a few rows of some of the matrices that both have. Gains and biases start out equal, and do not count."""
    fitting = [name for name in names if name in b.tensors and _fits(a, b, name)]
    table = embedding_of(a, fitting)
    others = [name for name in fitting if name != table]
    count = MATRICES - (table is not None)
    chosen = [others[i * len(others) // count] for i in range(count)] if len(others) > count else others
    chosen += [table] if table is not None else []
    found = dict(zip(chosen, read_ahead(lambda name: _cosine(a, b, name), chosen, reads_at_once(a, b)), strict=True))
    return OutsideSample({name: cosine for name, cosine in found.items() if cosine is not None})


def _fits(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Whether a tensor is a matrix of numbers in both, with rows of one length."""
    infos = a.tensors[name], b.tensors[name]
    plain = all(info.dtype.is_floating_point and info.dtype.itemsize >= 2 and info.numel for info in infos)
    return plain and len(infos[0].shape) > 1 and infos[0].shape[1:] == infos[1].shape[1:]


def _cosine(a: Checkpoint, b: Checkpoint, name: str) -> float | None:
    """Of the rows in the midst; None where one side has nothing but zeros there, or NaN."""
    shape = a.tensors[name].shape
    rows = min(shape[0], b.tensors[name].shape[0])
    count = min(ROWS, rows)
    width = math.prod(shape[1:])
    first = (rows - count) // 2 * width
    x, y = (one.read(name, first, count * width).float() for one in (a, b))
    norms = torch.linalg.vector_norm(x), torch.linalg.vector_norm(y)
    cosine = float(torch.dot(x, y) / (norms[0] * norms[1]))
    return cosine if math.isfinite(cosine) else None
