from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # only children talk to a server, our own
os.environ["HF_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "huggingface")  # the user's is left alone
os.environ.pop("HF_HUB_CACHE", None)
if sys.dont_write_bytecode:  # nothing is written beside the sources; without any bytecode each interpreter compiles for seconds
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # of the workers of xdist, and of what tests start
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import pytest
import torch
import transformers

from hf_moe_lmc.plots import style
from tests import tiny
from tests.hub_server import HubServer
from tests.interpreter import Interpreter
from tests.published import published

TOKEN = "hf_tester"

torch.set_num_threads(1)  # tiny tensors; more threads only wait for each other
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, int], Path]:
    """(family, layout, seed) -> folder of a tiny checkpoint, made once. Read only: copy before changing it."""
    made: dict[tuple[str, str, int], Path] = {}

    def get(family: str, layout: str = "per-expert", seed: int = 0) -> Path:
        key = (family, layout, seed)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{layout}-{seed}-")
            made[key] = tiny.save(tiny.make_model(family, seed), folder, layout)
        return made[key]

    return get


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """(configuration, seed) -> folder of a published model cut small, made once. Read only: copy before changing it."""
    made: dict[tuple[str, int], Path] = {}

    def get(name: str, seed: int) -> Path:
        if (name, seed) not in made:
            made[name, seed] = published(name, tmp_path_factory.mktemp("real") / f"{name}-{seed}", seed)
        return made[name, seed]

    return get


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(layout, seed) -> folder of a tiny quantized checkpoint, made once. Read only: copy before changing it."""
    from tests.formats.published import LAYOUTS, save

    made: dict[tuple[str, int], Path] = {}

    def get(name: str, seed: int = 0) -> Path:
        if (name, seed) not in made:
            made[name, seed] = save(LAYOUTS[name], tmp_path_factory.mktemp("quantized") / "model", seed)
        return made[name, seed]

    return get


@pytest.fixture
def copy(saved: Callable[[str, str, int], Path], tmp_path: Path) -> Callable[..., Path]:
    """(family, layout, seed) -> a copy that the test may change."""

    def get(family: str, layout: str = "per-expert", seed: int = 0, name: str = "copy") -> Path:
        return Path(shutil.copytree(saved(family, layout, seed), tmp_path / name))

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held_out.txt"
    path.write_text("The expert that answers is the one the router picked. " * 12, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of the interpreter, and the folder of its Hub cache."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def environment(server: HubServer, home: Path) -> dict[str, str]:
    """Of a user who is logged in to our own server; nothing of this machine's Hub settings or proxies."""
    kept = {name: value for name, value in os.environ.items() if not re.match("HF_|HUGGING|.*_proxy$", name, re.IGNORECASE)}
    return {
        **kept,
        "HF_ENDPOINT": server.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),  # freed tensors go back to the kernel: tests measure what is in use
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }


@pytest.fixture(scope="session")
def interpreter(environment: dict[str, str], home: Path) -> Iterator[Interpreter]:
    """Runs programs in processes of their own that have everything imported."""
    with Interpreter(environment, home) as interpreter:
        yield interpreter


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are left out: on small models, drawing takes longer than measuring."""
    monkeypatch.setattr(style, "save", lambda *_: None)
