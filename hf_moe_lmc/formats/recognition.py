"""Recognises how each weight of a checkpoint is stored: from dtypes, shapes and names, held against what is declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.quantization import Quantization
from hf_moe_lmc.errors import FamilyError, listing
from hf_moe_lmc.formats import shapes
from hf_moe_lmc.formats.names import BYTES, SHAPE, Grouped, Parts, grouped
from hf_moe_lmc.formats.numbers import FLOAT8
from hf_moe_lmc.formats.protocol import CODES, GLOBAL, SCALES, Format, StoredWeight

ADVICE = "Fetch the checkpoint again, whole, with the config.json that these weights came with"


@dataclass(frozen=True)
class Storage:
    """How the weights of a checkpoint are stored.

    Attributes:
        weights: the quantized ones, by the name that each has unquantized.
        cache: scales that belong to no quantized weight: those of keys and values.
    """

    quantization: Quantization
    weights: Mapping[str, StoredWeight]
    cache: tuple[str, ...] = ()
    owner: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def formats(self) -> dict[Format, int]:
        """The formats, and how many elements are stored in each, the most first."""
        counts: dict[Format, int] = {}
        for weight in self.weights.values():
            counts[weight.format] = counts.get(weight.format, 0) + weight.numel
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def kind(self) -> str:
        """The formats in words."""
        return " and ".join(dict.fromkeys(format.kind for format in self.formats))


def recognise_storage(checkpoint: Checkpoint) -> Storage | None:
    """How the weights of a checkpoint are stored; None where all are plain.

    Raises:
        FamilyError: parts are missing, do not fit each other, or are not what config.json declares; all are listed.
    """
    declared = checkpoint.quantization
    if declared is None:
        return None
    found = grouped(checkpoint.tensors)
    weights: dict[str, StoredWeight] = {}
    problems: list[str] = []
    for name, parts in found.weights.items():
        weight, wrong = _weight(name, parts, checkpoint.tensors, declared)
        problems += wrong
        if weight:
            weights[name] = weight
    if problems:
        raise FamilyError(
            f"{checkpoint.name}: quantized weights are not whole, or not as declared ({declared.method}):\n"
            f"{listing(problems)}\n{ADVICE}",
            kind="quantized weights that are not whole",
        )
    return Storage(declared, weights, found.cache, _owners(found, weights))


def _owners(found: Grouped, weights: Mapping[str, StoredWeight]) -> dict[str, str]:
    """The weight that each tensor on disk belongs to, by its name."""
    return {info.name: name for name, weight in weights.items() for info in weight.infos}


def _weight(
    name: str, parts: Parts, tensors: Mapping[str, TensorInfo], declared: Quantization
) -> tuple[StoredWeight | None, list[str]]:
    """One weight, or the problems with its parts."""
    if parts.twice:
        return None, [f"{name}: a part of it is given twice, by {one}" for one in parts.twice]
    if parts.unread:
        return None, [f"{one}: zero points and group indices are not read" for one in parts.unread]
    codes, scales = parts.by_role.get(CODES), parts.by_role.get(SCALES)
    if codes is None:
        return None, [_without_values(name, info, tensors) for info in parts.by_role.values()]
    if scales is None:
        return None, [f"missing: {_scales_name(codes)} (the scales of {codes.name})"]
    if codes.name.endswith("_blocks") and codes.name == f"{name}_blocks":
        return shapes.mxfp4(name, codes, scales, parts, declared)
    if codes.name.endswith("weight_packed"):
        if SHAPE in parts.by_role and codes.dtype == torch.int32:
            return shapes.packed_integers(name, codes, scales, parts, declared)
        if codes.dtype == torch.uint8 and GLOBAL in parts.by_role:
            return shapes.nvfp4(name, codes, scales, parts, declared, divides=True)
        if codes.dtype == torch.uint8:
            return shapes.float4(name, codes, scales, parts, declared)
        return None, [f"missing: {name}_shape (the shape of {codes.name})"]
    if codes.dtype in FLOAT8:
        return shapes.float8(name, codes, scales, parts, declared)
    assert codes.dtype in BYTES
    if GLOBAL in parts.by_role:
        return shapes.nvfp4(name, codes, scales, parts, declared, divides=False)
    if declared.groups and any(group.kind == "int" and group.bits == 8 for group in declared.groups):
        return shapes.whole_integers(name, codes, scales, parts, declared)
    return shapes.float4(name, codes, scales, parts, declared)


def _without_values(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str:
    if name in tensors:
        return f"{info.name}: scales of {name}, which is not quantized ({tensors[name].dtype})"
    values = f"{name}_blocks" if info.name == f"{name}_scales" else name
    return f"missing: {values} (the values to {info.name})"


def _scales_name(codes: TensorInfo) -> str:
    if codes.name.endswith("_blocks"):
        return codes.name.removesuffix("_blocks") + "_scales"
    if codes.name.endswith("_packed"):
        return codes.name.removesuffix("_packed") + "_scale"
    return f"{codes.name}_scale_inv"
