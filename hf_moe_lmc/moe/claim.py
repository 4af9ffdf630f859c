"""The accounting of one MoE block: every tensor under it claimed by exactly one rule, every role filled exactly once."""

from __future__ import annotations

from collections.abc import Mapping

from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.moe.block import Block, Claim
from hf_moe_lmc.moe.family import Template
from hf_moe_lmc.moe.notation import (
    TensorSpec,
    is_expert_role,
    split_role,
)


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
        problems += _tensor_problems(block, claim)
    problems += _uneven(block, claims) + _fixed_problems(block, claims)
    if problems:
        raise FamilyError(
            f"{block.checkpoint.name}: layer {block.index} is not a whole MoE block:\n{listing(problems)}\n"
            "Fetch the checkpoint again, whole, with the config.json that these weights came with",
            kind="layers that are not whole MoE blocks",
        )
    return {name: claim for name, claim in claims.items() if not claim.spec.is_fixed}


def _claim(block: Block, key: str, name: str) -> Claim | None:
    """The one rule that claims a key; None if there is none, or more than one."""
    matches = [(template, match) for template in block.family.templates if (match := template.pattern.fullmatch(key))]
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
    """That of a template's specs which the shape fits, its first if none does; for several, see `_tensor_problems`."""
    info = block.info(name)
    fitting = [spec for spec in template.specs if spec.shape(block.config.sizes, segment) == info.shape]
    return fitting[0] if fitting else template.spec


def _tensor_problems(block: Block, claim: Claim) -> list[str]:
    """What is wrong with the shape or the dtype of a claimed tensor."""
    info, sizes = block.info(claim.name), block.config.sizes
    if claim.spec.is_fixed:
        return []
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
    if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        return [f"{claim.name}: dtype {info.dtype}, expected floats of 16 bits or more"]
    return []


def _fixed_problems(block: Block, claims: Mapping[str, Claim]) -> list[str]:
    """Tensors that no symmetry acts on but that belong to the block: missing, in excess, or of another shape."""
    held = {claim.template.key: claim for claim in claims.values() if claim.spec.is_fixed}
    problems = []
    for template in [template for template in block.family.templates if template.spec.is_fixed and template.spec.groups]:
        name, wanted = block.prefix + template.key, block.config.when.get(template.key, True)
        shape = template.spec.shape(block.config.sizes)
        if template.key not in held and wanted:
            problems.append(f"missing: {name} (fixed)")
        elif template.key in held and wanted is False:
            problems.append(
                f"{name}: by config.json ({block.family.when[template.key]}), layer {block.index} has no such tensor"
            )
        elif template.key in held and block.info(held[template.key].name).shape != shape:
            held_shape = list(block.info(held[template.key].name).shape)
            problems.append(f"{name}: expected shape {list(shape)} ({template.spec.text}), found {held_shape}")
    return problems


def _uneven(block: Block, claims: Mapping[str, Claim]) -> list[str]:
    """Experts in another dtype or shape than the first expert: their tensors cannot take each other's places."""
    storage = storage_of(block.checkpoint)
    weights = storage.weights if storage else {}
    first: dict[str, Claim] = {}
    problems = []
    for claim in [claim for claim in claims.values() if claim.expert is not None]:
        like = first.setdefault(claim.roles[0], claim)
        info, expected = block.info(claim.name), block.info(like.name)
        # what is quantized is compared where bytes move
        plain = claim.name not in weights and like.name not in weights
        if info.shape != expected.shape or (plain and info.dtype != expected.dtype):
            problems.append(
                f"{claim.name}: {list(info.shape)} of {info.dtype}, but {like.name} is {list(expected.shape)} of "
                f"{expected.dtype}; they cannot change places. Bring all experts to one dtype first"
            )
    return problems


def _role_problems(block: Block, claims: Mapping[str, Claim]) -> list[str]:
    """Missing roles, roles filled twice, and roles that the configuration excludes."""
    held: dict[tuple[str, int | None], list[str]] = {}
    for claim in claims.values():
        for role in claim.roles:
            numbers = range(block.experts(role)) if claim.expert is None and is_expert_role(role) else [claim.expert]
            for expert in numbers:
                held.setdefault((role, expert), []).append(claim.name)
    problems = []
    roles_held = {role for role, _ in held}
    for role, templates in block.expected.items():
        if role == "fixed" or (block.config.when.get(role, True) is None and role not in roles_held):
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
        if block.config.when.get(role, True) is False:
            problems.append(f"{names[0]}: by config.json ({block.family.when[role]}), layer {block.index} has no {role}")
    return problems


def _key(block: Block, template: Template, role: str, expert: int | None) -> str:
    if expert is None:
        return template.key
    segment = next(i for i, roles in enumerate(template.spec.segments) if role in roles)
    before = sum(block.experts(roles[0]) for roles in template.spec.segments[:segment])
    return template.key.replace("{expert}", str(before + expert))


def _fits_layout(template: Template, claims: Mapping[str, Claim]) -> bool:
    """Whether a template belongs to the layout of what is there (of several, a message names the likely key)."""
    present = [claim.template for claim in claims.values()]
    per_expert = [other.is_per_expert for other in present if is_expert_role(other.spec.roles[0])]
    same_form = not is_expert_role(template.spec.roles[0]) or template.is_per_expert in per_expert
    return same_form and template.key.partition(".")[0] in {other.key.partition(".")[0] for other in present}
