"""How many threads torch computes with: one where the operations are small, all of them elsewhere.

Threads that share an operation meet at its end, and spin until the last one is there. Where other programs want the cores,
small operations then take several times the processor time of one thread, and longer besides. On a free machine they gain
little.

A choice of the user is obeyed: OMP_NUM_THREADS, MKL_NUM_THREADS, or `torch.set_num_threads` with another number than torch
would take by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
from torch import nn

SMALL = 1.25e8  # multiply-adds of an operation, about 2.5 ms of one core
TRAFFIC = 64  # a weight read from memory takes as long as so many multiply-adds
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Products:
    """Matrix products of one kind.

    Attributes:
        count: how many.
        weights: elements of the matrix in each.
        rows: vectors that each matrix is multiplied with.

    Example:
        >>> Products(count=2, weights=1000, rows=36).work
        200000
    """

    count: int
    weights: int
    rows: int

    @property
    def work(self) -> int:
        """Multiply-adds of all, and the time to read the matrices in the same unit."""
        return self.count * self.weights * (self.rows + TRAFFIC)


def products_of(model: nn.Module, tokens: int, top_k: int) -> list[Products]:
    """The products of a forward pass of a transformers model, from the shapes of its parameters.

    Args:
        model: its experts stand in tensors [expert, out, in]; the device does not matter.
        tokens: of one pass.
        top_k: experts per token.

    Example:
        >>> products_of(nn.Linear(8, 4), tokens=10, top_k=1)
        [Products(count=1, weights=32, rows=10)]
    """
    found = []
    for parameter in model.parameters():
        if parameter.ndim == 3:
            experts = len(parameter)
            found.append(Products(experts, parameter[0].numel(), -(-tokens * min(top_k, experts) // experts)))
        elif parameter.ndim == 2:
            found.append(Products(1, parameter.numel(), tokens))
    return found


@contextmanager
def suited(products: Sequence[Products] = ()) -> Iterator[None]:
    """Computes with one thread in the block if the products are small on average, else with as many as there are.

    Args:
        products: what the block computes; nothing named is small.
    """
    before = torch.get_num_threads()
    count = sum(some.count for some in products)
    if before == 1 or sum(some.work for some in products) > SMALL * count > 0 or is_chosen():
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_chosen() -> bool:
    """Whether the user has chosen the number of threads."""
    return any(os.environ.get(name) for name in VARIABLES) or torch.get_num_threads() not in _by_itself()


def _by_itself() -> set[int]:
    """The numbers that torch takes by itself: all cores or all that this process may use, hyperthreads counted or not."""
    logical = psutil.cpu_count() or 1
    threads_per_core = logical // (psutil.cpu_count(logical=False) or logical) or 1
    usable = {logical, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical}
    return usable | {max(1, count // threads_per_core) for count in usable}
