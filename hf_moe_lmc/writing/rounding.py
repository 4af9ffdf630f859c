"""What storing weights anew adds to them: the error of rounding, by kind of tensor, and what was moved or kept instead."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.formats.protocol import StoredWeight

SAMPLED = 8  # one row in so many is decoded again to see the error, and at least those that share a scale
_NUMBERS = re.compile(r"\.\d+(?=\.|$)")
_BEFORE_LAYERS = re.compile(r".*(?:layers|blocks|h)\.N\.")


def kind_of(name: str, role: str | None) -> str:
    """The kind of a tensor: its role in an MoE block, or its name without numbers and what stands before its layer.

    Example:
        >>> kind_of("model.layers.3.self_attn.o_proj.weight", None), kind_of("layers.3.ffn.experts.0.w3.weight", "up")
        ('self_attn.o_proj', 'up')
    """
    if role is not None:
        return role
    return _BEFORE_LAYERS.sub("", _NUMBERS.sub(".N", name)).removesuffix(".weight")


@dataclass
class _Kind:
    """Tallies of one kind of tensor; numbers of units, squares of values and of errors."""

    requantized: int = 0
    kept: int = 0
    moved: int = 0
    signed: int = 0
    squares: float = 0.0
    errors: float = 0.0
    largest: float = 0.0


@dataclass
class RoundingErrors:
    """The tallies of one output, filled by several threads."""

    kinds: dict[str, _Kind] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, kind: str, *, moved: bool, sign: bool) -> None:
        """Counts a unit whose bytes were kept."""
        with self._lock:
            tally = self.kinds.setdefault(kind, _Kind())
            tally.kept += not moved
            tally.moved += moved
            tally.signed += sign

    def measure(self, kind: str, weight: StoredWeight, values: Tensor, parts: Mapping[str, Tensor]) -> None:
        """Counts a matrix that was stored anew, and compares some of its rows with what they are read back as."""
        grain = weight.format.rows or 1
        rows = min(len(values), max(grain, len(values) // SAMPLED // grain * grain))
        sample = {role: part[: -(-rows // weight.parts[role].per)] for role, part in parts.items()}
        wanted = values[:rows]
        read = weight.format.decode(sample, 0, weight.columns)
        squares = float(torch.linalg.vector_norm(wanted)) ** 2
        difference = read.sub_(wanted)
        errors, largest = float(torch.linalg.vector_norm(difference)) ** 2, float(difference.abs().max())
        with self._lock:
            tally = self.kinds.setdefault(kind, _Kind())
            tally.requantized += 1
            tally.squares += squares
            tally.errors += errors
            tally.largest = max(tally.largest, largest)

    def to_dict(self) -> dict[str, Any]:
        """By kind: how many matrices were requantized, kept and moved, and the relative error of the first."""
        return {
            kind: {
                "requantized": tally.requantized,
                "kept": tally.kept,
                "moved": tally.moved,
                "signs_changed": tally.signed,
                "relative_error": (tally.errors / tally.squares) ** 0.5 if tally.squares else 0.0,
                "largest_error": tally.largest,
            }
            for kind, tally in sorted(self.kinds.items())
        }
