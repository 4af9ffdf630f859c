"""One small tree of exceptions. Every message says what, where, expected, found, and the next step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SHOWN = 8  # of faults of one kind, the rest is counted


class MoELMCError(Exception):
    """Base of every error that the package raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class MoELMCWarning(UserWarning):
    """What does not stop a verb, and a user should know."""


class HubError(MoELMCError):
    """The Hub could not be reached, or refused the request."""


class ProcessError(MoELMCError):
    """Another process of a run that was started as several failed, or ended without a word."""


class WriteError(MoELMCError):
    """The system refused to write (a full disk, say). What is whole is kept, and the same call continues."""


class ForeignError(MoELMCError):
    """The code of a transformers class failed: the message names model type, class and release."""


class InputError(MoELMCError):
    """What the user gave cannot be used. Raised before any work; nothing has been written.

    Attributes:
        kind: of many faults of one kind, a list shows some and counts the rest; a fault without a kind is always shown.
        faults: the errors that this one stands for, where it stands for several.
        more: how many others of a kind there are, which were only counted.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> try:
        ...     lmc.inspect("./no-such-model")
        ... except lmc.InputError as error:
        ...     print(error.exit_code, error)
        2 ./no-such-model: no such folder (it looks like a local path, so the Hub was not asked; ...)
    """

    exit_code = 2

    def __init__(self, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.faults: tuple[InputError, ...] = ()
        self.more: dict[str, int] = {}


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, damaged, or of a kind that is not read."""


class FamilyError(InputError):
    """A checkpoint's tensors do not form the MoE blocks that its family describes, or its family is unknown."""


class MismatchError(InputError):
    """Two checkpoints do not belong to one architecture."""


class SymmetryError(InputError):
    """A symmetry is not a group element, or does not fit the checkpoint."""


class OutputError(InputError):
    """The output folder cannot be used."""


class Faults:
    """What is wrong with some input, gathered while the check goes on, so that everything is reported at once."""

    def __init__(self) -> None:
        self.found: list[InputError] = []
        self.more: dict[str, int] = {}
        self._kinds: dict[str, int] = {}
        self._said: set[str] = set()

    def add(self, error: InputError) -> None:
        """Adds what an error stands for; what is there already, in the same words, only once."""
        for fault in error.faults or (error,):
            if str(fault) not in self._said and not self.enough(fault.kind):
                self._said.add(str(fault))
                self._kinds[fault.kind] = self._kinds.get(fault.kind, 0) + 1
                self.found.append(fault)
        for kind, count in error.more.items():
            self.more[kind] = self.more.get(kind, 0) + count

    def enough(self, kind: str) -> bool:
        """Whether there are as many faults of this kind as a list shows; if so, one more is counted."""
        if not kind or self._kinds.get(kind, 0) < SHOWN:
            return False
        self.more[kind] = self.more.get(kind, 0) + 1
        return True

    @contextmanager
    def gather(self) -> Iterator[None]:
        """Keeps an InputError of the block for the list, and goes on."""
        try:
            yield
        except InputError as error:
            self.add(error)

    def check(self) -> None:
        """Raises the one fault as it is; several as one list, an error of the most specific class that all of them have."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            classes = [type(error) for error in self.found]
            common = next(one for one in classes[0].__mro__ if all(issubclass(each, one) for each in classes))
            assert issubclass(common, InputError)
            lines = [f"  {i}. " + str(fault).replace("\n", "\n     ") for i, fault in enumerate(self.found, 1)]
            lines += [f"  ... and {count} more: {kind}" for kind, count in self.more.items()]
            count = len(self.found) + sum(self.more.values())
            combined = common("\n".join([f"{count} faults; nothing has been done:", *lines]))
            combined.faults, combined.more = tuple(self.found), self.more
            raise combined


def refuse_idle(options: Mapping[str, Any], because: str, instead: str = "") -> None:
    """Refuses options that could have no effect: each is a misunderstanding, better said than ignored.

    Args:
        options: by name; None: not given.
        instead: what would give them an effect, such as "give --repair auto".

    Raises:
        InputError: one is given, or more.
    """
    named = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if named:
        them = "them" if len(named) > 1 else "it"
        raise InputError(
            f"{' and '.join(named)} would have no effect: {because}; {f'{instead}, or ' if instead else ''}leave {them} out"
        )


def listing(lines: list[str], limit: int = SHOWN) -> str:
    """`lines` indented below each other, the rest counted."""
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def shown(text: object, limit: int = 160) -> str:
    """Something from a file as a message may show it: on one line, what does not print escaped, the middle cut out."""
    plain = str(text)
    if len(plain) > limit:
        plain = f"{plain[: limit // 2]}...{plain[-limit // 2 :]}"
    if plain.isprintable():
        return plain
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in plain)


def worded(value: object) -> str:
    """A value from a file in words: absent, on, off, or as JSON has it; text in single quotes.

    Example:
        >>> [worded(value) for value in (None, True, "fp8", [1, None])]
        ['absent', 'on', "'fp8'", '[1, null]']
    """
    if value is None or isinstance(value, bool):
        return "absent" if value is None else "on" if value else "off"
    if isinstance(value, str):
        return shown(f"'{value}'")
    return shown(json.dumps(value, default=str, ensure_ascii=False))


def escaped(text: str) -> str:
    """Several lines for a terminal: no control characters but the ends of lines."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)
