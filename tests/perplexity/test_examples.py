"""The examples in the docstrings of this room hold."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from hf_moe_lmc import perplexity

MODULES = sorted(module.name for module in pkgutil.iter_modules(perplexity.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"hf_moe_lmc.perplexity.{name}"))
    assert result.attempted > 0 and result.failed == 0


def test_an_example_that_does_not_hold_fails() -> None:
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(test, out=lambda text: None).failed == 1
