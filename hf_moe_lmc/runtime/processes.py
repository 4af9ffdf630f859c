"""Several processes on one job: who this one is, what falls to it, and how results and failures reach the others.

`torchrun` (or whatever sets RANK and WORLD_SIZE) starts the processes; every one of them calls the same function with the
same arguments. They speak in rounds: each `Team.exchange` is one round, and a process that fails anywhere takes part in the
round that the others come to next, with its error. So nobody waits for somebody who is gone, and all end with one error.

Results are those of one process, bit for bit, where each has as many threads as the one would have (OMP_NUM_THREADS, which
torchrun sets to 1 unless it is set).

A single process starts nothing, and torch is not even imported here for it.
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
from typing import Any, ParamSpec, TypeVar, cast

from hf_moe_lmc import errors
from hf_moe_lmc.errors import InputError, MismatchError, MoELMCError, ProcessError

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = timedelta(days=30)  # one process may write for hours while the others wait
PORT = 29500  # of torchrun's meeting point, where nobody named another


@dataclass(frozen=True)
class _Failure:
    """An exception on its way to another process, in words."""

    kind: str
    text: str

    @classmethod
    def of(cls, error: BaseException, rank: int) -> _Failure:
        if isinstance(error, MoELMCError | OSError | KeyboardInterrupt):
            return cls(type(error).__name__, str(error))
        return cls("", f"process {rank} failed:\n{''.join(format_exception(error))}")

    def exception(self) -> BaseException:
        """The same kind with the same text, so that message and exit code are those of the process that failed."""
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, MoELMCError):
            return known(self.text)
        if self.kind == "KeyboardInterrupt":
            return KeyboardInterrupt()
        return OSError(self.text) if self.kind else ProcessError(self.text)


@dataclass
class Team:
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
    _told: bool = field(default=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """What falls to this process, dealt out in turn."""
        return list(items[self.rank :: self.count])

    def exchange(self, value: T) -> list[T]:
        """The values of all processes, in their order. One round: every process has to come to it.

        Raises:
            the error of another process that failed on the way here.
            ProcessError: a process has ended without a word.
        """
        if self.count == 1:
            return [value]
        outcomes = self._round(value)
        for outcome in outcomes:
            if isinstance(outcome, _Failure):
                self._told = True
                raise outcome.exception()
        return outcomes

    def from_main(self, value: T) -> T:
        """The value of process 0, which the others need not have."""
        values: list[Any] = self.exchange(value if self.is_main else None)
        return cast("T", values[0])

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 goes through the block before the others do: it fills caches that they then find."""
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
            self._told = True  # there is nobody left to tell
            raise ProcessError(f"another process of this run has ended; see what it said ({error})") from error
        return outcomes

    def _start(self) -> None:
        """Meets the other processes. Values travel through memory (gloo) on every kind of machine."""
        if self._group is None:
            from accelerate import PartialState
            from huggingface_hub.utils import disable_progress_bars
            from torch import distributed

            PartialState()
            self._group = distributed.new_group(backend="gloo", timeout=PATIENCE)
            if not self.is_main:
                disable_progress_bars()

    def _end(self, error: BaseException | None) -> None:
        """Tells the others of a failure, then waits until all have cleaned up: torchrun ends the rest when one exits."""
        with suppress(ProcessError):
            if error is not None and not self._told:
                self._round(_Failure.of(error, self.rank))
            self._round(None)


_team: Team | None = None


def team() -> Team:
    """The processes of this run, from the environment (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE)."""
    global _team
    if _team is None:
        number = {name: int(os.environ.get(name) or 0) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        if "RANK" not in os.environ or number["WORLD_SIZE"] < 2:
            return Team()
        _team = Team(number["RANK"], number["WORLD_SIZE"], number["LOCAL_WORLD_SIZE"] or 1)
    return _team


def close() -> None:
    """Leaves the other processes, if they have met; together, as torchrun ends the rest when one has exited."""
    global _team
    if _team is not None and _team._group is not None:
        from torch import distributed

        with suppress(ProcessError):  # whoever has ended has nothing more to say
            _team._round(None)
        distributed.destroy_process_group()
        _team = None


def together(job: Callable[P, T]) -> Callable[P, T]:
    """A function that all processes of a run call, with equal arguments.

    A failure in one ends it in all, with the error of the one that failed, after process 0 has removed what it had begun.
    SIGTERM, with which torchrun ends processes, is taken as an interrupt meanwhile, so that there too nothing is left.

    Raises:
        InputError: several tasks of Slurm that torchrun did not start, before anything is done.
    """

    @wraps(job)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        check_launch()
        mates = team()
        if mates.count == 1 or mates._working:
            return job(*args, **kwargs)
        mates._working, mates._told = True, False
        failure: BaseException | None = None
        with _interrupt_on_termination():
            mates._start()
            try:
                result = job(*args, **kwargs)
                mates.exchange(None)
                return result
            except BaseException as error:
                failure = error
                raise
            finally:
                mates._end(failure)
                mates._working = False

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
        command: what torchrun shall run; by default the running script with its arguments.

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
    found = re.match(r"\d+", value or "")
    return int(found[0]) if found else default


def _first_host(nodes: str) -> str:
    """`node[07-09,12],other` -> `node07`."""
    found = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""
