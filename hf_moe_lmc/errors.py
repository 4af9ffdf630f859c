"""One small tree of exceptions. Every message says what, where, expected, found, and the next step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class MoELMCError(Exception):
    """Base of every error that the package raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class HubError(MoELMCError):
    """The Hub could not be reached, or refused the request."""


class ProcessError(MoELMCError):
    """Another process of a run that was started as several failed, or ended without a word."""


class InputError(MoELMCError):
    """What the user gave cannot be used. Raised before any work; nothing has been written.

    Attributes:
        kind: of many faults of one kind, a list shows some and counts the rest; a fault without a kind is always shown.
        faults: the errors that this one stands for, where it stands for several.
    """

    exit_code = 2

    def __init__(self, message: str, *, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind
        self.faults: tuple[InputError, ...] = ()


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
        self._said: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.found)

    def add(self, error: InputError) -> None:
        """Adds what an error stands for; what is there already, in the same words, only once."""
        for fault in error.faults or (error,):
            if str(fault) not in self._said:
                self._said.add(str(fault))
                self.found.append(fault)

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
            combined = common(f"{len(self.found)} faults; nothing has been done:\n{_numbered(self.found)}")
            combined.faults = tuple(self.found)
            raise combined


def _numbered(faults: Sequence[InputError], limit: int = 8) -> str:
    """One below the other; of each kind at most `limit`, the rest counted where the last one shown stands."""
    counts: dict[str, int] = {}
    lines: list[str] = []
    for number, fault in enumerate(faults, 1):
        counts[fault.kind] = counts.get(fault.kind, 0) + 1
        if fault.kind and counts[fault.kind] > limit:
            continue
        lines.append(f"  {number}. " + str(fault).replace("\n", "\n     "))
    hidden = {kind: count - limit for kind, count in counts.items() if kind and count > limit}
    return "\n".join([*lines, *(f"  ... and {count} more: {kind}" for kind, count in hidden.items())])


def listing(lines: list[str], limit: int = 8) -> str:
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
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in plain)


def escaped(text: str) -> str:
    """Several lines for a terminal: no control characters but the ends of lines."""
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)
