from __future__ import annotations

import argparse
from dataclasses import fields
from inspect import signature

import pytest

import hf_moe_lmc as lmc
from hf_moe_lmc.cli.command_line import main
from hf_moe_lmc.cli.parser import VERBS, parser, size
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.path.options import ComputeOptions, GridOptions
from hf_moe_lmc.verbs.options import OutputOptions, filled

BARRIER = ["barrier", "a", "b", "-o", "c", "--text", "x"]


def test_sizes_are_read_with_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    found = [size(text) for text in ("4GiB", "500 MB", "1048576", "1.5k", "2TiB", "7b", "3m")]
    assert found == [4 * 2**30, 500 * 10**6, 2**20, 1500, 2 * 2**40, 7, 3 * 10**6]
    for text in ("much", "4XB", "-1", "", "4GiBs"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size"):
            size(text)
    with pytest.raises(SystemExit):
        main([*BARRIER, "--activation-memory", "lots"])
    assert "expected a size such as 4GiB" in capsys.readouterr().err


def test_only_what_is_given_is_passed_on() -> None:
    given = vars(parser().parse_args(BARRIER))
    assert given.keys() == {"verb", "a", "b", "output", "text"}
    options = filled(GridOptions, given), filled(ComputeOptions, given), filled(WeightMatching, given)
    assert options == (GridOptions(), ComputeOptions(), WeightMatching())
    given = vars(parser().parse_args([*BARRIER, "--layerwise", "--refine", "--no-routing", "--activation-memory", "1GiB"]))
    assert filled(GridOptions, given) == GridOptions(layerwise=5, refine=3, routing=False)
    assert filled(ComputeOptions, given) == ComputeOptions(activation_memory=2**30)
    given = vars(parser().parse_args([*BARRIER, "--layerwise", "2", "--refine", "1", "--layers", "0-3,8"]))
    assert filled(GridOptions, given) == GridOptions(layerwise=2, refine=1, layers="0-3,8")
    given = vars(parser().parse_args(["merge", "a", "b", "-o", "c", "--no-resume", "--order", "gate"]))
    assert filled(OutputOptions, given) == OutputOptions(resume=False) and filled(WeightMatching, given).order == "gate"


@pytest.mark.parametrize("verb", ["align", "apply", "barrier", "merge", "push", "inspect", "selftest"])
def test_each_option_is_a_keyword_of_the_verb_and_each_keyword_an_option(verb: str) -> None:
    subparsers = next(action for action in parser()._actions if action.choices is not None)
    assert isinstance(subparsers.choices, dict) and subparsers.choices.keys() == VERBS.keys()
    words = {action.dest for action in subparsers.choices[verb]._actions} - {"help", "dry_run", "json", "quiet"}
    keywords = set(signature(getattr(lmc, verb)).parameters)
    assert words == keywords - {"token"}
    if verb in ("align", "apply", "barrier", "merge"):
        assert signature(getattr(lmc, f"plan_{verb}")).parameters == signature(getattr(lmc, verb)).parameters
        fields_of_values = {field.name for kind in (OutputOptions, WeightMatching, GridOptions) for field in fields(kind)}
        for name, parameter in signature(getattr(lmc, verb)).parameters.items():
            assert name not in fields_of_values or parameter.default is None, name
