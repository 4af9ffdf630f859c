"""What config.json, or hf_quant_config.json, declares of quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_moe_lmc.errors import CheckpointError, worded

READ = "FP8, MXFP4, NVFP4 and compressed-tensors' integers"
COMPRESSED = "compressed-tensors"
MODELOPT_METHOD = "modelopt"
# What compressed-tensors calls the formats that are read here.
_COMPRESSED_FORMATS = {
    "float-quantized", "naive-quantized", "int-quantized", "pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized",
    "mixed-precision",
}  # fmt: skip
# What transformers adds to configurations that it did not write itself.
_IMPLIED = {"inkling2": {"quant_method": "fp8", "weight_block_size": [1, 32]}}


@dataclass(frozen=True)
class Group:
    """How a group of weights is declared by compressed-tensors.

    Attributes:
        bits: of a weight.
        kind: `int` or `float`.
        strategy: `tensor`, `channel`, `group` or `block`.
        block: rows and columns that share a scale; 0: all of them.
        format: of this group; empty: that of the whole.
    """

    bits: int
    kind: str
    strategy: str
    block: tuple[int, int]
    format: str


@dataclass(frozen=True)
class Quantization:
    """A declared quantization that is read.

    Attributes:
        method: `fp8`, `mxfp4`, `compressed-tensors` or `modelopt`.
        block: rows and columns that share one scale, of FP8; None: a tensor has one.
        powers: scales of FP8 are powers of 2, in whatever dtype they are stored.
        groups: of compressed-tensors.
        beside: it is declared by hf_quant_config.json alone.
    """

    method: str
    block: tuple[int, int] | None = None
    powers: bool = False
    groups: tuple[Group, ...] = ()
    beside: bool = False


def declared_in(config: Mapping[str, Any]) -> Any:
    """What config.json says, or implies, of quantized weights; nothing that counts as true: nothing."""
    text = config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    if compression := config.get("compression_config") or inner.get("compression_config"):
        return compression
    declared = config.get("quantization_config") or inner.get("quantization_config")
    if "quantization_config" not in config and "transformers_version" not in config:
        declared = declared or _IMPLIED.get(str(config.get("model_type")))
    return declared


def read_quantization(name: str, config: Mapping[str, Any]) -> Quantization | None:
    """What config.json declares: a quantization that is read, or None for plain floats.

    Raises:
        CheckpointError: a quantization that is not read here, with the way out.
    """
    declared = declared_in(config)
    if not declared:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if method == "mxfp4":
        return Quantization("mxfp4")
    if not isinstance(declared, dict):
        raise refused(name, f"quantization_config: quant_method {worded(method)}")
    if method == MODELOPT_METHOD:
        return Quantization(MODELOPT_METHOD)
    if method == COMPRESSED:
        return _compressed(name, declared)
    if method != "fp8":
        raise refused(name, f"quantization_config: quant_method {worded(method)}")
    powers = declared.get("scale_fmt") == "ue8m0"
    block = declared.get("weight_block_size", [128, 128])  # as transformers has it
    if block is None:
        return Quantization("fp8", None, powers)
    if _is_block(block):
        return Quantization("fp8", (block[0], block[1]), powers)
    raise refused(name, f"quantization_config: fp8 with weight_block_size {worded(block)}")


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and 0 < size < 2**31 for size in block)


def _compressed(name: str, declared: Mapping[str, Any]) -> Quantization:
    """The groups that compressed-tensors declares."""
    found = declared.get("config_groups")
    overall = declared.get("format")
    groups = []
    for group in found.values() if isinstance(found, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        own = group.get("format") or overall
        if own not in _COMPRESSED_FORMATS:
            raise refused(name, f"quantization_config: compressed-tensors with format {worded(own)}")
        groups.append(_group(name, weights, str(own)))
    if not groups:
        raise refused(
            name, f"quantization_config: compressed-tensors with format {worded(overall)}, config_groups without weights"
        )
    return Quantization(COMPRESSED, groups=tuple(dict.fromkeys(groups)))


def _group(name: str, weights: Mapping[str, Any], form: str) -> Group:
    bits, kind, strategy = weights.get("num_bits"), str(weights.get("type", "int")), weights.get("strategy")
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = strategy or ("group" if type(size) is int and size > 0 else "tensor" if kind == "float" else "channel")
    if not weights.get("symmetric", True):
        raise refused(name, "quantization_config: compressed-tensors with zero points (symmetric false)")
    if weights.get("actorder") in ("group", "dynamic"):
        raise refused(name, f"quantization_config: compressed-tensors with actorder {worded(weights.get('actorder'))}")
    if strategy == "block" and not _is_block(block):
        raise refused(name, f"quantization_config: compressed-tensors with block_structure {worded(block)}")
    if strategy in ("group", "tensor_group") and not (type(size) is int and 0 < size < 2**31):
        raise refused(name, f"quantization_config: compressed-tensors with group_size {worded(size)}")
    shapes = {"tensor": (0, 0), "channel": (1, 0), "group": (1, size), "tensor_group": (1, size), "block": tuple(block or ())}
    if type(bits) is not int or strategy not in shapes:
        raise refused(name, f"quantization_config: compressed-tensors with {worded(bits)} bits, strategy {worded(strategy)}")
    rows, columns = shapes[strategy]
    return Group(bits, kind, strategy, (rows, columns), form)


def refused(name: str, what: str, where: str = "config.json") -> CheckpointError:
    """The error for a quantization that is not read."""
    verb = "hold" if where == "the shards" else "declares"
    return CheckpointError(
        f"{name}: {where} {verb} quantized weights ({what}); {READ} are read. Use the model that it was quantized from, or "
        "dequantize this one with the tool that made it"
    )
