"""Scripts that complete verbs, options and files in a shell, made by shtab from the parser itself."""

from __future__ import annotations

import argparse
import re

import shtab

from hf_moe_lmc.cli.parser import VERBS, parser

# What a value is, by its metavar. Models may also be Hub ids, which no shell knows.
KINDS = {"FILE": shtab.FILE, "SYMMETRY": shtab.FILE} | dict.fromkeys(("MODEL", "A", "B", "OUT", "DIR"), shtab.DIRECTORY)


def script(shell: str) -> str:
    """The completion script of a shell: bash, zsh or fish."""
    whole = parser()
    (verbs,) = [action for action in whole._actions if isinstance(action, argparse._SubParsersAction)]
    for name, verb in verbs.choices.items():
        verb.description = VERBS[name].summary  # a shell shows one line
        for action in verb._actions:
            word = re.search(r"[A-Z]+$", str(action.metavar))  # of [NAME=]FILE the last
            if word and (kind := KINDS.get(word[0])):
                action.complete = kind
    return shtab.complete(whole, shell)
