"""Matrices [unit, model] in their own dtype and layout, looked at in float32 one block that fits a cache at a time.

Whatever the layout on disk, a canonical matrix is a view: its rows may be contiguous, or its columns (a down projection, say).
Blocks follow the layout, so that nothing is copied as a whole. Sums come back in float64, one for each unit.

The arithmetic is float32 over at most `model` terms, in whatever order, then float64; `sum_error` bounds it. On the CPU the
matrix is cut into a fixed number of strips, each the work of one thread. So results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.runtime.memory import reused

BLOCK = 1 << 20  # elements of a block on the CPU: threads in step with each other want long operations
BLOCK_ON_DEVICE = 1 << 24
STRIPS = 16  # of a matrix; more threads than that find nothing to do
TERMS = 512  # most terms of one float32 sum in a projection
EPSILON = 2.0**-24  # unit roundoff of float32


def sum_error(terms: int) -> float:
    """Bound on the relative error of a float32 sum of so many terms of one sign."""
    return 1.01 * (terms + 8) * EPSILON


def in_strips(count: int, work: Callable[[slice], None], *, size: int, threads: bool = True) -> None:
    """Calls `work` on slices that together are slice(0, count); in threads, each of which computes alone.

    Args:
        size: elements that all of the work looks at; it decides about the number of slices, STRIPS at most.
    """
    parts = _parts(size)
    edges = [count * i // parts for i in range(parts + 1)]
    strips = [slice(first, last) for first, last in pairwise(edges) if first < last]
    if len(strips) <= 1 or not threads:
        for strip in strips:
            work(strip)
        return
    with _alone() as pool:
        for done in [pool.submit(work, strip) for strip in strips]:
            done.result()


def all_of(*jobs: Callable[[], Tensor]) -> list[Tensor]:
    """What some jobs return, in threads of their own."""
    with _alone() as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


@contextmanager
def _alone() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, while each operation of theirs uses one."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _pool(count)
    finally:
        torch.set_num_threads(count)


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def squares(x: Tensor) -> Tensor:
    """Squared norm of each row, float64 [unit], on the CPU."""
    return _sums(x, lambda place, block: block.square_())


def distances(x: Tensor, y: Tensor, permutation: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
    """||x_k - factor_k y_p(k)||^2 for each unit k, from differences; float64 [unit], on the CPU.

    Args:
        x, y: [unit, model].
        permutation: p, int64 [unit]; None: the identity.
        factor: [unit]; None: 1.
    """
    permutation = None if permutation is None or bool((permutation.diff() == 1).all()) else permutation.to(x.device)
    minus = None if factor is None or bool((factor == 1).all()) else -factor.to(x.device, torch.float32)

    def terms(place: _Place, block: Tensor) -> Tensor:
        partner = _partner(x, y, place, permutation)
        if minus is None:
            return block.sub_(partner).square_()
        return block.addcmul_(partner, minus[place.part, None] if place.by_unit else minus).square_()

    return _sums(x, terms)


def project(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """x times a matrix of entries +-1.

    Each entry is a sum of float32 sums of at most TERMS terms: its error is at most `projection_error` times the row's norm.

    Args:
        projection: float32 [model, columns].

    Returns:
        The product, float32 [unit, columns], and the squared norms of x's rows, float64 [unit], on the CPU.
    """
    columns = projection.shape[1]
    if _by_unit(x):
        result = projection.new_zeros(x.shape[0], columns)

        def of_units(place: _Place, block: Tensor) -> Tensor:
            rows = result[place.part]
            for first in range(0, x.shape[1], TERMS):
                rows.addmm_(block[:, first : first + TERMS], projection[first : first + TERMS])
            return block.square_()

        return result, _sums(x, of_units)
    parts: dict[int, Tensor] = {}

    def of_columns(place: _Place, block: Tensor) -> Tensor:
        for first in range(0, len(block), TERMS):
            some = block[first : first + TERMS]
            start = place.part.start + first
            product = some.T @ projection[start : start + len(some)]
            parts[place.strip] = parts[place.strip].add_(product) if place.strip in parts else product
        return block.square_()

    norms = _sums(x, of_columns)
    return sum((parts[strip] for strip in sorted(parts)), projection.new_zeros(x.shape[0], columns)), norms


def projection_error(x: Tensor) -> float:
    """Bound on the error of an entry of `project`, relative to the row's norm: that of its sums, times sqrt(width).

    The most additions that one term goes through count: those within a sum of TERMS and of such sums, or those within a strip
    of columns and of the strips.
    """
    width, parts = x.shape[1], _parts(x.numel())
    by_unit, by_columns = min(width, TERMS) + width // TERMS, -(-width // parts) + parts
    return 1.01 * (max(by_unit, by_columns) + 4) * EPSILON * width**0.5


def _parts(size: int) -> int:
    """Into how many strips work on so many elements is cut."""
    return min(STRIPS, 1 + size // BLOCK)


@dataclass(frozen=True)
class _Place:
    """Where a block lies: rows of some units, or (not `by_unit`) some columns of all units, those transposed."""

    by_unit: bool
    part: slice
    strip: int


def _sums(x: Tensor, terms: Callable[[_Place, Tensor], Tensor]) -> Tensor:
    """Sums over the rows of x of what `terms` makes of each of its blocks, float64 [unit].

    Args:
        terms: place and block (float32, a copy that it may change) -> a block of the same shape.
    """
    by_unit = _by_unit(x)
    whole = x if by_unit else x.T
    on_cpu = x.device.type == "cpu"
    step = max(1, (BLOCK if on_cpu else BLOCK_ON_DEVICE) // max(1, whole.shape[1]))
    ones = torch.ones(max(*x.shape, 1), device=x.device)
    result = torch.zeros(x.shape[0], dtype=torch.float64)
    sums: dict[int, Tensor] = {}  # by strip of columns

    def work(strip: slice) -> None:
        own = torch.zeros(x.shape[0], dtype=torch.float64)
        room = reused((min(step, strip.stop - strip.start), whole.shape[1]), torch.float32, x.device)  # of each block in turn
        for first in range(strip.start, strip.stop, step):
            part = slice(first, min(first + step, strip.stop))
            place = _Place(by_unit, part, strip.start)
            block = terms(place, room[: part.stop - part.start].copy_(whole[part]))
            if by_unit:
                result[part] = (block @ ones[: block.shape[1]]).cpu().double()
            else:
                own += (ones[: len(block)] @ block).cpu().double()
        if not by_unit:
            sums[strip.start] = own

    if x.numel():
        in_strips(len(whole), work, size=x.numel(), threads=on_cpu)
    for strip in sorted(sums):
        result += sums[strip]
    return result


def _partner(x: Tensor, y: Tensor, place: _Place, permutation: Tensor | None) -> Tensor:
    """The block of y, float32, that belongs to x's; its units permuted."""
    here = (y if place.by_unit else y.T)[place.part]
    block = reused(here.shape, torch.float32, here.device)
    if permutation is None:
        return block.copy_(here)
    if place.by_unit:
        chosen = permutation[place.part]
        return block.copy_(torch.index_select(y, 0, chosen, out=reused(here.shape, y.dtype, here.device)))
    block.copy_(here)
    ordered = reused(here.shape, torch.float32, here.device)
    if x.device.type != "cpu":
        return torch.index_select(block, 1, permutation, out=ordered)
    np.take(block.numpy(), permutation.numpy(), axis=1, out=ordered.numpy(), mode="clip")  # within rows, much faster than torch
    return ordered


def _by_unit(x: Tensor) -> bool:
    return x.stride(1) <= x.stride(0)
