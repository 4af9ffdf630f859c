"""Calibration text cut in two by document, each text for itself: what is chosen on one half is accepted on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.perplexity.by_text import DECIDING
from hf_moe_lmc.perplexity.windows import Windows


def cut(windows: Windows, numbers: Sequence[int], share: float = 0.5) -> tuple[list[int], list[int]]:
    """Cuts some windows in two, so that no document has windows in both parts; a single document is cut at a window.

    Documents are dealt out in their order, each to the part that lacks more of its share. So the parts depend on the text
    alone.

    Args:
        numbers: of the windows.
        share: of the tokens of each text that the first part gets, about.

    Raises:
        InputError: a text of a single window.

    Example:
        >>> import torch
        >>> rows = tuple(torch.arange(5) for _ in range(6))
        >>> cut(Windows(rows, (0, 0, 1, 1, 2, 3), 5, False, 30), range(6))
        ([0, 1, 4], [2, 3, 5])
        >>> cut(Windows(rows, (0,) * 6, 5, False, 30), range(6))
        ([0, 1, 2], [3, 4, 5])
    """
    parts: tuple[list[int], list[int]] = ([], [])
    names = windows.text_of
    for text in dict.fromkeys(names[i] for i in numbers):
        own = [i for i in numbers if names[i] == text]
        documents = list(dict.fromkeys(windows.documents[i] for i in own))
        if len(own) == 1:
            raise InputError(
                f"calibration text {text}: one window of at most {windows.context} tokens, which cannot be cut in two; "
                "give more text or a smaller --context"
            )
        if len(documents) == 1:
            middle = min(max(round(share * len(own)), 1), len(own) - 1)
            pieces = [own[:middle], own[middle:]]
        else:
            pieces = _dealt([[i for i in own if windows.documents[i] == document] for document in documents], windows, share)
        for part, piece in zip(parts, pieces, strict=True):
            part.extend(piece)
    return parts


def _dealt(documents: Sequence[list[int]], windows: Windows, share: float) -> list[list[int]]:
    pieces: list[list[int]] = [[], []]
    tokens = [0, 0]
    for document in documents:
        which = 0 if tokens[0] * (1 - share) <= tokens[1] * share else 1
        pieces[which] += document
        tokens[which] += sum(len(windows.rows[i]) for i in document)
    return pieces


def halves_of(windows: Windows) -> tuple[list[int], list[int]]:
    """The half of calibration text that repairs are chosen on, and the one that decides.

    Raises:
        InputError: a text cannot be cut in two, or its second half has too few windows to decide on a difference.
    """
    first, second = cut(windows, range(len(windows.rows)))
    names = windows.text_of
    for text in dict.fromkeys(names):
        found = sum(names[i] == text for i in second)
        if found < DECIDING:
            raise InputError(
                f"calibration text {text}: its second half has {found} windows of {windows.context} tokens, and {DECIDING} are "
                "needed to decide; give more text, or a smaller --context"
            )
    return first, second


def deciding(windows: Windows, numbers: Sequence[int]) -> tuple[Windows, list[str]]:
    """Some windows as what is resampled: by document, or by window in texts of fewer than DECIDING documents.

    Returns:
        The windows, and the names of the texts whose windows are taken to be independent.
    """
    part = part_of(windows, numbers)
    names = part.text_of
    by_text = {text: {part.documents[i] for i in range(len(names)) if names[i] == text} for text in names}
    few = [text for text, documents in by_text.items() if len(documents) < DECIDING]
    beyond = max(part.documents) + 1
    documents = tuple(beyond + i if names[i] in few else number for i, number in enumerate(part.documents))
    return replace(part, documents=documents), few


def part_of(windows: Windows, numbers: Sequence[int]) -> Windows:
    """Some windows by themselves, for means over them."""
    if windows.context_only:
        raise ValueError("windows of calibration text do not overlap")
    names = windows.text_of
    return replace(
        windows,
        rows=tuple(windows.rows[i] for i in numbers),
        documents=tuple(windows.documents[i] for i in numbers),
        texts=tuple(names[i] for i in numbers),
        bytes_scored=None,
        tokens_read=sum(len(windows.rows[i]) for i in numbers),
    )
