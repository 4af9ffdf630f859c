"""What storing weights anew adds to them: the error of rounding, by kind of tensor, and what was moved or kept instead."""

from __future__ import annotations

import re
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.formats.protocol import StoredWeight

SAMPLED = 8  # one row in so many is decoded again to see the error; of rows that share a scale, one such group in so many
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
    """Sums over one kind of tensor; numbers of units, squares of values and of errors."""

    requantized: int = 0
    kept: int = 0
    moved: int = 0
    signed: int = 0
    squares: float = 0.0
    errors: float = 0.0
    largest: float = 0.0

    def add(self, other: _Kind) -> None:
        for name, value in asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "largest" else mine + value)


@dataclass
class Tally:
    """The sums of one shard, which several threads add to."""

    kinds: defaultdict[str, _Kind] = field(default_factory=lambda: defaultdict(_Kind))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, kind: str, *, moved: bool, sign: bool) -> None:
        """Counts a unit whose bytes were kept."""
        self._add(kind, _Kind(kept=not moved, moved=moved, signed=sign))

    def measure(
        self, kind: str, weight: StoredWeight, place: tuple[int, int], values: Tensor, parts: Mapping[str, Tensor]
    ) -> None:
        """Counts a matrix that was stored anew, and compares some of its rows with what they are read back as.

        Args:
            place: number of the matrix and of its first row; which rows are looked at depends on it.
        """
        found = _Kind(requantized=1)
        for wanted, read in _samples(weight, place, values, parts):
            found.squares += float(torch.linalg.vector_norm(wanted)) ** 2
            difference = read.sub_(wanted)
            found.errors += float(torch.linalg.vector_norm(difference)) ** 2
            found.largest = max(found.largest, float(difference.abs().max()))
        self._add(kind, found)

    def _add(self, kind: str, found: _Kind) -> None:
        with self._lock:
            self.kinds[kind].add(found)

    def to_dict(self) -> dict[str, Any]:
        return {kind: asdict(found) for kind, found in self.kinds.items()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Mapping[str, Any]]) -> Tally:
        return cls(defaultdict(_Kind, {kind: _Kind(**found) for kind, found in saved.items()}))


def _samples(
    weight: StoredWeight, place: tuple[int, int], values: Tensor, parts: Mapping[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of a matrix and what they are read back as: spread evenly, the first of them another in each matrix."""
    grain = weight.format.rows or 1
    groups = -(-len(values) // grain)
    start = zlib.crc32(f"{weight.name}:{place[0]}:{place[1]}".encode()) % min(SAMPLED, groups)
    if grain == 1:
        picked = slice(start, None, SAMPLED)
        some = {role: part[picked].contiguous() if weight.parts[role].per == 1 else part for role, part in parts.items()}
        yield values[picked], weight.format.decode(some, 0, weight.columns)
        return
    for group in range(start, groups, SAMPLED):
        rows = slice(group * grain, (group + 1) * grain)
        some = {role: part[rows if weight.parts[role].per == 1 else slice(group, group + 1)] for role, part in parts.items()}
        yield values[rows], weight.format.decode(some, 0, weight.columns)


def _rounded(value: float) -> float:
    """Six digits: further ones depend on the order in which threads add."""
    return float(f"{value:.6g}")


@dataclass
class RoundingErrors:
    """The sums of one output, by shard: those of shards that an earlier call has written are read back."""

    shards: dict[str, Tally] = field(default_factory=dict)

    def of(self, shard: str) -> Tally:
        return self.shards.setdefault(shard, Tally())

    def to_dict(self) -> dict[str, Any]:
        """By kind: how many matrices were requantized, kept and moved, and the relative error of the first."""
        sums: defaultdict[str, _Kind] = defaultdict(_Kind)
        for shard in sorted(self.shards):
            for kind, found in self.shards[shard].kinds.items():
                sums[kind].add(found)
        return {
            kind: {
                "requantized": found.requantized,
                "kept": found.kept,
                "moved": found.moved,
                "signs_changed": found.signed,
                "relative_error": _rounded((found.errors / found.squares) ** 0.5 if found.squares else 0.0),
                "largest_error": found.largest,
            }
            for kind, found in sorted(sums.items())
        }
