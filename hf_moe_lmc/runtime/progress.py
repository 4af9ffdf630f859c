"""What is shown while long work runs: our progress bars on stderr; of other libraries, nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import tqdm


def bar(*, total: int, desc: str, unit: str, initial: int = 0, quiet: bool = False) -> Any:
    """A progress bar with rate and remaining time; in a log file, a line every few seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        unit_scale=unit == "B",
        disable=quiet,
        mininterval=0.1 if terminal else 5.0,
        smoothing=0.1,
    )


def size_of(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load reports of transformers; what it finds is checked by the caller."""
    import transformers  # seconds, which what only shows a bar need not wait for

    logging = transformers.utils.logging
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
