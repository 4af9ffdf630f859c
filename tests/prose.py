"""Reads Markdown as a reader does: its blocks of code, its sentences, its links and what these lead to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
_NEW_BLOCK = re.compile(r"\s*(?:[-*] |\d+\. |#+ |\| |> |$)")
_MARK = re.compile(r"^\s*(?:[-*] |\d+\. |#+ |> )")
_END = re.compile(r"(?<=[.!?])[*_\"')]*\s+")
_ABBREVIATED = re.compile(r"\b(?:e\.g|i\.e|Eq|Sec|Prop)\.$", re.IGNORECASE)


@dataclass(frozen=True)
class Code:
    """A fenced block: its language, its text, and the line of the page that it begins in."""

    language: str
    text: str
    line: int


def code(page: str) -> list[Code]:
    return [Code(found[1], found[2], page[: found.start()].count("\n") + 2) for found in _FENCE.finditer(page)]


def sentences(page: str) -> Iterator[str]:
    """The sentences of a page. Code, tables, comments and indented blocks hold none; code within a line is one word."""
    for block in _blocks(_COMMENT.sub("", _FENCE.sub("\n", page))):
        text = re.sub(r"`[^`]+`", "`code`", _LINK.sub(r"\1", block))
        start = 0
        for end in _END.finditer(text):
            if not _ABBREVIATED.search(text[: end.start()]):
                yield text[start : end.start()].strip()
                start = end.end()
        yield text[start:].strip()


def _blocks(page: str) -> Iterator[str]:
    """Paragraphs, items and headings, each on one line."""
    block = ""
    for line in [*page.splitlines(), ""]:
        if _NEW_BLOCK.match(line) or line.startswith("    "):
            if block:
                yield block
            block = ""
        if line.startswith(("|", "    ")) and not line.lstrip().startswith(("- ", "* ")):
            continue
        block = f"{block} {_MARK.sub('', line).strip()}".strip()


def words(sentence: str) -> int:
    """Of a sentence: what holds a letter or a digit between spaces."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def links(page: str) -> list[str]:
    """Where the links and pictures of a page lead, in or out."""
    return [found[2] for found in _LINK.finditer(_FENCE.sub("\n", page))]


def anchors(page: str) -> set[str]:
    """What can stand behind the # of a link to a page: its headings as GitHub names them."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("\n", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", _LINK.sub(r"\1", title).lower()).strip().replace(" ", "-") for title in titles}
