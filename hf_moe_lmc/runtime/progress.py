"""Progress on stderr: a bar on a terminal, a line every half minute in a log file. Bars of other libraries are silenced."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self, TypeVar

from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm

T = TypeVar("T")

HALF_MINUTE = 30.0  # seconds between the lines in a log file
_silent = False


class Progress(Protocol):
    """What shows how far some work is; a context."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None: ...

    def update(self, n: float = 1) -> object:
        """So many more units are done."""


def bar(*, total: int, desc: str, unit: str, initial: int = 0, quiet: bool = False) -> Progress:
    """Progress of some work, with its remaining time.

    Args:
        total, initial: units of the whole work, and those that were done before.
        desc: what is done, such as "matching layers".
        unit: of `total`; "B" stands for bytes.
        quiet: show nothing.
    """
    quiet = quiet or _silent or are_progress_bars_disabled()
    if quiet or sys.stderr.isatty():
        return tqdm(total=total, initial=initial, desc=desc, unit=unit, unit_scale=unit == "B", disable=quiet, smoothing=0.1)
    return _Lines(total=total, initial=initial, desc=desc, unit=unit)


def tracked(items: Sequence[T], *, desc: str, unit: str) -> Iterator[T]:
    """The items, with progress shown while they are worked through."""
    with bar(total=len(items), desc=desc, unit=unit) as shown:
        for item in items:
            yield item
            shown.update()


class _Lines:
    """Progress in a log file: a line every half minute, and one at the end."""

    def __init__(self, *, total: int, initial: int, desc: str, unit: str) -> None:
        self._total, self._initial, self._done = total, initial, float(initial)
        self._desc, self._unit = desc, unit
        self._started = self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._write(", stopped" if kind else "")

    def update(self, n: float = 1) -> None:
        self._done += n
        if time.monotonic() - self._written >= HALF_MINUTE:
            new, left = self._done - self._initial, self._total - self._done
            elapsed = time.monotonic() - self._started
            self._write(f", about {duration(elapsed / new * left)} left" if new > 0 and left > 0 else "")

    def _write(self, more: str) -> None:
        self._written = time.monotonic()
        if self._unit == "B":
            count = f"{size_of(self._done)} of {size_of(self._total)}"
        else:
            count = f"{self._done:.0f} of {self._total} {self._unit}s"
        sys.stderr.write(f"{self._desc}: {count} after {duration(self._written - self._started)}{more}\n")
        sys.stderr.flush()


@contextmanager
def silenced() -> Iterator[None]:
    """Shows no progress of this package, and none of the Hub's client unless the environment asks for it."""
    global _silent
    before, _silent = _silent, True
    of_hub = HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if of_hub:
        disable_progress_bars()
    try:
        yield
    finally:
        _silent = before
        if of_hub:
            enable_progress_bars()


def duration(seconds: float) -> str:
    """A time as text.

    Example:
        >>> [duration(seconds) for seconds in (0.2, 12, 200, 9000)]
        ['0 s', '12 s', '3 min', '2.5 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size_of(count: float) -> str:
    """A number of bytes as text: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences the progress bars of datasets."""
    from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

    enabled = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bars()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and load reports of transformers. The caller checks what was loaded.

    Afterwards all is as it was, also the bars of the Hub's client, which transformers switches with its own.
    """
    import transformers  # takes seconds, which a mere bar need not wait for

    logging = transformers.utils.logging
    bars, verbosity, of_hub = logging.is_progress_bar_enabled(), logging.get_verbosity(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if bars and not of_hub:
            disable_progress_bars()
        elif of_hub and not bars:
            enable_progress_bars()
