"""The axis notation: what one tensor on disk holds.

A family maps key templates to one line in the axis notation, `roles: axes`:

    "mlp.gate.weight":                      "router: expert model"
    "mlp.experts.{expert}.up_proj.weight":  "up: unit model"
    "mlp.experts.gate_up_proj":             "gate up: expert (half unit) model"
    "mlp.experts.down_proj":                "down: expert model unit"

Axis words stand in the order of the axes on disk:

    expert   expert of a bank                           rank    width of a layer inside the router
    unit     hidden unit of an expert                   token   entry of the vocabulary
    shared   hidden unit of the shared expert           choice  place among the experts of a token
    model    residual width                             half    counts the roles of a tensor that holds several
    latent   width that the experts read, if another    1       an axis of one entry

Parentheses join axes that are one axis on disk, the slower one first: `(half unit)` is all gate rows and then all up rows,
`(unit half)` is interleaved. `{expert}` in a key stands for the expert's number.

A block has one bank of experts, or several. A role `bank.role` belongs to a further bank, whose experts move among themselves
only; `expert` and `unit` then mean that bank's. `|` joins banks along the experts of one tensor, or along
the numbers in the key:

    "mlp.router.classifier.weight":         "router | zero.router: expert model"
    "mlp.experts.{expert}.up_proj.weight":  "up | vision.up: unit model"

A tensor of the block that no symmetry acts on is `fixed` (`fixed: rank model`; a bare `fixed` may be there or not, in any
shape). Where a name occurs in two orientations, both are listed; shapes that fit both are an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.symmetry.banks import qualified

AXIS_WORDS = ("expert", "unit", "shared", "model", "latent", "rank", "token", "choice", "half", "1")
EXPERT_ROLES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
SHARED_ROLES = tuple(f"shared_{role}" for role in EXPERT_ROLES)
EXPERT_VECTORS = (
    "router",
    "router_bias",
    "correction_bias",  # steers the selection only
    "expert_scale",  # multiplies the output of an expert
)  # whole tensors whose rows move with the experts
WHOLE_ROLES = (
    *EXPERT_VECTORS,
    "expert_table",  # integers that name experts: their values are relabelled
    *SHARED_ROLES,
    "shared_router",  # the scalar gate of a shared expert: no freedom
    "fixed",
)

SHARED = "shared"  # where kinds of hidden units are listed by bank: the shared expert's

ROUTER_KINDS = ("softmax", "sigmoid", "sqrtsoftplus", "sparsemixer")


@dataclass(frozen=True)
class UnitKind:
    """What a hidden unit allows besides changing places: its up row times s, its down column divided by s**power.

    Attributes:
        permutation: whether units may change places at all.
        sign: whether s may be negative; scale: whether |s| may differ from 1.
        offset: the constant added to the up projection before it multiplies; its bias b becomes s (b + offset) - offset.
        words: the same, for people.
    """

    name: str
    words: str
    permutation: bool = True
    sign: bool = False
    scale: bool = False
    power: int = 1
    offset: int = 0

    def allows(self, *, sign: bool, scale: bool) -> bool:
        return (self.sign or not sign) and (self.scale or not scale)


UNIT_KINDS = {
    kind.name: kind
    for kind in (
        UnitKind(
            "swiglu", "the up row of each times s and its down column divided by s, s of either sign", sign=True, scale=True
        ),
        UnitKind(
            "clamped", "the signs of the up row and the down column of each together (the clamp binds the scale)", sign=True
        ),
        UnitKind("plain", "no sign and no scale"),
        UnitKind("shifted", "no sign and no scale (the up projection enters as up + 1)"),
        UnitKind(
            "affine",
            "the up row of each times s, its bias b to s (b + 1) - 1, its down column divided by s, s of either sign",
            sign=True,
            scale=True,
            offset=1,
        ),
        UnitKind("relu", "the up row of each times s > 0 and its down column divided by s", scale=True),
        UnitKind("relu2", "the up row of each times s > 0 and its down column divided by s squared", scale=True, power=2),
        UnitKind("rigid", "hidden units stay where they are", permutation=False),
    )
}


def split_role(role: str) -> tuple[str, str]:
    """The bank (FIRST, which is '', for the first) and the role within it."""
    bank, _, base = role.rpartition(".")
    return bank, base


def is_expert_role(role: str) -> bool:
    """Whether each expert of a bank has one of it."""
    return split_role(role)[1] in EXPERT_ROLES


def bank_size(sizes: Mapping[str, int], bank: str, word: str) -> int:
    """The size of an axis word in a bank; words that the bank does not have for itself are the block's."""
    own = qualified(bank, word)
    return sizes[own] if own in sizes else sizes[word]


@dataclass(frozen=True)
class TensorSpec:
    """One line of the notation, parsed.

    Attributes:
        segments: the roles that it holds, bank by bank along the experts; several in one segment have a `half` axis.
        groups: axis words of each axis on disk, e.g. (("expert",), ("half", "unit"), ("model",)).
    """

    text: str
    segments: tuple[tuple[str, ...], ...]
    groups: tuple[tuple[str, ...], ...]

    @cached_property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for segment in self.segments for role in segment)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """All axis words, slowest first."""
        return tuple(word for group in self.groups for word in group)

    @property
    def is_fixed(self) -> bool:
        return self.roles == ("fixed",)

    @cached_property
    def banks(self) -> tuple[str, ...]:
        """The bank of each segment."""
        return tuple(split_role(segment[0])[0] for segment in self.segments)

    def axis_sizes(self, sizes: Mapping[str, int], segment: int = 0) -> tuple[int, ...]:
        """The size of each of `axes` in one segment."""
        own = {"half": len(self.segments[segment]), "1": 1}
        return tuple(own[word] if word in own else bank_size(sizes, self.banks[segment], word) for word in self.axes)

    def shape(self, sizes: Mapping[str, int], segment: int | None = None) -> tuple[int, ...]:
        """The shape on disk: of one segment, or of all along the experts."""
        segments = range(len(self.segments)) if segment is None else [segment]
        shapes = []
        for number in segments:
            known = dict(zip(self.axes, self.axis_sizes(sizes, number), strict=True))
            shapes.append(tuple(math.prod(known[word] for word in group) for group in self.groups))
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


def parse_spec(text: str) -> TensorSpec:
    """Parses `roles: axes`.

    Raises:
        FamilyError: repeating the text, with what is wrong in it.
    """
    if text.strip() == "fixed":
        return TensorSpec(text, (("fixed",),), ())
    match = re.fullmatch(r"\s*([a-z_. |]+?)\s*:\s*(.+?)\s*", text)
    if match is None:
        raise FamilyError(f"{text!r}: expected 'roles: axes', as in 'up: unit model'")
    segments = tuple(tuple(segment.split()) for segment in match[1].split("|"))
    tokens = re.findall(r"\([^()]*\)|[^\s()]+|[()]", match[2])
    groups = tuple(tuple(token.strip("()").split()) for token in tokens)
    spec = TensorSpec(text, segments, groups)
    words = spec.axes
    if unknown := [role for role in spec.roles if split_role(role)[1] not in (*EXPERT_ROLES, *WHOLE_ROLES)]:
        raise FamilyError(f"{text!r}: unknown role {unknown[0]!r}; expected one of {', '.join((*EXPERT_ROLES, *WHOLE_ROLES))}")
    if unknown := [word for word in words if word not in AXIS_WORDS]:
        raise FamilyError(f"{text!r}: unknown axis word {unknown[0]!r}; expected one of {', '.join(AXIS_WORDS)}")
    if any(not group for group in groups) or (len(set(words)) != len(words) and not spec.is_fixed):
        raise FamilyError(f"{text!r}: an axis is empty or named twice")
    if any(("half" in words) != (len(segment) > 1) for segment in segments):
        raise FamilyError(f"{text!r}: several roles need an axis 'half', and only they do")
    if len({is_expert_role(role) for role in spec.roles}) > 1:
        raise FamilyError(f"{text!r}: roles of single experts and of the whole block cannot share a tensor")
    if "expert" in words and words[0] != "expert" and (len(segments) > 1 or is_expert_role(spec.roles[0])):
        raise FamilyError(f"{text!r}: the expert axis must come first, so that an expert is one range on disk")
    return spec
