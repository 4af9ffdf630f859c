"""Options of the verbs as values: each checks itself, and holds the defaults that everybody else leaves to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from hf_moe_lmc.errors import refuse_idle
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

    Raises:
        InputError: not a name to publish under, or `private` without anything to publish.
    """

    resume: bool = True
    overwrite: bool = False
    allow_nonfinite: bool = False
    push_to_hub: str | None = None
    private: bool | None = None

    def __post_init__(self) -> None:
        check_repo_id(self.push_to_hub)
        if self.push_to_hub is None:
            refuse_idle({"private": self.private}, "nothing is published")


def filled(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """A value of `kind` from those of the given keywords that are its fields; None stands for its own default."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if given.get(name) is not None})
