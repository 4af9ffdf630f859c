"""A checkpoint on the Hub whose tensors are read where they are: by HTTP ranges, nothing else of a file is fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.source import Repository

AT_ONCE = 16  # ranges that are asked for at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass
class RangedCheckpoint(Checkpoint):
    """A checkpoint on the Hub, each read of which is a request for a range."""

    def fill(self, values: Tensor, shard: str, position: int) -> None:
        if not values.numel():
            return
        assert isinstance(self.source, Repository)
        view = values.view(-1).view(dtype=torch.uint8).numpy()
        data, _ = self.source.fetch(shard, position, len(view))
        view[:] = np.frombuffer(data, dtype=np.uint8)


def opened_by_ranges(checkpoint: Checkpoint) -> Checkpoint:
    """An opened checkpoint, of which tensors can be read without a download.

    A folder, and a repository whose files are all in the cache, are read from disk.
    """
    if checkpoint.is_downloaded:
        return checkpoint
    assert isinstance(checkpoint.source, Repository)
    if not checkpoint.absent():
        return Checkpoint.of(replace(checkpoint.source, cached=True))
    shown = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint) if not field.name.startswith("_")}
    return RangedCheckpoint(**shown)


def fetched_from(checkpoint: Checkpoint) -> int:
    """Bytes that were fetched from the Hub for a checkpoint, small files and headers included."""
    return checkpoint.source.traffic.nbytes if isinstance(checkpoint.source, Repository) else 0


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item], at_once: int = AT_ONCE) -> Iterator[Result]:
    """What `read` gives for each item, in their order, while the next ones are being read; never more than `at_once` wait."""
    with ThreadPoolExecutor(at_once) as pool:
        rest = iter(items)
        waiting: list[Future[Result]] = [pool.submit(read, item) for item in islice(rest, at_once)]
        while waiting:
            result = waiting.pop(0).result()
            waiting += [pool.submit(read, item) for item in islice(rest, 1)]
            yield result
