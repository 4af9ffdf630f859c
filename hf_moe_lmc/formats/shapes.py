"""Whether the parts of a weight fit each other and what is declared, for each format: the weight, or what is wrong."""

from __future__ import annotations

import math

import torch

from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.checkpoints.quantization import COMPRESSED, MODELOPT_METHOD, Quantization
from hf_moe_lmc.formats.blocks import block_count
from hf_moe_lmc.formats.fp4 import GROUP as GROUP_OF_FP4
from hf_moe_lmc.formats.fp4 import Float4
from hf_moe_lmc.formats.fp8 import EXPONENTS, Float8
from hf_moe_lmc.formats.integers import WORD, Integers
from hf_moe_lmc.formats.names import BYTES, SHAPE, Parts
from hf_moe_lmc.formats.numbers import FLOAT8
from hf_moe_lmc.formats.nvfp4 import GROUP as GROUP_OF_NVFP4
from hf_moe_lmc.formats.nvfp4 import NvFloat4
from hf_moe_lmc.formats.protocol import CODES, GLOBAL, SCALES, Format, Part, StoredWeight

Found = tuple[StoredWeight | None, list[str]]
WHOLE = (0, 0)


def float8(name: str, codes: TensorInfo, scales: TensorInfo, parts: Parts, declared: Quantization) -> Found:
    """FP8 by blocks, by rows, or with one scale."""
    if declared.method == "mxfp4" or not _has_group(declared, "float", 8):
        return None, [_undeclared(codes, declared)]
    if problem := _dtype_problem(scales):
        return None, [problem]
    if len(codes.shape) > 3:
        return None, [f"{codes.name}: shape {list(codes.shape)}, expected a matrix or a stack of them"]
    stack, (rows, columns) = _stack(codes.shape), codes.shape[-2:]
    own = scales.shape
    if len(codes.shape) == 3:
        if own[:1] != (stack,):
            return None, [f"{scales.name}: shape {list(own)}, expected one for each of the {stack} experts"]
        own = own[1:]
    blocks = _blocks_of_float8(declared)
    fitting = [found for block in blocks if (found := _fit(own, rows, columns, block))]
    if not fitting:
        cut = " or ".join([_cut(block) for block in blocks if block != WHOLE] or [_cut(WHOLE)])
        return None, [f"{scales.name}: {list(own)} scales do not fit a weight {[rows, columns]} in {cut}"]
    split, block = fitting[0]
    powers = scales.dtype in EXPONENTS or (declared.powers and block not in (WHOLE, (1, 0)))
    height = rows // split
    made = {CODES: Part(codes, 1, height, columns), SCALES: _scales_part(scales, height, columns, block)}
    return _stored(name, codes.shape, Float8(block, powers), made, parts, stack * split, height, columns), []


def _blocks_of_float8(declared: Quantization) -> list[tuple[int, int]]:
    """The blocks that FP8 may have by what is declared."""
    if declared.method == COMPRESSED:
        return [*dict.fromkeys(group.block for group in declared.groups if (group.kind, group.bits) == ("float", 8)), WHOLE]
    if declared.method == MODELOPT_METHOD:
        return [WHOLE, (1, 0), (128, 128)]
    return [declared.block, WHOLE] if declared.block else [WHOLE, (1, 0)]  # a single block is a block, too


def _fit(own: tuple[int, ...], rows: int, columns: int, block: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
    """How many matrices stand one below the other, such that scales of this shape fit each in such blocks."""
    count = math.prod(own)
    if block == WHOLE:
        if count == 1:
            return 1, WHOLE
        return (2, WHOLE) if count == 2 and rows % 2 == 0 and rows > 2 and own[0] == 2 else None
    if block == (1, 0):
        return (1, block) if own in ((rows,), (rows, 1)) else None
    for split in (1, 2):
        grid = split * block_count(rows // split, block[0]), block_count(columns, block[1])
        if rows % split == 0 and own == grid:
            return split, block
    return None


def _scales_part(scales: TensorInfo, rows: int, columns: int, block: tuple[int, int]) -> Part:
    per = block[0] or rows
    return Part(scales, per, block_count(rows, per), block_count(columns, block[1] or columns))


def _cut(block: tuple[int, int]) -> str:
    return {WHOLE: "one piece", (1, 0): "rows"}.get(block, f"blocks of {list(block)}")


def mxfp4(name: str, codes: TensorInfo, scales: TensorInfo, parts: Parts, declared: Quantization) -> Found:
    """`X_blocks` [..., outputs, inputs / 32, 16] and `X_scales` in place of X, which transformers has with inputs first."""
    if declared.method != "mxfp4":
        return None, [_undeclared(codes, declared)]
    shape, half = codes.shape, GROUP_OF_FP4 // 2
    if codes.dtype not in BYTES or len(shape) not in (3, 4) or shape[-1] != half:
        return None, [
            f"{codes.name}: {list(shape)} of {codes.dtype}, expected bytes [..., outputs, inputs / {GROUP_OF_FP4}, {half}]"
        ]
    if scales.dtype not in EXPONENTS or scales.shape != shape[:-1]:
        return None, [
            f"{scales.name}: {list(scales.shape)} of {scales.dtype}, expected exponents in uint8 {list(shape[:-1])} for "
            f"{codes.name}"
        ]
    rows, columns = shape[-3], shape[-2] * GROUP_OF_FP4
    found = {CODES: Part(codes, 1, rows, columns // 2), SCALES: Part(scales, 1, rows, shape[-2])}
    whole = (*shape[:-3], columns, rows)
    return _stored(name, whole, Float4(), found, parts, math.prod(shape[:-3]), rows, columns, transposed=True), []


def float4(name: str, codes: TensorInfo, scales: TensorInfo, parts: Parts, declared: Quantization) -> Found:
    """Bytes [..., rows, columns / 2] with two FP4 values and E8M0 scales for each 32: DeepSeek-V4, compressed-tensors."""
    if declared.method == "mxfp4" or not _has_group(declared, "float", 4):
        return None, [_undeclared(codes, declared)]
    rows, columns = codes.shape[-2], 2 * codes.shape[-1]
    wanted = (*codes.shape[:-1], columns // GROUP_OF_FP4)
    if scales.dtype not in (*EXPONENTS, torch.float32) or scales.shape != wanted or columns % GROUP_OF_FP4:
        return None, [
            f"{scales.name}: {list(scales.shape)} of {scales.dtype}, expected exponents {list(wanted)}: {codes.name} "
            f"would hold two FP4 values a byte, {GROUP_OF_FP4} to a scale"
        ]
    found = {CODES: Part(codes, 1, rows, columns // 2), SCALES: Part(scales, 1, rows, columns // GROUP_OF_FP4)}
    whole = (*codes.shape[:-1], columns)
    return _stored(name, whole, Float4("FP4 in groups of 32"), found, parts, _stack(codes.shape), rows, columns), []


def nvfp4(name: str, codes: TensorInfo, scales: TensorInfo, parts: Parts, declared: Quantization, *, divides: bool) -> Found:
    """Bytes with two FP4 values, FP8 scales for each 16, and a number above these."""
    above = parts.by_role[GLOBAL]
    if declared.method == "mxfp4" or divides != (declared.method == COMPRESSED) or not _has_group(declared, "float", 4):
        return None, [_undeclared(codes, declared)]
    stack, rows, columns = _stack(codes.shape), codes.shape[-2], 2 * codes.shape[-1]
    wanted = (*codes.shape[:-1], columns // GROUP_OF_NVFP4)
    if scales.dtype not in FLOAT8 or scales.shape != wanted or columns % GROUP_OF_NVFP4:
        return None, [f"{scales.name}: {list(scales.shape)} of {scales.dtype}, expected FP8 scales {list(wanted)}"]
    if math.prod(above.shape) != stack or above.dtype != torch.float32:
        return None, [f"{above.name}: {list(above.shape)} of {above.dtype}, expected {stack} in float32"]
    found = {
        CODES: Part(codes, 1, rows, columns // 2),
        SCALES: Part(scales, 1, rows, columns // GROUP_OF_NVFP4),
        GLOBAL: Part(above, rows, 1, 1),
    }
    whole = (*codes.shape[:-1], columns)
    return _stored(name, whole, NvFloat4(divides), found, parts, stack, rows, columns), []


def packed_integers(name: str, codes: TensorInfo, scales: TensorInfo, parts: Parts, declared: Quantization) -> Found:
    """`weight_packed` [rows, words], `weight_scale` [rows, groups] and `weight_shape`, which says the shape again."""
    integers = [group for group in declared.groups if group.kind == "int" and group.bits in (4, 8)]
    if not integers:
        return None, [_undeclared(codes, declared)]
    if len(codes.shape) != 2:
        return None, [f"{codes.name}: shape {list(codes.shape)}, expected [rows, words]"]
    if problem := _dtype_problem(scales, exponents=False):
        return None, [problem]
    rows, words = codes.shape
    for group in integers:
        columns = _columns(words, scales.shape, WORD // group.bits, group.block[1])
        if columns and scales.shape == (rows, block_count(columns, group.block[1] or columns)):
            found = {
                CODES: Part(codes, 1, rows, words),
                SCALES: Part(scales, 1, rows, scales.shape[1]),
            }
            form = Integers(group.bits, group.block[1])
            return _stored(name, (rows, columns), form, found, parts, 1, rows, columns), []
    cut = " or ".join(f"INT{group.bits} in groups of {group.block[1] or 'a row'}" for group in integers)
    return None, [f"{scales.name}: {list(scales.shape)} scales do not fit {codes.name} {list(codes.shape)} in {cut}"]


def _columns(words: int, scales: tuple[int, ...], per_word: int, group: int) -> int | None:
    """Columns of packed codes: groups are whole, or there is one, and words are full."""
    whole = words * per_word
    if not group:
        return whole
    columns = scales[-1] * group
    return columns if block_count(columns, per_word) == words else whole


def whole_integers(name: str, codes: TensorInfo, scales: TensorInfo, parts: Parts, declared: Quantization) -> Found:
    """INT8, one number a byte: compressed-tensors' int-quantized."""
    if problem := _dtype_problem(scales, exponents=False):
        return None, [problem]
    rows, columns = codes.shape[-2:]
    for group in [group for group in declared.groups if (group.kind, group.bits) == ("int", 8)]:
        if len(codes.shape) == 2 and scales.shape in ((rows, block_count(columns, group.block[1] or columns)),):
            found = {CODES: Part(codes, 1, rows, columns), SCALES: Part(scales, 1, rows, scales.shape[1])}
            form = Integers(8, group.block[1], packed=False)
            return _stored(name, codes.shape, form, found, parts, 1, rows, columns), []
    return None, [f"{scales.name}: {list(scales.shape)} scales do not fit {codes.name} {list(codes.shape)}"]


def _dtype_problem(scales: TensorInfo, *, exponents: bool = True) -> str | None:
    fine = scales.dtype.is_floating_point and scales.dtype.itemsize > 1
    if fine or (exponents and scales.dtype in EXPONENTS):
        return None
    return f"{scales.name}: dtype {scales.dtype}, expected floats{', or exponents in uint8' if exponents else ''}"


def _has_group(declared: Quantization, kind: str, bits: int) -> bool:
    """Whether compressed-tensors declares such weights; others declare no more than a method."""
    return declared.method != COMPRESSED or any((group.kind, group.bits) == (kind, bits) for group in declared.groups)


def _undeclared(codes: TensorInfo, declared: Quantization) -> str:
    what = ", ".join(dict.fromkeys(group.format for group in declared.groups)) or declared.method
    return f"{codes.name}: dtype {codes.dtype} is quantized in another way than config.json declares ({what})"


def _stack(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-2])


def _stored(
    name: str,
    shape: tuple[int, ...],
    form: Format,
    found: dict[str, Part],
    parts: Parts,
    matrices: int,
    rows: int,
    columns: int,
    *,
    transposed: bool = False,
) -> StoredWeight:
    beside = tuple(info for role, info in parts.by_role.items() if role == SHAPE)
    activations = tuple(parts.activations)
    return StoredWeight(name, tuple(shape), form, found, beside, activations, matrices, rows, columns, transposed)
