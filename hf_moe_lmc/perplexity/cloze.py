"""A cloze task made from the text that is evaluated on: which of four continuations is the one that really follows?

The text is cut into pieces: a beginning, and the tokens that follow it. A question has the beginning, its own continuation, and
three continuations of other pieces of the same text, all of equal length. A model answers right where its own continuation has
the largest probability of all, given the beginning. Each continuation serves as the right one once and, as far as no two are
alike, as a wrong one three times. So whoever looks at continuations alone is right in one of four questions.

Nothing is drawn at random: equal text gives equal questions. The questions are no benchmark; they are made from the user's own
text, and tell models apart on that alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.windows import Windows

CHOICES = 4
BEGINNING = 32  # tokens, at most
CONTINUATION = 8  # tokens


@dataclass(frozen=True, eq=False)
class Cloze:
    """Questions from a text.

    Attributes:
        rows: what is evaluated: CHOICES windows for each question, the right one first, of which the continuation is scored.
        beginning: tokens of the beginnings.

    Example:
        >>> text = Windows((torch.arange(64),), (0,), context=64, bos=False, tokens_read=64)
        >>> cloze = cloze_of(text, 4)
        >>> cloze.windows.text_of, len(cloze.rows.rows), cloze.beginning
        (('text', 'text', 'text', 'text'), 16, 8)
        >>> cloze.rows.rows[1].tolist()  # the first beginning, with what follows the second
        [0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31]
        >>> cloze.right(torch.tensor([1.0, 2.0, 3.0, 4.0] + [5.0, 2.0, 7.0, 8.0] * 3)).tolist()
        [1.0, 0.0, 0.0, 0.0]
    """

    rows: Windows
    beginning: int

    @cached_property
    def windows(self) -> Windows:
        """One window for each question, which counts as one token: what means and resamples are over."""
        first = range(0, len(self.rows.rows), CHOICES)
        own = tuple(self.rows.rows[i] for i in first)
        documents, texts = tuple(self.rows.documents[i] for i in first), tuple(self.rows.text_of[i] for i in first)
        all_but_one = tuple(len(row) - 2 for row in own)
        return Windows(own, documents, self.rows.context, self.rows.bos, len(own), context_only=all_but_one, texts=texts)

    def right(self, losses: Tensor) -> Tensor:
        """Whether each question is answered right: float64 [..., question].

        Args:
            losses: of the rows, float64 [..., row], nats, summed over the continuation.
        """
        by_question = losses.unflatten(-1, (-1, CHOICES))
        return (by_question[..., 0] < by_question[..., 1:].min(dim=-1).values).double()

    def describe(self) -> dict[str, Any]:
        """The `cloze` of report.json."""
        owners = self.windows.text_of
        return {
            "questions": {name: owners.count(name) for name in dict.fromkeys(owners)},
            "choices": CHOICES,
            "beginning": self.beginning,
            "continuation": CONTINUATION,
        }


def cloze_of(windows: Windows, count: int) -> Cloze:
    """Questions from the text that windows were cut from.

    Args:
        count: questions of each text, at most; they are spread evenly over it.

    Raises:
        InputError: a text too short or too uniform for questions, or windows too short.
    """
    bos = windows.rows[0][:1].tolist() if windows.bos else []
    pieces_of = {name: _documents(windows, name) for name in dict.fromkeys(windows.text_of)}
    found: list[tuple[list[int], int, str]] = []
    beginning = min(BEGINNING, windows.context - len(bos) - CONTINUATION)
    while beginning >= CONTINUATION and not all(_enough(pieces, beginning) for pieces in pieces_of.values()):
        beginning //= 2
    if windows.context - len(bos) < 2 * CONTINUATION:
        raise InputError(f"context {windows.context}: a cloze task needs at least {2 * CONTINUATION + len(bos)} tokens")
    size = max(beginning, CONTINUATION)
    for name, documents in pieces_of.items():
        all_pieces = [piece for document in documents for piece in _pieces(document, size)]
        pieces = _spread(all_pieces, max(count, CHOICES))  # fewer would not give three wrong continuations
        asked = range(min(count, len(pieces)))
        questions = [rows for rows in (_question(pieces, number, bos) for number in asked) if rows]
        if not questions:
            raise InputError(
                f"the text {name} gives no cloze task: it takes {CHOICES} pieces of {2 * CONTINUATION} tokens that end in "
                f"different ones, and it has {len(pieces)} pieces; give more text, or leave out --cloze"
            )
        found += [(row, document, name) for rows, document in questions for row in rows]
    rows, owners, texts = zip(*found, strict=True)
    tensors = tuple(torch.tensor(row) for row in rows)
    scored_before = tuple(len(row) - 1 - CONTINUATION for row in rows)
    made = Windows(tensors, owners, windows.context, windows.bos, sum(map(len, rows)), context_only=scored_before, texts=texts)
    return Cloze(made, size)


class _Document(NamedTuple):
    number: int
    ids: list[int]


class _Piece(NamedTuple):
    document: int
    beginning: list[int]
    continuation: list[int]


def _documents(windows: Windows, text: str) -> list[_Document]:
    """The documents of a text."""
    found: dict[int, list[int]] = {}
    for ids, number, name in zip(windows.new_ids(), windows.documents, windows.text_of, strict=True):
        if name == text:
            found.setdefault(number, []).extend(ids)
    return [_Document(number, ids) for number, ids in found.items()]


def _pieces(document: _Document, beginning: int) -> Iterator[_Piece]:
    size = beginning + CONTINUATION
    for first in range(0, len(document.ids) - size + 1, size):
        here = document.ids[first : first + size]
        yield _Piece(document.number, here[:beginning], here[beginning:])


def _enough(documents: Sequence[_Document], beginning: int) -> bool:
    """Whether beginnings of this size leave as many pieces as a question takes, and some more."""
    return sum(len(document.ids) // (beginning + CONTINUATION) for document in documents) >= 5 * CHOICES


def _spread(pieces: Sequence[_Piece], count: int) -> list[_Piece]:
    """At most so many of them, as far apart as possible."""
    return [pieces[i * len(pieces) // count] for i in range(count)] if len(pieces) > count else list(pieces)


def _question(pieces: Sequence[_Piece], number: int, bos: list[int]) -> tuple[list[list[int]], int] | None:
    """The rows of a question, and its document; None where too few continuations differ."""
    own, total = pieces[number], len(pieces)
    chosen = [own.continuation]
    for choice in range(1, CHOICES):
        start = number + max(1, choice * total // CHOICES)
        others = (pieces[(start + step) % total].continuation for step in range(total))
        other = next((ids for ids in others if ids not in chosen), None)
        if other is None:
            return None
        chosen.append(other)
    return [[*bos, *own.beginning, *continuation] for continuation in chosen], own.document
