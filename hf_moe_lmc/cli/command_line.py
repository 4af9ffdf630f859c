"""The command line: verbs over the API. Results go to stdout; progress, notes and complaints to stderr."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

from hf_moe_lmc.cli.commands import ASKING, COMMANDS, RESUMING, SHARED
from hf_moe_lmc.cli.parser import parser
from hf_moe_lmc.errors import InputError, MoELMCError, OutputError, escaped
from hf_moe_lmc.runtime import processes
from hf_moe_lmc.runtime.documents import as_json
from hf_moe_lmc.runtime.notices import NOTES
from hf_moe_lmc.runtime.progress import silenced

INTERRUPTED = 130
Complain = Callable[[str], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; without arguments it prints the help.

    Returns:
        0, 1 (failure, or a check that did not pass), 2 (bad input or usage) or 130 (interrupted).

    Raises:
        SystemExit: after --help and --version (0), and for wrong usage (2).
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        given = _parsed(words)
        return _run(given.pop("verb"), given, words) if given else 0
    except BrokenPipeError:
        # whoever reads has seen enough; what is left in the buffers must not fail once more at exit
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(nowhere, stream.fileno())
        return 1
    finally:
        processes.close()


def _parsed(words: Sequence[str]) -> dict[str, Any]:
    """The given options, nothing where there are none: then the help has been printed."""
    try:
        if not words:
            parser().print_help()
            return {}
        return vars(parser().parse_args(words))
    finally:
        print(end="", flush=True)  # there may be no stdout at all


def _run(verb: str, given: dict[str, Any], words: Sequence[str]) -> int:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large tensors in huge pages: far fewer page faults
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads sleep, not spin, until others are ready; read with torch
    group = processes.process_group()

    def complain(line: str) -> None:
        if group.is_main:
            print(escaped(line), file=sys.stderr)

    json, quiet = given.pop("json", False), given.pop("quiet", False)
    try:
        processes.check_launch(["-m", "hf_moe_lmc", *words])
        if group.count > 1 and verb not in SHARED:
            raise InputError("this verb works in one process; start it without torchrun")
        with _speaking(complain, quiet=quiet, is_main=group.is_main) as stdout:

            def tell(line: str) -> None:
                if not quiet:
                    print(line, file=sys.stderr if json else stdout, flush=True)

            outcome = COMMANDS[verb](given, tell)
            print(as_json(outcome.document) if json else f"{outcome.text}\n", file=stdout, end="", flush=True)
        if outcome.problem:
            raise OutputError(outcome.problem)
        return outcome.code
    except MoELMCError as error:
        complain(f"error: {error}")
        return 2 if verb in ASKING else error.exit_code
    except BrokenPipeError:
        raise
    except OSError as error:
        complain(f"error: {error}")
        return 2 if verb in ASKING else 1
    except KeyboardInterrupt:
        kept = ", what is done is kept: the same call continues" if verb in RESUMING else ""
        complain(f"interrupted; nothing unfinished was left behind{kept}")
        return INTERRUPTED


@contextmanager
def _speaking(complain: Complain, *, quiet: bool, is_main: bool) -> Iterator[TextIO]:
    """The stream for the result, while everything else that is printed goes to stderr; only the first process has one."""
    notes = _Notes(complain)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda message, *_, **__: complain(f"warning: {message}")
        if quiet:
            stack.enter_context(silenced())
        else:
            NOTES.addHandler(notes)
            stack.callback(NOTES.removeHandler, notes)
        stdout = sys.stdout if is_main else stack.enter_context(Path(os.devnull).open("w"))
        with redirect_stdout(sys.stderr):
            yield stdout


class _Notes(logging.Handler):
    """Prints notes."""

    def __init__(self, complain: Complain) -> None:
        super().__init__(logging.INFO)
        self._complain = complain

    def emit(self, record: logging.LogRecord) -> None:
        self._complain(f"note: {record.getMessage()}")
