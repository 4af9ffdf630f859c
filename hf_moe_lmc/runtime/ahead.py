"""Reading ahead: what comes next is read while the last is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item], at_once: int) -> Iterator[Result]:
    """What `read` gives for each item, in their order; never more than `at_once` are read, or wait to be taken.

    Example:
        >>> list(read_ahead(str, [1, 2, 3], at_once=2))
        ['1', '2', '3']
    """
    with ThreadPoolExecutor(at_once) as pool:
        rest = iter(items)
        waiting: list[Future[Result]] = [pool.submit(read, item) for item in islice(rest, at_once)]
        try:
            while waiting:
                result = waiting.pop(0).result()
                waiting += [pool.submit(read, item) for item in islice(rest, 1)]
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
