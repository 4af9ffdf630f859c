"""The command line: verbs over the API. Results go to stdout, progress and complaints to stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from hf_moe_lmc.cli.commands import COMMANDS, SHARED
from hf_moe_lmc.cli.parser import parser
from hf_moe_lmc.errors import InputError, MoELMCError, escaped
from hf_moe_lmc.runtime import processes
from hf_moe_lmc.runtime.notices import NOTES

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0, 1 (failure, or a self-test that did not pass), 2 (bad input or usage) or 130 (interrupted)."""
    given = vars(parser().parse_args(arguments))
    verb = given.pop("verb")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large tensors in huge pages: far fewer page faults
    group = processes.process_group()

    def complain(line: str) -> None:
        if group.is_main:
            print(escaped(line), file=sys.stderr)

    warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
    NOTES.addHandler(_Notes(complain))
    try:
        processes.check_launch(["-m", "hf_moe_lmc", *(sys.argv[1:] if arguments is None else arguments)])
        if group.count > 1 and verb not in SHARED:
            raise InputError("this verb works in one process; start it without torchrun")
        with _one_speaker(group.is_main):
            code = COMMANDS[verb](given) or 0
        sys.stdout.flush()
        return code
    except MoELMCError as error:
        complain(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        # whoever reads has seen enough; what is left in the buffer must not fail once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        kept = ", what is done is kept: the same call continues" if verb in SHARED else ""
        complain(f"interrupted; nothing unfinished was left behind{kept}")
        return INTERRUPTED
    finally:
        processes.close()


@contextmanager
def _one_speaker(is_main: bool) -> Iterator[None]:
    """Of several processes only the first prints results."""
    if is_main:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        yield


class _Notes(logging.Handler):
    """Prints notes."""

    def __init__(self, complain: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._complain = complain

    def emit(self, record: logging.LogRecord) -> None:
        self._complain(f"note: {record.getMessage()}")
