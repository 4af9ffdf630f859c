"""The argument parser of the command line: help for a newcomer, and all problems of a call in one report."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, cast

from hf_moe_lmc.errors import escaped
from hf_moe_lmc.runtime.tables import definitions

USAGE_ERROR = 2


class Parser(argparse.ArgumentParser):
    """A parser that leaves out what was not given, and reports every problem of a call together.

    A namespace holds the given options only. An option is written out in full: an abbreviation would stop working on the day
    that another option begins alike. A mistyped word is answered with the one that was probably meant.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=Help, argument_default=argparse.SUPPRESS, allow_abbrev=False, **settings)
        self._positionals.title = "arguments"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As in argparse, but nothing unknown comes back: that is an error, reported with whatever is missing."""
        words = sys.argv[1:] if args is None else list(args)
        self._refuse_single_dashes(words)
        every: list[Any] = [*self._actions, *self._mutually_exclusive_groups]
        needed = [one for one in every if one.required]
        for one in needed:
            one.required = False  # argparse would report that alone
        try:
            found, extra = super().parse_known_args(words, namespace)
        finally:
            for one in needed:
                one.required = True
        problems = [*self._unknown(extra), *_missing(needed, found)]
        if problems:
            self.refuse(problems)
        return found, []

    def error(self, message: str) -> NoReturn:
        self.refuse([message])

    def refuse(self, problems: Iterable[str]) -> NoReturn:
        """Ends the call with its problems, a line each, and one line of usage."""
        lines = [f"error: {escaped(problem)}" for problem in problems]
        self.exit(USAGE_ERROR, "\n".join([*lines, f"usage: {self.usage}; see {self.prog} --help", ""]))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            meant = _meant(str(value), known) or f"; the verbs are {', '.join(known)}"
            raise argparse.ArgumentError(None, f"unknown verb {value}{meant}")
        raise argparse.ArgumentError(action, f"{value}: expected one of {', '.join(known)}{_meant(str(value), known)}")

    def _refuse_single_dashes(self, words: Sequence[str]) -> None:
        """`-overwrite` is no `-o verwrite`."""
        for word in words[: words.index("--") if "--" in words else None]:
            long = f"-{word.partition('=')[0]}"
            if re.match(r"-[a-z][a-z-]", word) and any(option.startswith(long) for option in self._option_string_actions):
                self.refuse(self._unknown([word]))

    def _unknown(self, extra: Sequence[str]) -> list[str]:
        """What argparse did not know. Words without a dash may be values of unknown options, and are no problem beside them."""
        options = [word.partition("=")[0] for word in extra if word.startswith("-") and word not in ("-", "--")]
        if not options:
            return [f"unexpected argument {word}" for word in extra if word != "--"]
        return [f"unknown option {option}{_meant(option, list(self._option_string_actions))}" for option in options]


class Help(argparse.HelpFormatter):
    """Help with one short line of usage; lines that are indented in a text stay as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = [
            [line] if line.startswith(" ") else textwrap.wrap(line, width, break_on_hyphens=False) or [""]
            for line in text.splitlines()
        ]
        return "\n".join(indent + line for of_one in lines for line in of_one)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)

    def _format_action(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            verbs = {verb.dest: verb.help or "" for verb in action._get_subactions()}
            return "\n".join([*definitions(verbs, width=self._width), ""])
        return super()._format_action(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return invocation(action)


def invocation(action: argparse.Action) -> str:
    """An argument as help shows it: its names, and once its value.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> invocation(parser.add_argument("-o", "--output", metavar="OUT"))
        '-o, --output OUT'
        >>> invocation(parser.add_argument("--order", choices=("gate", "best")))
        '--order {gate,best}'
    """
    value = _value(action)
    if not action.option_strings:
        return value
    return f"{', '.join(action.option_strings)} {value}".strip()


def short_usage(parser: argparse.ArgumentParser) -> str:
    """One line with what a call must have: `hf-moe-lmc merge A B -o OUT [options]`."""
    groups = [group._group_actions for group in parser._mutually_exclusive_groups if group.required]
    alone = sorted((action for action in parser._actions if action.required), key=lambda action: bool(action.option_strings))
    needed = [*map(_named, alone), *(f"({' | '.join(map(_named, actions))})" for actions in groups)]
    return " ".join([parser.prog, *needed, "[options]"])


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action, argparse._SubParsersAction):
        return "VERB"
    word = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper())
    if action.nargs == "*":
        return f"[{word} ...]"
    return f"[{word}]" if action.nargs == "?" else cast("str", word)


def _named(action: argparse.Action) -> str:
    return f"{action.option_strings[0]} {_value(action)}" if action.option_strings else _value(action)


def _missing(needed: Iterable[Any], found: argparse.Namespace) -> list[str]:
    """What had to be given, and was not: one problem, or none."""
    members = [getattr(one, "_group_actions", [one]) for one in needed]
    words = [
        " or ".join(map(_named, actions))
        for actions in members
        if all(getattr(found, action.dest, None) is None for action in actions)
    ]
    return [f"missing: {', '.join(words)}"] if words else []


def _meant(word: str, known: Sequence[str]) -> str:
    """A suggestion of the known words that somebody may have meant; nothing where none is near."""
    bare = {one.lstrip("-"): one for one in known}  # dashes would make all options alike
    begins = [one for one in bare if len(word.lstrip("-")) > 1 and one.startswith(word.lstrip("-"))]
    near = [bare[one] for one in begins or get_close_matches(word.lstrip("-"), bare, n=1)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
