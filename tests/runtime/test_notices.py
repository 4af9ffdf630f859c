"""Warnings point at the line outside the package that called it, whatever lies between."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hf_moe_lmc
from hf_moe_lmc.errors import MoELMCWarning

CODE = """
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import collective

def plain():
    warn("news")

def deep(levels=5):
    deep(levels - 1) if levels else warn("news")

decorated = collective(plain)

@contextmanager
def on_entry():
    warn("news")
    yield

@contextmanager
def on_exit():
    yield
    warn("news")

def managed():
    with ExitStack() as stack:
        stack.enter_context(on_exit())

def lazily():
    return list(map(lambda _: warn("news"), [1]))

def calling_back(callback):
    callback()

class Value:
    def __init__(self):
        warn("news")
"""


def package(name: str = "hf_moe_lmc.verbs.news") -> dict[str, Any]:
    """A module of the package."""
    module: dict[str, Any] = {"__name__": name}
    exec(compile(CODE, f"<{name}>", "exec"), module)
    return module


def place_of(call: Callable[[], object]) -> tuple[str, int]:
    """File and line that the one warning of a call points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    [warning] = caught
    assert warning.category is MoELMCWarning and str(warning.message) == "news"
    return warning.filename, warning.lineno


def here() -> tuple[str, int]:
    """The place of the line that calls this."""
    frame = sys._getframe(1)
    return frame.f_code.co_filename, frame.f_lineno


@pytest.mark.parametrize("name", ["plain", "deep", "decorated", "managed", "lazily", "Value"])
def test_the_caller_of_the_package_is_named(name: str) -> None:
    function, expected = package()[name], []

    def call() -> None:
        expected.append((function(), here())[1])

    assert place_of(call) == expected[0]


@pytest.mark.parametrize("name", ["on_entry", "on_exit"])
def test_so_is_who_enters_a_context_of_it(name: str) -> None:
    manager, expected = package()[name], []

    def call() -> None:
        with manager():
            expected.append(here())

    file, line = place_of(call)
    assert (file, line) == (expected[0][0], expected[0][1] - 1)


def test_a_callback_of_the_caller_counts_as_part_of_the_call() -> None:
    module, expected = package(), []

    def call() -> None:
        expected.append((module["calling_back"](lambda: module["plain"]()), here())[1])

    assert place_of(call) == expected[0]


def test_threads_of_the_caller_are_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    function, expected = package()["decorated"], []

    def work() -> None:
        expected.append((function(), here())[1])

    def call() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()

    assert place_of(call) == expected[0]

    def directly() -> None:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    assert place_of(directly)[0] == threading.__file__


def test_other_packages_are_callers() -> None:
    """The control: a name that only begins like ours."""
    other = package("hf_moe_lmc_extra")
    with pytest.warns(MoELMCWarning) as caught:
        other["deep"]()
    assert caught[0].filename == "<hf_moe_lmc_extra>"


def test_this_is_the_only_way_to_warn() -> None:
    root = Path(hf_moe_lmc.__file__).parent
    found = [path.name for path in root.rglob("*.py") if re.search(r"warnings\.warn\(|stacklevel=", path.read_text())]
    assert found == ["notices.py"]


PLAIN = partial(hf_moe_lmc.merge, align=False)


@pytest.mark.parametrize(
    ("verb", "copied"),  # a plain merge compares nothing in full, and says nothing of copies
    [(hf_moe_lmc.align, False), (hf_moe_lmc.align, True), (hf_moe_lmc.merge, False), (hf_moe_lmc.merge, True), (PLAIN, False)],
)
def test_that_two_models_are_the_same_is_said_once(
    saved: Callable[..., Path], copy: Callable[..., Path], tmp_path: Path, verb: Callable[..., Any], copied: bool
) -> None:
    """By headers where they lie in one place, else by the weights; a file of the output records it in both cases."""
    a = saved("mixtral")
    with pytest.warns(MoELMCWarning) as caught:
        alignment = verb(a, copy("mixtral") if copied else a, tmp_path / "out")
    [warning] = caught
    assert str(warning.message).startswith("A and B hold the same weights") and warning.filename == __file__
    assert not alignment or alignment.warnings == ("A and B hold the same weights; the alignment is the identity",)
