"""The error that storing weights anew adds, from a sample of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_moe_lmc.checkpoints.header import TensorInfo
from hf_moe_lmc.formats.fp4 import Float4
from hf_moe_lmc.formats.fp8 import Float8
from hf_moe_lmc.formats.protocol import CODES, SCALES, Format, Part, StoredWeight
from hf_moe_lmc.writing.rounding import SAMPLED, RoundingErrors, Tally

ROWS, COLUMNS = 64, 64
FORMATS: dict[str, tuple[Format, torch.dtype, torch.dtype, int, int]] = {  # dtypes of codes and scales, rows of scales, width
    "blocks": (Float8((4, 16)), torch.float8_e4m3fn, torch.float32, 4, COLUMNS // 16),
    "rows": (Float8((1, 0)), torch.float8_e4m3fn, torch.float32, 1, 1),
    "whole": (Float8((0, 0)), torch.float8_e4m3fn, torch.float32, ROWS, 1),
    "groups": (Float4(), torch.uint8, torch.uint8, 1, COLUMNS // 32),
}


def weight(form: str, number: int = 0) -> StoredWeight:
    found, codes, scales, per, width = FORMATS[form]
    name = f"model.layers.0.{number}.weight"
    parts = {
        CODES: Part(TensorInfo(name, "", codes, (ROWS, COLUMNS), 0, 0), 1, ROWS, COLUMNS // (2 if form == "groups" else 1)),
        SCALES: Part(TensorInfo(f"{name}_scale", "", scales, (ROWS // per, width), 0, 0), per, ROWS // per, width),
    }
    return StoredWeight(name, (ROWS, COLUMNS), found, parts, (), (), 1, ROWS, COLUMNS)


def stored(of: StoredWeight, values: Tensor) -> dict[str, Tensor]:
    dtypes = {role: part.info.dtype for role, part in of.parts.items()}
    return of.format.encode(values, dtypes, None if of.format.rows else values.abs().amax())


def error(tally: Tally) -> float:
    errors = RoundingErrors({"one": tally})
    return float(errors.to_dict()["gate"]["relative_error"])


def test_the_sample_stands_for_all_rows() -> None:
    """Rows at the end of a matrix that round worse than those at its beginning count as often as they are there."""
    for form in FORMATS:
        for bad in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)):
            tally, errors, squares = Tally(), 0.0, 0.0
            for number in range(40):
                of = weight(form, number)
                values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(number))
                parts = stored(of, values)
                read = of.format.decode(parts, 0, COLUMNS)
                values[bad] *= 1.5  # as if storing them had gone wrong
                errors, squares = errors + float((read - values).square().sum()), squares + float(values.square().sum())
                tally.measure("gate", of, (0, 0), values, parts)
            assert abs(error(tally) / (errors / squares) ** 0.5 - 1) < 0.05, form
            assert tally.kinds["gate"].squares < squares * 1.3 / SAMPLED, "only a sample is decoded"


def test_sums_come_back_as_they_were_saved() -> None:
    of = weight("blocks")
    values = torch.randn(ROWS, COLUMNS)
    tally = Tally()
    tally.measure("gate", of, (0, 0), values, stored(of, values))
    tally.keep("up", moved=True, sign=False)
    again = Tally.from_dict(tally.to_dict())
    assert again.kinds == tally.kinds and RoundingErrors({"x": again}).to_dict() == RoundingErrors({"x": tally}).to_dict()
    assert RoundingErrors({"x": again, "y": tally}).to_dict()["gate"]["requantized"] == 2
