"""Names of two models that fit a plot, and tell the two apart."""

from __future__ import annotations

from itertools import takewhile

WIDTH = 33  # characters of a name: two fit one line of a title
MARK = "…"


def short_names(a: str, b: str, width: int = WIDTH) -> tuple[str, str]:
    """What two models are called in a plot: names that are too long lose their middle, but never what tells the two apart.

    Args:
        a, b: their names.
        width: characters that each may have, at least 10.

    Example:
        >>> short_names("org/base", "org/tuned")
        ('org/base', 'org/tuned')
        >>> short_names("organisation/a-long-name-of-a-model-v1", "organisation/a-long-name-of-a-model-v2", 20)
        ('organisati…-model-v1', 'organisati…-model-v2')
    """
    short = shorten(a, width), shorten(b, width)
    return short if short[0] != short[1] or a == b else _around_the_difference(a, b, width)


def shorten(name: str, width: int) -> str:
    """A name without its middle, where it has more than `width` characters.

    Example:
        >>> shorten("abcdefghij", 7)
        'abc…hij'
    """
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return name[: width - 1 - tail] + MARK + name[len(name) - tail :]


def _around_the_difference(a: str, b: str, width: int) -> tuple[str, str]:
    """Two names that differ in their middle only: what is equal is shortened, and the difference kept."""
    before = _common(a, b)
    after = _common(a[before:][::-1], b[before:][::-1])
    found = [name[before : len(name) - after] for name in (a, b)]
    most = max(width // 2, 3)
    rest = max((width - min(max(map(len, found)), most)) // 2, 3)
    head, tail = shorten(a[:before], rest), shorten(a[len(a) - after :], rest)
    first, second = (head + shorten(name, most) + tail for name in found)
    return first, second


def _common(a: str, b: str) -> int:
    """How many characters two words have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
