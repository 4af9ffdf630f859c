"""Stores whole tensors as other, quantized ones are stored: under the same kinds of names, in the same shapes and dtypes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.formats.fp4 import GROUP as GROUP_OF_FLOAT4
from hf_moe_lmc.formats.fp4 import Float4
from hf_moe_lmc.formats.integers import WORD, Integers
from hf_moe_lmc.formats.nvfp4 import GROUP as GROUP_OF_NVFP4
from hf_moe_lmc.formats.nvfp4 import NvFloat4
from hf_moe_lmc.formats.protocol import CODES, Format, StoredWeight


def misfit(like: StoredWeight, shape: tuple[int, ...]) -> str:
    """Why a weight of this shape cannot be stored as `like` is; empty: it can."""
    if len(shape) != len(like.shape):
        return f"{len(shape)} axes in place of {len(like.shape)}"
    rows, columns = shape[-2:][::-1] if like.transposed else shape[-2:]
    group, split = grain(like.format), like.matrices // math.prod(like.shape[:-2])
    if columns % group:
        return f"{columns} columns, which are no whole groups of {group}"
    return f"{rows} rows, which are not {split} matrices" if rows % split else ""


def grain(form: Format) -> int:
    """What the columns of a weight are a multiple of in a format.

    Example:
        >>> from hf_moe_lmc.formats.fp8 import Float8
        >>> grain(Float4()), grain(Integers(4, 0)), grain(Float8((128, 128)))
        (32, 8, 1)
    """
    match form:
        case Float4():
            return GROUP_OF_FLOAT4
        case NvFloat4():
            return GROUP_OF_NVFP4
        case Integers():
            return math.lcm(form.group or 1, WORD // form.bits if form.packed else 1)
        case _:
            return 1


def encoded_like(like: StoredWeight, name: str, values: Tensor) -> dict[str, Tensor]:
    """The tensors on disk of a weight, stored as `like` is.

    Args:
        like: a weight with as many axes, of any size.
        name: of the weight; its parts are named after it as those of `like` are after theirs.
        values: float32, in the shape that the weight has unquantized.

    Returns:
        Tensors by name. Scales of activations are ones, which fit whatever goes in.

    Raises:
        FamilyError: the axes of the weight are not those of `like`.
    """
    if values.ndim != len(like.shape):
        raise FamilyError(f"{name} has {values.ndim} axes; expected {len(like.shape)}, as {like.name} has them")
    per_expert = like.matrices // math.prod(like.shape[:-2])
    stored = values.transpose(-1, -2) if like.transposed else values
    matrices = stored.reshape(-1, stored.shape[-2] // per_expert, stored.shape[-1]).float().contiguous()
    dtypes = {role: part.info.dtype for role, part in like.parts.items()}
    made = [like.format.encode(one, dtypes, None if like.format.rows else one.abs().amax()) for one in matrices]
    result = {}
    for role, part in like.parts.items():
        found = torch.stack([one[role] for one in made])  # [matrices, rows, width]
        result[_renamed(like, name, part.info.name)] = _shaped(found, part.info.shape, values.shape[:-2], role)
    for info in like.beside:
        result[_renamed(like, name, info.name)] = torch.tensor(values.shape, dtype=info.dtype)
    for info in like.activations:
        shape = values.shape[:1] if info.numel > 1 else info.shape
        result[_renamed(like, name, info.name)] = torch.ones(shape).to(info.dtype)
    return result


def _shaped(found: Tensor, like: tuple[int, ...], experts: tuple[int, ...], role: str) -> Tensor:
    """Rows [matrices, rows, width] of a part with as many axes as a part `like` has."""
    if len(like) < 2:
        return found.reshape(like if math.prod(like) == 1 else (-1,))
    if len(like) == 2 and not experts:
        return found.flatten(0, 1)
    whole = found.reshape(*experts, -1, found.shape[-1])
    if role == CODES and len(like) == len(experts) + 3:  # a row lies in groups
        return whole.unflatten(-1, (-1, like[-1]))
    return whole.reshape(*experts, -1) if len(like) == len(experts) + 1 else whole


def _renamed(like: StoredWeight, name: str, part: str) -> str:
    """The name that a part of `like` would have if `like` were called `name`."""
    for ending in ("", ".weight"):
        stem = like.name.removesuffix(ending)
        if part.startswith(stem):
            return name.removesuffix(ending) + part.removeprefix(stem)
    raise FamilyError(f"{part} is not named after {like.name}")
