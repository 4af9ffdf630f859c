"""Parts of quantized weights: codes and scales, and what they belong to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.packed import undeclared
from hf_moe_lmc.checkpoints.quantization import (
    FLOAT8,
    FP4_BLOCK,
    Quantization,
    scale_grid,
)
from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.moe.block import Block, Claim, Part
from hf_moe_lmc.moe.notation import (
    TensorSpec,
    is_expert_role,
    parse_spec,
    split_role,
)
from hf_moe_lmc.symmetry.banks import qualified

QUANTIZED = ("gate", "up", "down")  # weights of an expert, the shared one included, whose parts move along


def claim_part(block: Block, weight: Claim, name: str, ending: str) -> Claim | None:
    """The claim on a part of a quantized weight, given the claim that is or would be the weight's."""
    roles = weight.roles
    if len(roles) != len(weight.spec.segments[0]):
        return None
    bank, base = split_role(roles[0])
    fused = is_expert_role(roles[0]) and weight.expert is None
    common = ending == "_activation_scales" and fused and block.info(name).numel == 1  # one for all experts
    if base in ("fixed", "shared_router") or is_quantized_router(block, weight) or common:
        return Claim(name, weight.template, parse_spec("fixed"), weight.segment, weight.expert)
    if base.removeprefix("shared_") not in QUANTIZED:
        return None
    if fused and weight.spec.groups[0] != ("expert",):
        return None  # the experts share a matrix, and so may the blocks of two experts
    joined = "_".join(split_role(role)[1].removeprefix("shared_") for role in roles)
    role = qualified(bank, ("shared_" if base.startswith("shared_") else "") + joined + ending)
    spec = TensorSpec(
        f"{role}: a part of a quantized weight", ((role,),), (("expert",), ("packed",)) if fused else (("packed",),)
    )
    numel = block.info(name).numel // (block.experts(role) if fused else 1)
    return Claim(name, weight.template, spec, weight.segment, weight.expert, Part(weight.name, ending, weight.spec, numel))


def is_quantized_router(block: Block, claim: Claim) -> bool:
    info = block.checkpoint.tensors.get(claim.name)
    return split_role(claim.roles[0])[1] == "router" and info is not None and info.dtype in FLOAT8


def part_problems(block: Block, claim: Claim, part: Part) -> list[str]:
    """What is wrong with a part of a quantized weight: with its shape or dtype, or with what belongs to it."""
    assert block.quantization is not None
    info, tensors = block.info(claim.name), block.checkpoint.tensors
    own = info.shape
    if is_expert_role(claim.roles[0]) and claim.expert is None:
        experts = block.experts(claim.roles[0])
        if own[:1] != (experts,):
            return [f"{claim.name}: shape {list(own)}, expected one for each of the {experts} experts"]
        own = own[1:]
    if part.ending == "_activation_scales":
        return []
    shape = matrix_shape(claim, block.config.sizes, block.quantization)
    if part.ending == "_blocks":
        last = (shape[1] // 2,) if block.quantization.method == "fp8" else (shape[1] // FP4_BLOCK, FP4_BLOCK // 2)
        if own != (shape[0], *last) or shape[1] % FP4_BLOCK or info.dtype not in (torch.int8, torch.uint8):
            return [
                f"{claim.name}: {list(own)} of {info.dtype} an expert, expected bytes [{shape[0]}, {', '.join(map(str, last))}]"
            ]
        scales = block.quantization.scales_of(part.weight)
        return [] if has_any(block.checkpoint, scales) else [f"missing: {scales[0]} (the scales of {claim.name})"]
    values = f"{part.weight}_blocks" if block.quantization.method == "mxfp4" else part.weight
    if values not in tensors:
        return [f"missing: {values} (the values to {claim.name})"]
    dtype = tensors[values].dtype
    if dtype not in (*FLOAT8, torch.int8, torch.uint8):
        return [f"{claim.name}: scales of {values}, which is not quantized ({dtype})"]
    if not info.dtype.is_floating_point and info.dtype != torch.uint8:
        return [f"{claim.name}: dtype {info.dtype}, expected floats, or exponents in uint8"]
    size = block.quantization.block_of(dtype)
    if scale_grid(own, shape, size, stacked(claim, block.quantization)) is None:
        cut = f"blocks of {list(size)}" if size else "one piece"
        return [f"{claim.name}: {list(own)} scales an expert do not fit a weight {list(shape)} in {cut}"]
    return []


def matrix_axes(claim: Claim, quantization: Quantization) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axis words of the rows and of the columns of one expert of the weight that `claim` holds a part of."""
    assert claim.part is not None
    rows, columns = (group for group in claim.part.spec.groups if group != ("expert",))
    computes = ("model", "latent") if split_role(claim.weight_roles[0])[1].endswith("down") else ("unit", "shared")
    if quantization.method == "mxfp4" and not set(rows) & set(computes):
        return columns, rows
    return rows, columns


def matrix_shape(claim: Claim, sizes: Mapping[str, int], quantization: Quantization) -> tuple[int, int]:
    """Rows and columns of one expert of the weight that `claim` holds a part of."""
    assert claim.part is not None
    spec = claim.part.spec
    known = dict(zip(spec.axes, spec.axis_sizes(sizes, claim.segment or 0), strict=True))
    rows, columns = (math.prod(known[word] for word in group) for group in matrix_axes(claim, quantization))
    return rows, columns


def stacked(claim: Claim, quantization: Quantization) -> int:
    """How many weights stand one below the other in the rows of `matrix_shape`."""
    return len(claim.weight_roles) if matrix_axes(claim, quantization)[0][0] == "half" else 1


def check_declared(checkpoint: Checkpoint, quantization: Quantization | None, names: Iterable[str]) -> None:
    """Raises FamilyError where weights are quantized and no quantization is declared."""
    found = [name for name in names if is_quantized(name, checkpoint.tensors[name].dtype)]
    if found and quantization is None:
        raise undeclared(checkpoint.name, found)


def check_scales(checkpoint: Checkpoint, quantization: Quantization | None, outside: Sequence[str]) -> None:
    """Raises FamilyError where tensors outside the MoE blocks lack scales, or a declaration and the tensors do not agree."""
    if quantization is None:
        check_declared(checkpoint, quantization, outside)
        return
    quantized = [name for name in outside if is_quantized(name, checkpoint.tensors[name].dtype)]
    scales = {name: quantization.scales_of(name.removesuffix("_blocks")) for name in quantized}
    missing = [
        f"missing: {names[0]} (the scales of {name})" for name, names in scales.items() if not has_any(checkpoint, names)
    ]
    if missing:
        raise FamilyError(f"{checkpoint.name}: scales are missing; fetch the checkpoint again, whole:\n{listing(missing)}")


def has_any(checkpoint: Checkpoint, names: Sequence[str]) -> bool:
    return any(name in checkpoint.tensors for name in names)


def is_quantized(name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor holds codes that need scales."""
    packed = (torch.int8, ".weight"), (torch.uint8, "_blocks")
    return dtype in FLOAT8 or any(dtype == stored and name.endswith(ending) for stored, ending in packed)
