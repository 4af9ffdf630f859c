"""A Hub on the loopback interface, the command line as its user calls it, and folders to publish."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import TOKEN
from tests.hub_server import ATTRIBUTES, HubServer
from tests.interpreter import COMMAND_LINE, Interpreter, Ran

IMPATIENT = "import time; time.sleep = lambda seconds: None; " + COMMAND_LINE  # the client and we wait before trying again
PROBE = 100_001  # bytes of a shard that the client asks for to read its header


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    """Empty, and open to those who have the token."""
    server.forget()
    server.token = TOKEN
    return server


@pytest.fixture
def run(interpreter: Interpreter) -> Callable[..., Ran]:
    """(arguments, more environment) -> what the command line did."""
    return partial(interpreter.run, IMPATIENT)


@pytest.fixture
def program(environment: dict[str, str], tmp_path: Path) -> Callable[..., Ran]:
    """(arguments, more environment) -> what `python -m hf_moe_lmc` did in an interpreter of its own."""

    def call(*arguments: object, **more: str) -> Ran:
        command = [sys.executable, "-m", "hf_moe_lmc", *map(str, arguments)]
        ran = subprocess.run(command, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True, check=False)
        return Ran((ran.returncode,), ran.stdout, ran.stderr)

    return call


@pytest.fixture(scope="module")
def model(saved: Callable[..., Path]) -> Path:
    """A checkpoint whose only shard is longer than what the client reads to find its header."""
    folder = saved("mixtral")
    assert (folder / "model.safetensors").stat().st_size > PROBE
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that could be published. Read only: copy before changing it."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("finished") / "folder"))
    (folder / "README.md").write_text("---\ntags:\n- moe\n---\n# A model\n")
    (folder / "alignment").mkdir()
    shutil.copyfile(folder / "config.json", folder / "alignment" / "notes.json")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def history(hub: HubServer, repo_id: str, ref: str = "main") -> list[dict[str, bytes]]:
    """What each commit after the first, which the Hub makes itself, shows to readers."""
    _, *commits = hub.repositories[repo_id].refs[ref]
    return [{path: content for path, content in commit.files.items() if path not in ATTRIBUTES} for commit in commits]
