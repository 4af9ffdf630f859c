"""Every format, code by code, against its specification; and against the decoders of others where these are right."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hf_moe_lmc.formats.fp4 import Float4
from hf_moe_lmc.formats.fp8 import Float8
from hf_moe_lmc.formats.integers import Integers
from hf_moe_lmc.formats.numbers import (
    from_exponents,
    from_float4,
    from_float8,
    power_above,
    power_below,
    to_exponents,
    to_float4,
    to_float8,
)
from hf_moe_lmc.formats.nvfp4 import NvFloat4
from hf_moe_lmc.formats.protocol import CODES, GLOBAL, SCALES, Format
from tests.formats import reference
from tests.formats.reference import Stored

Parts = dict[str, Tensor]


def test_every_code_of_fp8_fp4_and_e8m0() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(from_float8(codes.view(torch.float8_e4m3fn)).numpy(), reference.E4M3, equal_nan=True)
    five = codes.view(torch.float8_e5m2)
    assert torch.equal(from_float8(five).nan_to_num(), five.float().nan_to_num())
    pairs = from_float4(codes[:, None])
    assert pairs.tolist() == [[reference.E2M1[code & 15], reference.E2M1[code >> 4]] for code in range(256)]
    powers = from_exponents(codes)
    assert powers[:255].tolist() == [2.0 ** (code - 127) for code in range(255)] and math.isnan(powers[255])
    assert torch.equal(to_exponents(powers), codes)


def test_rounding_is_to_the_nearest_and_ties_go_to_even_codes() -> None:
    middles = [(a + b) / 2 for table in (reference.E4M3[:127], reference.E2M1[:8]) for a, b in itertools.pairwise(table)]
    near = [np.nextafter(np.float32(one), np.float32(side), dtype=np.float32) for one in middles for side in (0, 1e9)]
    values = torch.tensor([*middles, *near, 0.0, 6.5, 500.0, 1e9])
    values = torch.cat([values, -values, torch.randn(2000) * 4])
    values = values[: len(values) // 2 * 2]
    eight = reference.nearest(values.numpy(), reference.E4M3, 128)
    assert np.array_equal(to_float8(values, torch.float8_e4m3fn).view(torch.uint8).numpy(), eight)
    four = to_float4(values[None])[0].numpy()
    assert np.array_equal(np.stack([four & 15, four >> 4], 1).flatten(), reference.nearest(values.numpy(), reference.E2M1, 8))
    assert to_float8(torch.tensor([math.nan]), torch.float8_e4m3fn).float().isnan().all()


def test_powers_are_exact_at_their_ends() -> None:
    powers = torch.tensor([2.0**i for i in range(-126, 127)])
    above = torch.tensor(np.nextafter(powers.numpy(), np.float32(np.inf), dtype=np.float32))
    assert torch.equal(power_above(powers), powers) and torch.equal(power_above(above), powers * 2)
    assert torch.equal(power_below(powers), powers) and torch.equal(power_below(above), powers)


@dataclass(frozen=True)
class Case:
    """A format, the dtypes of its parts, and the reference for it."""

    format: Format
    dtypes: dict[str, torch.dtype]
    read: Callable[[Stored, int], np.ndarray]
    write: Callable[[np.ndarray, Stored], Stored]


def fp8(block: tuple[int, int], dtype: torch.dtype, *, powers: bool = False) -> Case:
    def whole(shape: tuple[int, ...]) -> tuple[int, int]:
        return block[0] or shape[0], block[1] or shape[1]

    return Case(
        Float8(block, powers),
        {CODES: torch.float8_e4m3fn, SCALES: dtype},
        lambda one, columns: reference.read_fp8(one, whole(one.codes.shape)),
        lambda values, like: reference.write_fp8(values, like, whole(values.shape), powers=powers),
    )


def fp4(codes: torch.dtype, dtype: torch.dtype) -> Case:
    return Case(
        Float4(),
        {CODES: codes, SCALES: dtype},
        lambda one, _: reference.read_fp4(one),
        lambda v, like: reference.write_fp4(v, like),
    )


def nvfp4(*, divides: bool) -> Case:
    return Case(
        NvFloat4(divides),
        {CODES: torch.uint8, SCALES: torch.float8_e4m3fn, GLOBAL: torch.float32},
        lambda one, _: reference.read_nvfp4(one, divides=divides),
        lambda values, like: reference.write_nvfp4(values, like, divides=divides),
    )


def integers(bits: int, group: int, dtype: torch.dtype, *, packed: bool = True) -> Case:
    return Case(
        Integers(bits, group, packed),
        {CODES: torch.int32 if packed else torch.int8, SCALES: dtype},
        lambda one, columns: reference.read_integers(one, bits, columns, group),
        lambda values, like: reference.write_integers(values, like, bits, group),
    )


CASES = {
    "FP8, blocks, float32": fp8((128, 128), torch.float32),
    "FP8, small blocks, bfloat16": fp8((16, 16), torch.bfloat16),
    "FP8, powers in float32": fp8((128, 128), torch.float32, powers=True),
    "FP8, powers in E8M0": fp8((128, 128), torch.float8_e8m0fnu, powers=True),
    "FP8, 32 of a row, exponents": fp8((1, 32), torch.uint8, powers=True),
    "FP8, rows": fp8((1, 0), torch.float32),
    "FP8, rows, bfloat16": fp8((1, 0), torch.bfloat16),
    "FP8, one scale": fp8((0, 0), torch.float32),
    "MXFP4": fp4(torch.uint8, torch.uint8),
    "FP4 of DeepSeek-V4": fp4(torch.int8, torch.float8_e8m0fnu),
    "NVFP4, multiplied": nvfp4(divides=False),
    "NVFP4, divided": nvfp4(divides=True),
    "INT4": integers(4, 32, torch.bfloat16),
    "INT4, float32, rows": integers(4, 0, torch.float32),
    "INT8": integers(8, 32, torch.bfloat16),
    "INT8, rows": integers(8, 0, torch.float32, packed=False),
}
SHAPES = [(192, 320), (130, 96), (1, 32)]


def matrix(shape: tuple[int, int], seed: int) -> Tensor:
    """Numbers of many sizes, some rows and groups of zeros, some numbers far from the rest."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    values *= torch.logspace(-3, 3, shape[1])
    values[:, :32] = 0 if seed % 2 else values[:, :32]
    values[0, 0], values[-1, -1] = 7.5, -448.0
    return values


def parts_of(one: Stored) -> Parts:
    found = {CODES: one.codes, SCALES: one.scales, GLOBAL: one.above}
    return {role: tensor for role, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CASES)
def test_a_format_is_what_its_specification_says(name: str, shape: tuple[int, int]) -> None:
    case, values = CASES[name], matrix(shape, len(name))
    largest = values.abs().amax() if case.format.rows == 0 else None
    found = case.format.encode(values, case.dtypes, largest)
    like = Stored(found[CODES], found[SCALES], found.get(GLOBAL))
    expected = case.write(values.numpy(), like)
    for role, part in parts_of(expected).items():
        assert part.dtype == found[role].dtype == case.dtypes[role]
        assert torch.equal(part.view(torch.uint8), found[role].view(part.shape).view(torch.uint8)), role
    read = case.format.decode(found, 0, shape[1])
    assert np.array_equal(read.numpy(), case.read(expected, shape[1]))
    assert float((read - values).norm() / values.norm()) < 0.2  # the control: a format holds its values
    # any rows of it are decoded as in the whole
    if case.format.rows and shape[0] > 1:
        for first, count in ((1, 1), (shape[0] // 2, shape[0] // 3), (shape[0] - 1, 1)):
            start = first // case.format.rows
            end = -(-(first + count) // case.format.rows)
            some = {CODES: found[CODES][first : first + count], SCALES: found[SCALES][start:end]}
            assert torch.equal(case.format.decode(some, first % case.format.rows, shape[1]), read[first : first + count])


@pytest.mark.parametrize("name", CASES)
def test_signs_change_in_the_codes_alone(name: str) -> None:
    case, values = CASES[name], matrix((64, 96), 0)
    largest = values.abs().amax() if case.format.rows == 0 else None
    found = case.format.encode(values, case.dtypes, largest)
    sign = torch.randint(2, (64, 96)) * 2.0 - 1
    if not case.format.negatable(found[CODES]):
        assert isinstance(case.format, Integers)
        found[CODES] = case.format.encode(values.clamp(-0.001, 0.001), case.dtypes, None)[CODES]
        found[CODES] = case.format._pack(case.format._unpacked(found[CODES], 96).clamp(min=case.format.lowest + 1))
        assert case.format.negatable(found[CODES])
    before = case.format.decode(found, 0, 96)
    for signs in (sign, sign[:, :1], sign[:1]):
        flipped = {**found, CODES: case.format.negated(found[CODES], signs.expand(64, 96))}
        assert flipped[CODES].dtype == found[CODES].dtype
        assert torch.equal(case.format.decode(flipped, 0, 96), before * signs)


def test_integers_with_the_lowest_code_have_no_negative() -> None:
    for bits, packed in ((4, True), (8, True), (8, False)):
        form = Integers(bits, 32, packed)
        codes = torch.zeros(2, 32)
        assert form.negatable(form._pack(codes))
        codes[1, 5] = form.lowest
        assert not form.negatable(form._pack(codes))


def test_transformers_decodes_whole_blocks_and_mxfp4_to_the_same_numbers() -> None:
    own = Fp8Dequantize(None)
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    for block, dtype, powers in (((128, 128), torch.float32, False), ((1, 32), torch.uint8, True)):
        form = Float8(block, powers)
        parts = form.encode(weight, {CODES: torch.float8_e4m3fn, SCALES: dtype}, None)
        expected = own._dequantize_one(parts[CODES], parts[SCALES], torch.float32)
        assert torch.equal(form.decode(parts, 0, 384), expected)
    parts = Float4().encode(weight, {CODES: torch.uint8, SCALES: torch.uint8}, None)
    stacked = convert_moe_packed_tensors(parts[CODES].unflatten(-1, (-1, 16))[None], parts[SCALES][None], dtype=torch.float32)
    assert torch.equal(Float4().decode(parts, 0, 384), stacked[0].T)


def test_compressed_tensors_has_the_same_integers_and_scales() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    for bits, columns in ((4, 96), (8, 96), (4, 100)):
        weight = torch.randn(16, columns)
        parts = Integers(bits, 0).encode(weight, {CODES: torch.int32, SCALES: torch.float32}, None)
        found = helpers.unpack_from_int32(parts[CODES], bits, torch.Size([16, columns]))
        assert torch.equal(Integers(bits, 0).decode(parts, 0, columns), found.float() * parts[SCALES])
        arguments = quantization.QuantizationArgs(num_bits=bits, strategy="channel")
        scales, _ = utils.calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), arguments)
        assert torch.equal(scales, parts[SCALES])


def test_compressed_tensors_has_the_same_nvfp4() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    weight = torch.randn(16, 64)
    parts = NvFloat4(True).encode(
        weight, {CODES: torch.uint8, SCALES: torch.float8_e4m3fn, GLOBAL: torch.float32}, weight.abs().amax()
    )
    found = helpers.unpack_fp4_from_uint8(parts[CODES], 16, 64, dtype=torch.float32)
    expected = found.view(16, -1, 16) * (parts[SCALES].float() / parts[GLOBAL]).unsqueeze(2)
    assert torch.equal(NvFloat4(True).decode(parts, 0, 64), expected.view(16, 64))
