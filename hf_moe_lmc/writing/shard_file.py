"""Shards that threads write to disk."""

from __future__ import annotations

import os
import posixpath
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import Shard, TensorInfo
from hf_moe_lmc.writing.results import UNFINISHED, ResultFolder
from hf_moe_lmc.writing.spans import Span

WORKERS = 4  # at most; each holds two ranges of spans.SPAN bytes, or a few copies of one expert's matrices
FLUSH_SECONDS = 0.25  # between two flushes to the disk, so that the end need not wait for it


class ShardFile:
    """One shard that is being written. It is finished when all its holders have released it.

    Args:
        folder: of the output, relative to the results, in which it stands.
        finish: is called when all of it is written, before it gets its name.
    """

    def __init__(
        self,
        results: ResultFolder,
        shard: Shard,
        template: Checkpoint,
        folder: str = "",
        *,
        durable: bool,
        finish: Callable[[], None],
    ) -> None:
        self.shard = shard
        self.name = posixpath.join(folder, shard.name)
        self._infos = [template.tensors[name] for name in shard.tensors]
        self._path = results.path(self.name)
        self._unfinished = self._path.with_name(self._path.name + UNFINISHED)
        self._durable = durable
        self._finish = finish
        self._descriptor = -1
        self._holders = 1  # the generator of its ranges
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Makes the file at its full size, so that a full disk shows before anything is computed; writes the header."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        _allocate(self._descriptor, self.shard.size)
        _write_all(self._descriptor, memoryview(self.shard.header), 0)

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def write(self, span: Span, values: Tensor) -> None:
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        _write_all(self._descriptor, data, span.start)

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                if self._durable:
                    os.fsync(self._descriptor)
                self._close()
                self._finish()
                self._unfinished.replace(self._path)

    def flush(self) -> None:
        """Sends what has been written to the disk."""
        with self._lock:
            if self._descriptor >= 0:
                os.fdatasync(self._descriptor)

    def abandon(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def tensor_at(self, position: int) -> TensorInfo:
        return next(info for info in self._infos if info.start <= position < info.start + info.nbytes)


def run_in_parallel(jobs: Iterator[Callable[[], None]], files: list[ShardFile], stop: threading.Event, *, threads: int) -> None:
    """Runs all jobs in a few threads; the first failure, an interrupt or `stop` ends them all. `files` are flushed meanwhile.

    Args:
        threads: of torch, restored at the end.
    """
    workers = worker_count()
    taking = threading.Lock()

    def work() -> None:
        torch.set_num_threads(1)  # of this thread: the jobs themselves are what runs in parallel
        while not stop.is_set():
            with taking:
                job = next(jobs, None)
            if job is None:
                return
            job()

    def guarded() -> None:
        try:
            work()
        except BaseException:
            stop.set()
            raise

    def flush() -> None:
        while not stop.wait(FLUSH_SECONDS):
            for file in files:
                file.flush()

    try:
        with ThreadPoolExecutor(workers + 1) as pool:
            flushing = pool.submit(flush)
            working = [pool.submit(guarded) for _ in range(workers)]
            try:
                for future in working:
                    future.result()
            finally:
                stop.set()
            flushing.result()
    finally:
        torch.set_num_threads(threads)
        for file in files:
            file.abandon()


def worker_count() -> int:
    """Threads that compute and write."""
    return max(2, min(WORKERS, os.cpu_count() or 1))


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, position)
        data = data[written:]
        position += written
