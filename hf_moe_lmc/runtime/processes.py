"""Several processes on one job: their ranks, their shares of the work, and the exchange of results and failures.

`torchrun`, or another program that sets RANK and WORLD_SIZE, starts the processes. Each of them calls the same function with
the same arguments. They communicate in rounds, and each `ProcessGroup.exchange` is one round. A process that fails takes part
in the next round of the others, with its error. So no process waits for one that is gone, and all end with one error.

Results are those of a single process, bit for bit, if each has as many threads (OMP_NUM_THREADS) as that would have. torchrun
sets OMP_NUM_THREADS to 1 unless it is set.

A single process starts nothing, and torch is not imported for it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from traceback import format_exception
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from hf_moe_lmc import errors
from hf_moe_lmc.errors import InputError, MismatchError, MoELMCError, ProcessError

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT = timedelta(days=30)  # one process may write for hours while the others wait
PORT = 29500  # the usual port of torchrun's rendezvous


@dataclass(frozen=True)
class _Failure:
    """An exception as text, for another process."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> _Failure:
        if isinstance(error, MoELMCError | OSError | KeyboardInterrupt):
            return cls(type(error).__name__, str(error))
        return cls("", f"process {rank} failed:\n{''.join(format_exception(error))}")

    def exception(self) -> BaseException:
        """An exception of the same class with the same text. So message and exit code are those of the failed process."""
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, MoELMCError):
            return known(self.text)
        if self.kind == "KeyboardInterrupt":
            return KeyboardInterrupt()
        return OSError(self.text) if self.kind else ProcessError(self.text)


@dataclass
class ProcessGroup:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: number of this process, from 0; 0 alone writes, prints and publishes.
        count: of all processes.
        local_count: of those on this machine.
    """

    rank: int = 0
    count: int = 1
    local_count: int = 1
    _group: Any = field(default=None, repr=False)
    _working: bool = field(default=False, repr=False)
    _informed: bool = field(default=False, repr=False)  # the others know of a failure

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items of this process; they are dealt out in turn."""
        return list(items[self.rank :: self.count])

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, by rank. This is one round: every process has to call it.

        Raises:
            ProcessError: a process has ended without an error.
            Exception: the error of another process that failed before this round.
        """
        if self.count == 1:
            return [value]
        outcomes = self._round(value)
        for outcome in outcomes:
            if isinstance(outcome, _Failure):
                self._informed = True
                raise outcome.exception()
        return outcomes

    def from_main(self, value: T) -> T:
        """The value of process 0; those of the others do not count."""
        values: list[Any] = self.exchange(value if self.is_main else None)
        return cast("T", values[0])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 runs the block before the others do, and fills caches for them."""
        if not self.is_main:
            self.exchange(None)
        yield
        if self.is_main:
            self.exchange(None)

    def check_equal(self, facts: Mapping[str, Any]) -> None:
        """Raises MismatchError where the processes do not see the same inputs."""
        for rank, other in enumerate(self.exchange(dict(facts))):
            for what, value in facts.items():
                if other[what] != value:
                    raise MismatchError(
                        f"{what}: process {rank} found {other[what]}, process {self.rank} found {value}; all have to see the "
                        "same files (on a shared disk, or one commit of a Hub repository)"
                    )

    def _round(self, value: Any) -> list[Any]:
        from torch import distributed

        outcomes: list[Any] = [None] * self.count
        try:
            distributed.all_gather_object(outcomes, value, group=self._group)
        except RuntimeError as error:
            self._informed = True  # no process is left that could be
            raise ProcessError(f"another process of this run has ended; see what it said ({error})") from error
        return outcomes

    def _start(self) -> None:
        """Connects the processes. The backend is gloo: values are in main memory on every kind of machine."""
        if self._group is None:
            from accelerate import PartialState
            from huggingface_hub.utils import disable_progress_bars
            from torch import distributed

            PartialState()
            self._group = distributed.new_group(backend="gloo", timeout=TIMEOUT)
            if not self.is_main:
                disable_progress_bars()

    def _end(self, error: BaseException | None) -> None:
        """Sends a failure to the others, then waits until all have cleaned up: torchrun ends the rest when one exits."""
        with suppress(ProcessError):
            if error is not None and not self._informed:
                self._round(_Failure.of(error, self.rank))
            self._round(None)


_process_group: ProcessGroup | None = None


def process_group() -> ProcessGroup:
    """The processes of this run, from the environment (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE)."""
    global _process_group
    if _process_group is None:
        number = {name: int(os.environ.get(name) or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        if "RANK" not in os.environ or number["WORLD_SIZE"] < 2:
            return ProcessGroup()
        _process_group = ProcessGroup(number["RANK"], number["WORLD_SIZE"], number["LOCAL_WORLD_SIZE"] or 1)
    return _process_group


def close() -> None:
    """Disconnects the processes, if they are connected: together, as torchrun ends the rest when one has exited."""
    global _process_group
    if _process_group is not None and _process_group._group is not None:
        from torch import distributed

        with suppress(ProcessError):  # whoever has ended has nothing more to say
            _process_group._round(None)
        distributed.destroy_process_group()
        _process_group = None


def leave(code: int) -> NoReturn:
    """Ends this process. One of several skips the interpreter's teardown, where torch's threads may abort it instead."""
    if process_group().count == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def collective(job: Callable[P, T]) -> Callable[P, T]:
    """A function that all processes of a run call, with equal arguments.

    A failure in one process ends all of them with the same error. Before that, process 0 removes unfinished files.
    torchrun ends processes with SIGTERM. While the function runs, that is an interrupt, so that process 0 cleans up then, too.

    Raises:
        InputError: several Slurm tasks that torchrun did not start, before anything is done.
    """

    @wraps(job)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        check_launch()
        processes = process_group()
        if processes.count == 1 or processes._working:
            return job(*args, **kwargs)
        processes._working, processes._informed = True, False
        failure: BaseException | None = None
        with _interrupt_on_termination():
            processes._start()
            try:
                result = job(*args, **kwargs)
                processes.exchange(None)
                return result
            except BaseException as error:
                failure = error
                raise
            finally:
                processes._end(failure)
                processes._working = False

    return run


@contextmanager
def _interrupt_on_termination() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_launch(command: Sequence[str] | None = None) -> None:
    """Refuses several Slurm tasks without torchrun: each would do all the work and write the same output.

    Args:
        command: the program that torchrun shall run; by default the running script with its arguments.

    Raises:
        InputError: with the command line to use instead.
    """
    environment = os.environ
    tasks = _first_number(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS"), 1)
    if "RANK" in environment or (tasks < 2 and _first_number(environment.get("SLURM_PROCID"), 0) == 0):
        return
    gpus = _first_number(environment.get("SLURM_GPUS_ON_NODE"), 0)
    per_node = gpus or _first_number(environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE"), 0)
    host = _first_host(environment.get("SLURM_JOB_NODELIST", ""))
    shown = shlex.join(command if command is not None else sys.argv)
    raise InputError(
        f"this is one of {tasks} Slurm tasks, and torchrun did not start it: each task would do all the work and write the "
        "same output. Start one torchrun on each node:\n"
        f"  srun --ntasks-per-node=1 torchrun --nnodes {environment.get('SLURM_NNODES', '$SLURM_NNODES')} "
        f"--nproc-per-node {per_node or 'N'} --rdzv-backend c10d --rdzv-endpoint {host or 'HOST'}:{PORT} {shown}\n"
        "or ask for a single task (--ntasks=1)"
    )


def _first_number(value: str | None, default: int) -> int:
    """Slurm writes `4` and `4(x2)`."""
    match = re.match(r"\d+", value or "")
    return int(match[0]) if match else default


def _first_host(nodes: str) -> str:
    """`node[07-09,12],other` -> `node07`."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""
