"""The accounting of one MoE block: every tensor under it claimed by exactly one rule, every role filled exactly once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_moe_lmc.checkpoint import Checkpoint, TensorInfo
from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.family import (
    EXPERT_ROLES,
    SHARED_ROLES,
    LayerFacts,
    MoEFamily,
    Template,
    TensorSpec,
    bank_size,
    is_expert_role,
    split_role,
)
from hf_moe_lmc.quantisation import FLOAT8, Quantisation


@dataclass(frozen=True)
class Claim:
    """One tensor on disk under a block, and the rule that claims it.

    Attributes:
        template: the rule; spec: what it says of this tensor's axes.
        segment: the bank that the key's number falls into; None where the tensor holds all of its template's.
        expert: number within that bank of the expert that the key names.
        whole: of a part of a quantised weight, what the weight would be; the part's own spec is opaque.
        packed: elements of that part per expert; its axis is `packed`.
    """

    name: str
    template: Template
    spec: TensorSpec
    segment: int | None
    expert: int | None
    whole: TensorSpec | None = None
    packed: int = 0

    @property
    def segments(self) -> Sequence[int]:
        return range(len(self.spec.segments)) if self.segment is None or self.whole else [self.segment]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for segment in self.segments for role in self.spec.segments[segment])

    def axis_sizes(self, sizes: Mapping[str, int], segment: int) -> tuple[int, ...]:
        return self.spec.axis_sizes({**sizes, "packed": self.packed}, segment)

    @property
    def weight(self) -> str:
        """Of a part of a quantised weight, the name that the weight has or would have."""
        ending = next(ending for ending in ("_scale_inv", "_blocks", "_scales") if self.name.endswith(ending))
        return self.name.removesuffix(ending)


@dataclass(frozen=True)
class Block:
    """The tensors under one MoE block, and what is known of it.

    Attributes:
        prefix: what stands before the keys of its layer.
        names: tensor names under the block, by their key below the layer.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    index: int
    prefix: str
    names: Mapping[str, str]
    facts: LayerFacts
    quantisation: Quantisation | None

    @cached_property
    def expected(self) -> dict[str, list[Template]]:
        """The roles that a block with these facts may hold, and the templates that may fill each."""
        found: dict[str, list[Template]] = {}
        for template in self.family.templates:
            for segment, roles in enumerate(template.spec.segments):
                if all(template.spec.axis_sizes(self.facts.sizes, segment)):
                    for role in roles:
                        if self.facts.when.get(role, True) is not False:
                            found.setdefault(role, []).append(template)
        return found

    def experts(self, role: str) -> int:
        return bank_size(self.facts.sizes, split_role(role)[0], "expert")

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[name]


def claim_block(block: Block) -> dict[str, Claim]:
    """Claims every tensor under one MoE block and checks that the block is complete.

    Returns:
        The claims by tensor name, without those of tensors that no symmetry acts on.

    Raises:
        FamilyError: a tensor that no template claims, a role that is missing or filled twice, another shape or dtype.
    """
    claims: dict[str, Claim] = {}
    problems = []
    for key, name in block.names.items():
        claim = _claim(block, key, name)
        if claim is None:
            problems.append(f"{name}: not a tensor of an MoE block of family {block.family.name}")
        else:
            claims[name] = claim
    problems += _role_problems(block, claims)
    for claim in claims.values():
        problems += _tensor_problems(block, claim, claims)
    if problems:
        raise FamilyError(f"{block.checkpoint.name}: layer {block.index} is not a whole MoE block:\n{listing(problems)}")
    return {name: claim for name, claim in claims.items() if not claim.spec.is_fixed}


def _claim(block: Block, key: str, name: str) -> Claim | None:
    """The one rule that claims a key; None if there is none, or more than one."""
    matches = [(template, match) for template in block.family.templates if (match := template.pattern.fullmatch(key))]
    if not matches and block.quantisation:
        return _claim_packed(block, key, name)
    if len(matches) != 1:
        return None
    template, match = matches[0]
    if not template.is_per_expert:
        return Claim(name, template, _orientation(block, template, name, None), None, None)
    segment, expert = _locate(block, template.spec, int(match["expert"]))
    return Claim(name, template, _orientation(block, template, name, segment), segment, expert)


def _locate(block: Block, spec: TensorSpec, number: int) -> tuple[int, int]:
    """The segment that the number in a key falls into, and the expert's number within it."""
    for segment, roles in enumerate(spec.segments[:-1]):
        if number < block.experts(roles[0]):
            return segment, number
        number -= block.experts(roles[0])
    return len(spec.segments) - 1, number


def _orientation(block: Block, template: Template, name: str, segment: int | None) -> TensorSpec:
    """The one of a template's specs that the shape fits, its first if none does; of several, see `_tensor_problems`."""
    found = block.info(name).shape
    return next((spec for spec in template.specs if spec.shape(block.facts.sizes, segment) == found), template.spec)


def _claim_packed(block: Block, key: str, name: str) -> Claim | None:
    """The claim on a part of a quantised weight: the key is that of the weight with an ending."""
    assert block.quantisation is not None
    for ending, role_ending in block.quantisation.suffixes.items():
        weight = _claim(_unquantised(block), key.removesuffix(ending), name) if key.endswith(ending) else None
        if weight is None or len(weight.roles) != len(weight.spec.segments[0]):
            continue
        bank, base = split_role(weight.roles[0])
        if base not in (*EXPERT_ROLES, *SHARED_ROLES):
            continue  # the scales of a router would have to move row by row
        joined = "_".join(split_role(role)[1].removeprefix("shared_") for role in weight.roles)
        shared = "shared_" if base in SHARED_ROLES else ""
        role = (f"{bank}." if bank else "") + shared + joined + role_ending
        fused = is_expert_role(weight.roles[0]) and weight.expert is None
        groups = (("expert",), ("packed",)) if fused else (("packed",),)
        spec = TensorSpec(f"{role}: a part of a quantised weight", ((role,),), groups)
        packed = block.info(name).numel // (block.experts(role) if fused else 1)
        return Claim(name, weight.template, spec, weight.segment, weight.expert, weight.spec, packed)
    return None


def _unquantised(block: Block) -> Block:
    return Block(block.checkpoint, block.family, block.index, block.prefix, block.names, block.facts, None)


def _tensor_problems(block: Block, claim: Claim, claims: Mapping[str, Claim]) -> list[str]:
    """What is wrong with the shape or the dtype of a claimed tensor."""
    if claim.spec.is_fixed:
        return []
    info, sizes = block.info(claim.name), block.facts.sizes
    if claim.whole:
        expected = _packed_shape(block, claim)
        return [] if info.shape == expected else [f"{claim.name}: expected shape {list(expected)}, found {list(info.shape)}"]
    fitting = [spec for spec in claim.template.specs if spec.shape(sizes, claim.segment) == info.shape]
    if not fitting:
        named = ", ".join(f"{word} {size}" for word, size in sizes.items())
        expected_shapes = " or ".join(
            f"{list(spec.shape(sizes, claim.segment))} ({spec.text}; {named} by config.json)" for spec in claim.template.specs
        )
        return [f"{claim.name}: expected shape {expected_shapes}, found {list(info.shape)}"]
    if len(fitting) > 1:
        return [
            f"{claim.name}: shape {list(info.shape)} fits {' and '.join(repr(spec.text) for spec in fitting)}, and nothing "
            "tells which it is; load the model with transformers and save it with save_original_format=False"
        ]
    if split_role(claim.roles[0])[1] == "expert_table":
        return [f"{claim.name}: dtype {info.dtype}, expected integers"] if info.dtype.is_floating_point else []
    if block.quantisation and block.quantisation.method == "fp8" and info.dtype in FLOAT8:
        scales = f"{claim.name}_scale_inv"
        return [] if scales in claims else [f"missing: {scales} (the block scales of {claim.name})"]
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        return [f"{claim.name}: dtype {info.dtype} is quantised, and config.json declares no quantisation; dequantise first"]
    return []


def _packed_shape(block: Block, claim: Claim) -> tuple[int, ...]:
    """The shape on disk of a part of a quantised weight."""
    assert claim.whole is not None and block.quantisation is not None
    shape = claim.whole.shape(block.facts.sizes, claim.segment)
    if block.quantisation.method == "mxfp4":
        sizes = dict(zip(claim.whole.axes, claim.whole.axis_sizes(block.facts.sizes), strict=True))
        shape = tuple(math.prod(sizes[word] for word in group) for group in outputs_first(claim.whole))
    ending = next(ending for ending in block.quantisation.suffixes.values() if claim.roles[0].endswith(ending))
    return block.quantisation.shape(ending, shape)


def outputs_first(spec: TensorSpec) -> tuple[tuple[str, ...], ...]:
    """The axes of an expert's weight with what it computes before what it reads, wherever the spec has them."""
    *leading, one, other = spec.groups
    computes = ("model", "latent") if split_role(spec.roles[0])[1] == "down" else ("unit", "half")
    first, second = (one, other) if set(one) & set(computes) else (other, one)
    return (*leading, first, second)


def _role_problems(block: Block, claims: Mapping[str, Claim]) -> list[str]:
    """Missing roles, roles filled twice, and roles that the configuration excludes."""
    held: dict[tuple[str, int | None], list[str]] = {}
    for claim in claims.values():
        for role in _filled_roles(claim):
            numbers = range(block.experts(role)) if claim.expert is None and is_expert_role(role) else [claim.expert]
            for expert in numbers:
                held.setdefault((role, expert), []).append(claim.name)
    problems = []
    roles_held = {role for role, _ in held}
    for role, templates in block.expected.items():
        if role == "fixed" or (block.facts.when.get(role, True) is None and role not in roles_held):
            continue
        for expert in range(block.experts(role)) if is_expert_role(role) else [None]:
            if (role, expert) not in held:
                likely = [template for template in templates if _fits_layout(template, claims)] or templates
                keys = " or ".join(block.prefix + _key(block, template, role, expert) for template in likely)
                problems.append(f"missing: {keys} ({role})")
    for (role, expert), names in held.items():
        if len(names) > 1 and role != "fixed":
            problems.append(f"{role} is given twice, by {' and '.join(names)}")
        if expert is not None and expert >= block.experts(role):
            problems.append(f"{names[0]}: config.json says {block.experts(role)} experts, numbered from 0")
        if block.facts.when.get(role, True) is False:
            problems.append(f"{names[0]}: by config.json ({block.family.when[role]}), layer {block.index} has no {role}")
    return problems


def _filled_roles(claim: Claim) -> tuple[str, ...]:
    """Roles that a tensor fills; the blocks of a quantised weight stand in for it."""
    if claim.whole is None:
        return claim.roles
    return (*claim.roles, *claim.whole.segments[claim.segment or 0]) if claim.roles[0].endswith("_blocks") else claim.roles


def _key(block: Block, template: Template, role: str, expert: int | None) -> str:
    if expert is None:
        return template.key
    segment = next(i for i, roles in enumerate(template.spec.segments) if role in roles)
    before = sum(block.experts(roles[0]) for roles in template.spec.segments[:segment])
    return template.key.replace("{expert}", str(before + expert))


def _fits_layout(template: Template, claims: Mapping[str, Claim]) -> bool:
    """Whether a template belongs to the layout of what is there (of several, a message names the likely key)."""
    present = [claim.template for claim in claims.values()]
    holds_experts = [one.is_per_expert for one in present if is_expert_role(one.spec.roles[0])]
    same_form = not is_expert_role(template.spec.roles[0]) or template.is_per_expert in holds_experts
    return same_form and template.key.partition(".")[0] in {one.key.partition(".")[0] for one in present}


def check_scales(checkpoint: Checkpoint, quantisation: Quantisation, outside: Sequence[str]) -> None:
    """Raises FamilyError where a quantised tensor outside the MoE blocks lacks its scales."""
    if quantisation.method != "fp8":
        return
    missing = [
        f"{name}_scale_inv"
        for name in outside
        if checkpoint.tensors[name].dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
        and f"{name}_scale_inv" not in checkpoint.tensors
    ]
    if missing:
        raise FamilyError(
            f"{checkpoint.name}: config.json declares fp8, but block scales are missing:\n{listing(missing)}\n"
            "fetch the checkpoint again, whole"
        )
