"""What several outputs of one pass have in common: it is read once, and held while a range is computed for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any


class Held:
    """What the outputs of one pass share.

    Example:
        >>> held = Held()
        >>> with held.for_one_range():
        ...     held.of("a")["layer"] = 1
        ...     held.of("a")
        {'layer': 1}
        >>> held.of("a")
        {}
    """

    def __init__(self) -> None:
        self._range = threading.local()
        self._answers: dict[Hashable, bool] = {}

    @contextmanager
    def for_one_range(self) -> Iterator[None]:
        """What this thread puts into `of` in the block is held to its end."""
        self._range.found = {}
        try:
            yield
        finally:
            del self._range.found

    def of(self, source: Hashable) -> dict[Any, Any]:
        """What has been read from a source for the range that this thread computes; outside of such a block, a new one."""
        found: dict[Hashable, dict[Any, Any]] = vars(self._range).get("found", {})
        return found.setdefault(source, {})

    def answer(self, question: Hashable, find: Callable[[], bool]) -> bool:
        """The answer to a question that each output asks; it is found once."""
        if question not in self._answers:
            self._answers[question] = find()
        return self._answers[question]
