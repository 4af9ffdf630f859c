"""Memory that is used again, and how much of it is free.

Fresh memory is expensive: the kernel zeroes it page by page at first touch, and takes it back as soon as a large tensor is
gone. For the tensors of one expert that can cost more than reading a file into them, or than the sums over them. So large
tensors that live for a moment come from `reused`, and from nowhere else. Accelerators have allocators that do the same.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from hf_moe_lmc.runtime.cgroups import memory_left

CPU = torch.device("cpu")
LEAST = 1 << 20  # bytes; below, the system's own allocator does as well
WAITING = 6  # buffers that may wait for use, however large: the matrices of two experts
WAITING_BYTES = 256 << 20  # of more buffers than that: the blocks that up to 16 threads compute with

_waiting: deque[np.ndarray] = deque()  # the longest unused first
_lock = threading.RLock()  # a collection of garbage may end a tensor in the midst of `reused`


def reused(shape: int | Sequence[int], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """An uninitialised tensor, on the CPU in memory that an earlier one of nearly its size has let go of.

    When nothing refers to it or a view of it any more, its memory waits for the next one, in whatever thread.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes < LEAST:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _take(nbytes)
    if buffer is None:
        buffer = torch.empty(nbytes, dtype=torch.uint8).numpy()
    view = buffer[:nbytes]
    weakref.finalize(view, _take_back, buffer).atexit = False
    return torch.from_numpy(view).view(dtype).view(shape)


def like(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory from `reused` for values of this shape, laid out as they are, on their device.

    Args:
        dtype: None: theirs.
    """
    dtype = dtype or values.dtype
    if values.ndim == 2 and values.stride(0) < values.stride(1):
        return reused((values.shape[1], values.shape[0]), dtype, values.device).t()
    return reused(values.shape, dtype, values.device)


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, rounded once, in memory from `reused`; themselves where they have it already."""
    return values if values.dtype == dtype else like(values, dtype).copy_(values)


def _take(nbytes: int) -> np.ndarray | None:
    """The buffer of a fitting size that was used last; None if there is none."""
    with _lock:
        for i in reversed(range(len(_waiting))):
            if nbytes <= _waiting[i].nbytes <= nbytes + nbytes // 4:
                buffer = _waiting[i]
                del _waiting[i]
                return buffer
    return None


def _take_back(buffer: np.ndarray) -> None:
    with _lock:
        _waiting.append(buffer)
        while len(_waiting) > WAITING and sum(one.nbytes for one in _waiting) > WAITING_BYTES:
            _waiting.popleft()


def available_memory() -> int:
    """Bytes that this process may still take: of what the machine has free, or can free, as much as its cgroups allow."""
    free, left = psutil.virtual_memory().available, memory_left()
    return free if left is None else min(free, left)


def memory_on(device: torch.device) -> int | None:
    """Bytes that this process may still take on an accelerator with memory of its own; None where there is only the CPU's."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch keeps for itself counts
