"""Tensors in memory that has been used before: touching fresh memory can cost more than reading a file into it."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEAST = 1 << 20  # bytes; below, the system's own allocator does as well
HELD = 6  # most buffers that wait for use: the matrices of two experts

_waiting: deque[np.ndarray] = deque()
_lock = threading.RLock()  # a collection of garbage may end a tensor in the midst of `reused`


def reused(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor [count] on the CPU, in memory that an earlier one of nearly its size has let go of.

    When nothing refers to it or a view of it any more, its memory waits for the next one.
    """
    nbytes = count * dtype.itemsize
    if nbytes < LEAST:
        return torch.empty(count, dtype=dtype)
    with _lock:
        buffer = next((one for one in _waiting if nbytes <= one.nbytes <= nbytes + nbytes // 4), None)
        if buffer is not None:
            _drop(buffer)
    if buffer is None:
        buffer = torch.empty(nbytes, dtype=torch.uint8).numpy()
    view = buffer[:nbytes]
    weakref.finalize(view, _take_back, buffer).atexit = False
    return torch.from_numpy(view).view(dtype)


def _take_back(buffer: np.ndarray) -> None:
    with _lock:
        _waiting.append(buffer)
        while len(_waiting) > HELD:
            _waiting.popleft()


def _drop(buffer: np.ndarray) -> None:
    for i, one in enumerate(_waiting):
        if one is buffer:
            del _waiting[i]
            return


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this thread's that holds until it asks for the same name again: new memory costs more than the sums."""
    count = math.prod(shape)
    key = (name, dtype, device)
    if key not in _own.buffers or _own.buffers[key].numel() < count:
        _own.buffers[key] = torch.empty(count, dtype=dtype, device=device)
    return _own.buffers[key][:count].view(shape)


class _Own(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


_own = _Own()
