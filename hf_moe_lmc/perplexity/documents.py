"""Documents that are read as far as they are needed. Knows nothing of MoE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Document:
    """One text in blocks, which are read when they are asked for, and kept.

    Example:
        >>> document = Document(iter(["One ", "text ", "in blocks."]))
        >>> document.head(5)
        ('One t', False)
        >>> document.head(100)
        ('One text in blocks.', True)
    """

    def __init__(self, blocks: Iterable[str]) -> None:
        self._unread = iter(blocks)
        self._text: list[str] = []

    def head(self, characters: int) -> tuple[str, bool]:
        """The first characters, and whether they are the whole document."""
        size = sum(map(len, self._text))
        while size <= characters and (block := next(self._unread, None)) is not None:
            self._text.append(block)
            size += len(block)
        self._text = ["".join(self._text)]
        return self._text[0][:characters], size <= characters

    def blocks(self) -> Iterator[str]:
        """All that is still to be read, which is not kept."""
        return self._unread

    def whole(self) -> str:
        """All of its text."""
        self._text = ["".join([*self._text, *self._unread])]
        return self._text[0]


def joined(texts: Iterable[str], separator: str) -> Iterator[str]:
    """The blocks of one document that holds all texts.

    Example:
        >>> "".join(joined(["a", "", "b"], "+"))
        'a++b'
    """
    for number, text in enumerate(texts):
        if number:
            yield separator
        yield text
