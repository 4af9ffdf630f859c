"""An interpreter that has imported everything, and forks a child for each program that a test runs.

A fresh interpreter imports torch and transformers for seconds before it does anything. A fork has them at once.
It is a process of its own nevertheless: with its environment, its arguments, its output, and its end.

    with Interpreter(environment) as interpreter:
        ran = interpreter.run(COMMAND_LINE, "inspect", "owner/name")
        assert (ran.code, ran.errors) == (0, "")

Libraries read some of the environment when they are imported (of the Hub: its address, its cache, whether it may be asked).
All children have that of the interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
COMMAND_LINE = "import sys; from hf_moe_lmc.cli import main; sys.exit(main())"
# A child that hangs is ended: so late that no load of the machine can make it happen.
LIMIT = 1800


@dataclass(frozen=True)
class Ran:
    """What the processes of a program left: their exit codes by rank (-9: killed), and what they wrote, all together."""

    codes: tuple[int, ...]
    output: str
    errors: str

    @property
    def code(self) -> int:
        (code,) = self.codes
        return code

    def expect(self, code: int, *words: str) -> None:
        """The exit code, and one line of complaint that has all `words` and nothing of Python's."""
        assert self.code == code, self
        assert "Traceback" not in self.errors
        [complaint] = [line for line in self.errors.splitlines() if line and not line.startswith(("warning: ", "note: "))]
        assert complaint.startswith("error: ")
        for word in words:
            assert word in complaint


class Interpreter:
    """The interpreter, seen from the tests.

    Args:
        environment: of it and of its children.
        folder: the working folder of the children.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.interpreter"],
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},  # no threads, which a fork would not have
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, source: str, *arguments: object, **environment: str) -> Ran:
        """Runs a program in one process; `environment` is changed for it alone."""
        return self._run(source, arguments, [environment])

    def together(self, count: int, source: str, *arguments: object) -> Ran:
        """Runs a program in several processes that can meet, as torchrun starts them."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # any free port, from now on taken
        meeting = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # it is there already
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        return self._run(source, arguments, [{**meeting, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)])

    def _run(self, source: str, arguments: tuple[object, ...], environments: list[dict[str, str]]) -> Ran:
        with tempfile.TemporaryDirectory() as folder:
            output, errors = Path(folder, "output"), Path(folder, "errors")
            job = {
                "source": source,
                "arguments": [str(argument) for argument in arguments],
                "environments": environments,
                "folder": str(self._folder),
                "output": str(output),
                "errors": str(errors),
            }
            assert self._process.stdin and self._process.stdout
            print(json.dumps(job), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
            assert answer, f"the interpreter has ended with exit code {self._process.wait()}"
            return Ran(tuple(json.loads(answer)), output.read_text(), errors.read_text())


# --- inside the interpreter -------------------------------------------------------------------------------------------


def import_everything() -> None:
    import hf_moe_lmc

    for module in pkgutil.walk_packages(hf_moe_lmc.__path__, "hf_moe_lmc."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    importlib.import_module("accelerate")
    importlib.import_module("matplotlib.figure")


def serve() -> None:
    """Answers each job, a line of JSON, with the exit codes of its processes."""
    import_everything()
    answers = os.fdopen(os.dup(1), "w")  # a child has another standard output
    for line in sys.stdin:
        job = json.loads(line)
        children = [_forked(job, environment) for environment in job["environments"]]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)
    os._exit(0)  # nothing is left to be done, and taking all modules apart takes seconds


def _forked(job: dict[str, Any], environment: Mapping[str, str]) -> int:
    """The id of a child that runs a job."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(LIMIT)
        for number, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        os.chdir(job["folder"])
        sys.argv = ["hf_moe_lmc", *job["arguments"]]
        exec(compile(job["source"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:  # noqa: BLE001 (a forked child must not go on as its parent)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
