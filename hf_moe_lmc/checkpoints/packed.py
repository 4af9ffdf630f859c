"""Whether weights are quantized: the tensors decide, whatever config.json declares."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.quantization import MODELOPT_METHOD, Quantization, declared_in, read_quantization, refused
from hf_moe_lmc.checkpoints.untrusted import read_json_object
from hf_moe_lmc.errors import FamilyError, listing, worded
from hf_moe_lmc.runtime.notices import warn

MODELOPT = "hf_quant_config.json"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_MODELOPT_READ = ("FP8", "NVFP4", "MIXED_PRECISION", "FP8_PB_WO", "FP8_PB_REAL", "FP8_PER_CHANNEL_PER_TOKEN")
DECLARATIONS = ("quantization_config", "compression_config")
# Names of codes, by who packs weights so. Scales that stand beside a weight tell of codes as well.
_METHODS = {
    "GPTQ or AWQ": re.compile(r".*\.(?:qweight|qzeros|g_idx)"),
    "bitsandbytes": re.compile(r".*(?:\.(?:SCB|absmax|nested_absmax|quant_map|nested_quant_map)|\.quant_state\..*)"),
    "compressed-tensors": re.compile(r".*weight_(?:packed|zero_point|global_scale)"),
    "AQLM": re.compile(r".*\.(?:codes|codebooks)"),
    "HQQ": re.compile(r".*\.W_q"),
    "quanto": re.compile(r".*\.weight\._(?:data|scale|shift)"),
    "torchao": re.compile(r".*[._:]qdata"),
}
_SCALES = re.compile(r".*(?:weight_scale(?:_inv|_2)?|_scale_inv|\.qscale_weight)")
_WHOLE_NUMBERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_MASK = re.compile(r"(?:.*\.)?(?:bias|masked_bias|position_ids|.*mask|tid2eid)")


@dataclass(frozen=True)
class Packing:
    """What is known of the weights' quantization.

    Attributes:
        quantization: one that is read; None: the weights are plain.
        dropped: keys of config.json that declare one although no weight is quantized.
    """

    quantization: Quantization | None
    dropped: tuple[str, ...] = ()


def read_packing(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    described: Callable[[], Path] | None = None,
) -> Packing:
    """Whether weights are quantized, and how.

    Args:
        described: the path of hf_quant_config.json, where there is one.

    Raises:
        CheckpointError: quantized by a method that is not read here, with the way out.
        FamilyError: quantized, and nothing declares it.
    """
    codes = [one for one, info in tensors.items() if is_packed(info)]
    declared = declared_in(config)
    if codes and declared:
        return Packing(read_quantization(name, config))
    if codes:
        return Packing(_declared_beside(name, codes, tensors, described))
    stated = tuple(key for key in DECLARATIONS if _states(config, key))
    if stated:
        warn(
            f"{name}: config.json declares quantized weights ({', '.join(stated)}), but no tensor is quantized: they are read "
            "as they are, and an output's configuration leaves the entry out"
        )
    return Packing(None, stated)


def is_packed(info: TensorInfo) -> bool:
    """Whether a tensor holds codes that stand for weights, or the scales of such codes."""
    name, dtype = info.name, info.dtype
    if dtype in (*FLOAT8, torch.float8_e8m0fnu) or _SCALES.fullmatch(name):
        return True
    if any(pattern.fullmatch(name) for pattern in _METHODS.values()):
        return True
    if dtype in (torch.int8, torch.uint8) and len(info.shape) > 1:
        return _MASK.fullmatch(name) is None
    return dtype in _WHOLE_NUMBERS and len(info.shape) > 1 and name.endswith(".weight")


def _states(config: Mapping[str, Any], key: str) -> bool:
    text = config.get("text_config")
    return bool(config.get(key)) or (isinstance(text, Mapping) and bool(text.get(key)))


def _declared_beside(
    name: str, codes: list[str], tensors: Mapping[str, TensorInfo], described: Callable[[], Path] | None
) -> Quantization:
    """What ModelOpt declares beside a config.json that says nothing; raises where it does not either."""
    if described:
        found = read_json_object(described(), f"{name}/{MODELOPT}").get("quantization")
        algorithm = found.get("quant_algo") if isinstance(found, Mapping) else None
        if algorithm in _MODELOPT_READ:
            return Quantization(MODELOPT_METHOD, beside=True)
        raise refused(name, f"{MODELOPT}: ModelOpt, quant_algo {worded(algorithm)}", MODELOPT)
    for method, pattern in _METHODS.items():
        if matching := [one for one in codes if pattern.fullmatch(one)]:
            raise refused(name, f"{method}: {matching[0]} and {len(codes) - 1} more tensors", "the shards")
    lines = [f"{one} ({str(tensors[one].dtype).removeprefix('torch.')})" for one in codes]
    raise undeclared(name, lines)


def undeclared(name: str, lines: list[str]) -> FamilyError:
    """The error for quantized weights that nothing declares."""
    return FamilyError(
        f"{name}: config.json declares no quantization, but these are quantized:\n{listing(lines)}\n"
        "Restore quantization_config from the config.json that these weights came with, or dequantize them"
    )
