"""Tables as text: aligned columns for a terminal, Markdown for documents."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest

Row = Sequence[str]  # a cell for each column


def aligned(rows: Sequence[Row], *, align: str = "<", least: Sequence[int] = (), gap: str = "  ") -> list[str]:
    """One line for each row, each column as wide as its widest cell. Lines do not end in spaces.

    Args:
        align: `<` left, `>` right, `^` centred.
        least: least width of the first columns, in characters.
        gap: what stands between columns.

    Example:
        >>> print("\\n".join(aligned([("tensors", "12"), ("to read", "3 GB")])))
        tensors  12
        to read  3 GB
        >>> aligned([("t", "nll"), ("0.5", "1.25")], align=">", least=(5,))
        ['    t   nll', '  0.5  1.25']
    """
    widths = [max(column) for column in zip_longest(least, *(map(len, row) for row in rows), fillvalue=0)]
    return [gap.join(f"{cell:{align}{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def wrapped(row: Row, widths: Sequence[int], *, gap: str = "  ") -> list[str]:
    """The lines of one row whose cells are broken at their columns' widths.

    Example:
        >>> wrapped(("mixtral", "softmax or sigmoid"), (8, 10))
        ['mixtral   softmax or', '          sigmoid']
    """
    cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)]
    return [
        gap.join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True)).rstrip()
        for texts in zip_longest(*cells, fillvalue="")
    ]


def definitions(texts: Mapping[str, str], *, width: int, indent: str = "  ", gap: str = "  ") -> list[str]:
    """Terms with their texts beside them, broken at `width` characters.

    Example:
        >>> definitions({"rigid": "units stay where they are", "gelu": "order only"}, width=24)
        ['  rigid  units stay', '         where they are', '  gelu   order only']
    """
    longest = max(map(len, texts))
    below = " " * (len(indent) + longest + len(gap))
    return [
        line
        for term, text in texts.items()
        for line in textwrap.wrap(text, width, initial_indent=f"{indent}{term:<{longest}}{gap}", subsequent_indent=below)
    ]


def markdown_table(header: Row, rows: Sequence[Row], *, rule: str | None = None) -> str:
    """A Markdown table; every line ends in a newline, and bars within cells are escaped.

    Args:
        rule: the line below the header, where it is another than `| --- | --- |`.

    Example:
        >>> print(markdown_table(["key", "type"], [["t", "number | null"]]), end="")
        | key | type |
        | --- | --- |
        | t | number \\| null |
    """
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in (header, *rows)]
    lines.insert(1, f"{rule}\n" if rule is not None else f"| {' | '.join(['---'] * len(header))} |\n")
    return "".join(lines)
