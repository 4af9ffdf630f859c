"""One small tree of exceptions. Every message says what, where, expected, found, and the next step."""

from __future__ import annotations


class MoELMCError(Exception):
    """Base of every error that the package raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class HubError(MoELMCError):
    """The Hub could not be reached, or refused the request."""


class ProcessError(MoELMCError):
    """Another process of a run that was started as several failed, or ended without a word."""


class WriteError(MoELMCError):
    """The system refused to write (a full disk, say). What is whole is kept, and the same call continues."""


class InputError(MoELMCError):
    """What the user gave cannot be used. Raised before any work; nothing has been written."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, damaged, or of a kind that is not read."""


class FamilyError(InputError):
    """A checkpoint's tensors do not form the MoE blocks that its family describes, or its family is unknown."""


class MismatchError(InputError):
    """Two checkpoints do not belong to one architecture."""


class SymmetryError(InputError):
    """A symmetry is not a group element, or does not fit the checkpoint."""


class OutputError(InputError):
    """The output folder cannot be used."""


def listing(lines: list[str], limit: int = 8) -> str:
    """`lines` indented below each other, the rest counted."""
    shown = [f"  {line}" for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)
