"""Progress bars on stderr. Bars and reports of other libraries are silenced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub.utils import tqdm


def bar(*, total: int, desc: str, unit: str, initial: int = 0, quiet: bool = False) -> Any:
    """A progress bar with rate and remaining time. In a log file it is a line every few seconds."""
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
    """A number of bytes as text: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the progress bars and load reports of transformers. The caller checks what was loaded."""
    import transformers  # takes seconds, which a mere bar need not wait for

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
