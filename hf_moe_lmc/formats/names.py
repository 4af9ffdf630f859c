"""Which tensor is what part of which quantized weight, by its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.formats.numbers import FLOAT8
from hf_moe_lmc.formats.protocol import CODES, GLOBAL, SCALES

SHAPE, ACTIVATION, UNREAD = "shape", "activation", "unread"
BYTES = (torch.int8, torch.uint8)
# Name of a part -> name of its weight, and its role. Values under a name of their own come first.
_VALUES = (
    (re.compile(r"(.+)_blocks"), r"\1"),  # MXFP4
    (re.compile(r"(.+)\.weight_packed"), r"\1.weight"),  # compressed-tensors
)
_BESIDE = (
    (re.compile(r"(.+)_scale_inv"), r"\1", SCALES),
    (re.compile(r"(.+)_scales"), r"\1", SCALES),  # MXFP4
    (re.compile(r"(.+)\.scale"), r"\1.weight", SCALES),  # DeepSeek-V4
    (re.compile(r"(.+)\.qscale_weight"), r"\1.weight", SCALES),  # Mistral Large 4
    (re.compile(r"(.+weight)_scale"), r"\1", SCALES),  # compressed-tensors, ModelOpt, vLLM, Inkling 2
    (re.compile(r"(.+weight)_(?:scale_2|global_scale)"), r"\1", GLOBAL),
    (re.compile(r"(.+weight)_shape"), r"\1", SHAPE),
    (re.compile(r"(.+weight)_(?:zero_point|g_idx)"), r"\1", UNREAD),
    (re.compile(r"(.+)\.(?:activation_scale|input_scale|input_global_scale|qscale_act)"), r"\1.weight", ACTIVATION),
    (re.compile(r"(.+)_activation_scale"), r"\1", ACTIVATION),
)
# Scales of keys and values, which belong to no weight.
_CACHE = re.compile(r"(?:.+\.)?(?:[kvq]_scale|kv_scale|prob_(?:output_)?scale|[kvq]_proj\.output_scale)")
# Names that say that a tensor is a part, whatever stands beside it.
_PLAIN_SPEECH = re.compile(r".+(?:_scale_inv|weight_scale|\.qscale_weight|weight_scale_2|weight_global_scale|weight_shape)")


@dataclass
class Parts:
    """The tensors that by their names make up one weight.

    Attributes:
        by_role: CODES, SCALES, GLOBAL, SHAPE.
        activations: scales of what goes into it.
        unread: parts that no format here has.
        twice: names that claim a role that another fills.
    """

    by_role: dict[str, TensorInfo] = field(default_factory=dict)
    activations: list[TensorInfo] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def put(self, role: str, info: TensorInfo) -> None:
        if role == ACTIVATION:
            self.activations.append(info)
        elif role == UNREAD:
            self.unread.append(info.name)
        elif role in self.by_role:
            self.twice.append(f"{self.by_role[role].name} and {info.name}")
        else:
            self.by_role[role] = info


@dataclass(frozen=True)
class Grouped:
    """The tensors of a checkpoint by what they are.

    Attributes:
        weights: parts by the name of their weight.
        cache: scales of keys and values, and of what goes into weights that are not quantized.
    """

    weights: Mapping[str, Parts]
    cache: tuple[str, ...]


def grouped(tensors: Mapping[str, TensorInfo]) -> Grouped:
    """Sorts tensors by the weights that they are parts of; plain ones are in none."""
    weights: dict[str, Parts] = {}
    cache = []
    for name, info in tensors.items():
        if weight := _values_of(name, tensors):
            weights.setdefault(weight, Parts()).put(CODES, info)
    for name, info in tensors.items():
        if _CACHE.fullmatch(name):
            cache.append(name)
        elif not _values_of(name, tensors) and (found := _beside(name, tensors, weights)):
            weight, role = found
            if role == ACTIVATION and weight not in weights:
                cache.append(name)
            else:
                weights.setdefault(weight, Parts()).put(role, info)
    return Grouped(weights, tuple(cache))


def _values_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The weight whose codes a tensor holds; None if it holds none."""
    info = tensors[name]
    for pattern, weight in _VALUES:
        if not info.dtype.is_floating_point and (match := pattern.fullmatch(name)):
            return match.expand(weight)
    if any(pattern.fullmatch(name) for pattern, _, role in _BESIDE if role != SHAPE):
        return None
    if info.dtype in FLOAT8 and len(info.shape) > 1:
        return name
    return name if info.dtype in BYTES and len(info.shape) > 1 and _has_scales(name, tensors) else None


def _has_scales(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    stem = name.removesuffix(".weight")
    names = (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight")
    return name.endswith(".weight") or any(one in tensors for one in names)


def _beside(name: str, tensors: Mapping[str, TensorInfo], weights: Mapping[str, Parts]) -> tuple[str, str] | None:
    """The weight that a tensor stands beside, and its role; None where it is a tensor of its own."""
    for pattern, replacement, role in _BESIDE:
        if match := pattern.fullmatch(name):
            weight = match.expand(replacement)
            if weight in weights or _PLAIN_SPEECH.fullmatch(name) or role == ACTIVATION:
                return weight, role
            if role == SCALES and name.endswith("_scales") and not tensors[name].dtype.is_floating_point:
                return weight, role
    return None
