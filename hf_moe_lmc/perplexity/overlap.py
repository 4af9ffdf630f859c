"""Whether two texts share passages: n words in a row, such as a copied paragraph or a licence at the head of every file.

What was fitted on a passage must not be judged by it. Texts that were split by file can still share passages: half of the
files of one project begin with the same lines.

Words are runs of letters and digits, in lower case; a Chinese or Japanese character is a word. So neither spaces nor
punctuation hide a copy. Passages are compared by 64-bit hashes. That two different ones of a billion are taken for equal has
a chance of one in ten million million.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.windows import Windows

PASSAGE = 12  # words in a row
AT_ONCE = 1 << 16  # words of the streamed text
WORD = re.compile(r"[぀-ヿ㐀-鿿豈-﫿]|[^\W_぀-ヿ㐀-鿿豈-﫿]+")
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Overlap:
    """What a text shares with another.

    Attributes:
        pieces: numbers of the pieces of the first text in which a shared passage begins, ascending.
        total: pieces of the first text.
        passages: different passages that are shared.
        example: the first of them in the second text; None: there is none.

    Example:
        >>> overlap([["a b c ", "d e f"]], ["x B, c; D y"], size=3)
        Overlap(pieces=(0,), total=2, passages=1, example='B, c; D')
    """

    pieces: tuple[int, ...]
    total: int
    passages: int
    example: str | None

    def __bool__(self) -> bool:
        """Whether anything is shared."""
        return self.passages > 0


def overlap(first: Iterable[Sequence[str]], second: Iterable[str], size: int = PASSAGE) -> Overlap:
    """The passages of `size` words that two texts share.

    Memory: 12 bytes for each word of the first text while it is read, and a document of either. So the smaller text, usually
    that of the evaluation, goes first.

    Args:
        first: documents, each in pieces that follow each other, such as windows. A passage may go on in the next piece.
        second: documents.
        size: words in a row.

    Example:
        >>> bool(overlap([["The quick brown fox."]], ["the quick-brown FOX!"], size=4))
        True
        >>> bool(overlap([["the quick brown fox"]], ["the quick", "brown fox"], size=4))  # two documents
        False
    """
    known, owners, total = _held(first, size)
    order = np.argsort(known, kind="stable")
    known, owners = known[order], owners[order]
    met = np.zeros(len(known), dtype=bool)
    example = None
    for document in second:
        for hashes, spans in _streamed(document, size):
            at = np.searchsorted(known, hashes)
            found = at < len(known)
            found[found] = known[at[found]] == hashes[found]
            if not found.any():
                continue
            met[at[found]] = True
            if example is None:
                number = int(found.argmax())
                example = document[spans[number][0] : spans[number + size - 1][1]]
    shared = known[met]
    everywhere = np.isin(known, shared)
    return Overlap(tuple(np.unique(owners[everywhere]).tolist()), total, len(shared), example)


def check_apart(
    evaluation: Windows, other: Windows, tokenizer: PreTrainedTokenizerBase, *, what: str = "calibration", size: int = PASSAGE
) -> None:
    """Refuses an evaluation on text that holds passages of a text that something was fitted on.

    Args:
        evaluation: of which windows are counted.
        other: the other text.
        tokenizer: that both were cut with; what they hold is compared as text.
        what: the other text is for.

    Raises:
        InputError: windows of the evaluation share passages with the other text.
    """
    documents = [text for pieces in _documents(other, tokenizer) for text in ["".join(pieces)]]
    found = overlap(_documents(evaluation, tokenizer), documents, size)
    if found:
        example = " ".join((found.example or "").split())
        raise InputError(
            f"{len(found.pieces)} of {found.total} windows of the evaluation share {size} words in a row with the {what} text, "
            f"such as: {example!s}\nWhat is fitted on a text cannot be judged by it. Give texts without common passages: split "
            "by document, with near copies and repeated headers on one side"
        )


def _documents(windows: Windows, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """The text of the windows of each document."""
    texts = tokenizer.batch_decode(windows.new_ids(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    current: list[str] = []
    for number, (text, owner) in enumerate(zip(texts, windows.documents, strict=True)):
        if number and owner != windows.documents[number - 1]:
            yield current
            current = []
        current.append(text)
    yield current


def _held(documents: Iterable[Sequence[str]], size: int) -> tuple[Hashes, NDArray[np.int32], int]:
    """Hashes of all passages, the number of the piece in which each begins, and how many pieces there are."""
    hashes: list[Hashes] = [np.zeros(0, dtype=np.uint64)]
    owners: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    total = 0
    for pieces in documents:
        ends = np.cumsum([len(piece) for piece in pieces])
        for found, spans in _streamed("".join(pieces), size):
            starts = np.array([start for start, _ in spans[: len(found)]], dtype=np.int64)
            hashes.append(found)
            owners.append((total + np.searchsorted(ends, starts, side="right")).astype(np.int32))
        total += len(pieces)
    return np.concatenate(hashes), np.concatenate(owners), total


def _streamed(document: str, size: int) -> Iterator[tuple[Hashes, list[tuple[int, int]]]]:
    """Hashes of the passages of a document, and where their words stand in it, some words at a time."""
    words: list[int] = []
    spans: list[tuple[int, int]] = []
    for match in WORD.finditer(document):
        words.append(hash(match[0].lower()))
        spans.append(match.span())
        if len(words) == AT_ONCE + size:
            yield hashes_in_a_row(np.array(words, dtype=np.int64), size), spans
            words, spans = words[AT_ONCE + 1 :], spans[AT_ONCE + 1 :]
    if len(words) >= size:
        yield hashes_in_a_row(np.array(words, dtype=np.int64), size), spans


def hashes_in_a_row(numbers: NDArray[np.int64], size: int) -> Hashes:
    """The hash of each `size` numbers in a row, such as those of words, or token ids; none where there are fewer.

    Example:
        >>> found = hashes_in_a_row(np.array([1, 2, 3, 1, 2]), 2)
        >>> len(found), found[0] == found[3], found[0] == found[1]
        (4, np.True_, np.False_)
    """
    each = numbers.view(np.uint64)
    count = max(0, len(each) - size + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(size):  # products and sums modulo 2**64
        total = total * BASE + each[place : place + count]
    return total
