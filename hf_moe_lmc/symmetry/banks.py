"""Names of the banks of experts within a block, and of what belongs to one."""

from __future__ import annotations

FIRST = ""  # the first bank: the only one of nearly all models, and on disk the one without a name


def qualified(bank: str, name: str) -> str:
    """The name of something that belongs to a bank, as in keys and roles.

    >>> qualified("vision", "up"), qualified(FIRST, "up")
    ('vision.up', 'up')
    """
    return name if bank == FIRST else f"{bank}.{name}"


def in_bank(where: str, bank: str) -> str:
    """A place in words, with its bank where that is not the first.

    >>> in_bank("layer 3", "vision"), in_bank("layer 3", FIRST)
    ('layer 3, bank vision', 'layer 3')
    """
    return where if bank == FIRST else f"{where}, bank {bank}"
