"""Options of the verbs as values: each checks itself, and holds the defaults that everybody else leaves to it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hf_moe_lmc.errors import refuse_idle
from hf_moe_lmc.publishing.card import UNPUBLISHED, Destination, check_license
from hf_moe_lmc.publishing.push import check_repo_id

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """How an output comes to stand where it belongs.

    Attributes:
        resume: continue from what an earlier call with the same inputs and options had done when it was stopped.
        overwrite: the output may be what this package wrote before; it is replaced when the new one is whole.
        allow_nonfinite: write weights that are NaN or infinite, instead of raising.
        push_to_hub: OWNER/NAME to publish the result under.
        private: whether that repository is private; None: as the Hub has it.
        license: identifier of the licence that the card names; None: what the cards of all parents name alike, if they do.

    Raises:
        InputError: not a name to publish under, no identifier of a licence, or `private` without anything to publish.
    """

    resume: bool = True
    overwrite: bool = False
    allow_nonfinite: bool = False
    push_to_hub: str | None = None
    private: bool | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        check_repo_id(self.push_to_hub)
        check_license(self.license)
        if self.push_to_hub is None:
            refuse_idle({"private": self.private}, "nothing is published")

    def destination(self) -> Destination:
        """Under which name and licence an output is known to its readers. What it holds depends on no folder's name."""
        return Destination(name=self.push_to_hub or UNPUBLISHED, license=self.license)


def filled(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """A value of `kind` from those of the given keywords that are its fields; None stands for its own default."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if given.get(name) is not None})


def file_name(symmetry: object) -> str:
    """How a command on a card names a symmetry: its file or folder without the path to it, or SYMMETRY for a value.

    Example:
        >>> file_name("/home/me/symmetry.safetensors"), file_name(None)
        ('symmetry.safetensors', 'SYMMETRY')
    """
    return Path(symmetry).resolve().name if isinstance(symmetry, (str, os.PathLike)) else "SYMMETRY"
