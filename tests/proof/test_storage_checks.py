"""The self-test of a quantized model checks the format of its weights, and finds what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hf_moe_lmc import selftest
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.formats.fp8 import Float8
from hf_moe_lmc.proof import storage_checks as proof
from hf_moe_lmc.proof.verdict import StorageProof

CASES = [
    "one scale per tensor", "blocks cut short", "fused, halves", "gpt_oss", "int4", "int8", "fp8, rows", "mxfp4, packed",
    "nvfp4, modelopt", "inkling2",
]  # fmt: skip
ORDER = {"expert order: values", "expert order: outputs"}
ALWAYS = {
    "quantized weights are recognised again",
    "everything at once with --format bf16: values",
    "merge at t = 0: bytes of A",
    "merge at t = 0.5: decoded, interpolated in float32, stored again",
}


def storage(folder: Path) -> StorageProof:
    found = selftest(folder).storage
    assert found is not None
    return found


def failed(found: StorageProof) -> set[str]:
    return {check.name for check in found.checks if not check.passed}


@pytest.mark.parametrize("name", CASES)
def test_each_format_carries_the_symmetry(quantized: Callable[..., Path], name: str) -> None:
    found = storage(quantized(name))
    names = {check.name for check in found.checks}
    assert found.passed and not found.not_covered
    assert names >= ALWAYS | ORDER
    assert [check.name for check in found.checks if check.control] == ["experts moved, scales left"]
    assert all(check.difference == 0 for check in found.checks if check.name.endswith(("values", "bytes of A")))
    assert ("signs: values" in names) == (name != "gpt_oss"), "experts of gpt-oss have no signs to change"


def test_a_sign_that_is_not_written_is_found(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Float8, "negated", lambda self, codes, sign: codes)
    found = storage(quantized("one scale per tensor"))
    assert failed(found) == {"signs: values"}, "the function is the same with and without them"


def test_a_merge_at_another_t_is_found(quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right: Callable[[Tensor, Tensor, float], Tensor] = proof.interpolate
    monkeypatch.setattr(proof, "interpolate", lambda a, b, t: right(a, b, t + 0.01))
    found = storage(quantized("one scale per tensor"))
    assert failed(found) == {"merge at t = 0.5: decoded, interpolated in float32, stored again"}
    assert not found.passed


def test_a_format_that_cannot_be_tried_is_said_to_be_untested(
    quantized: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise FamilyError("no such sizes")

    monkeypatch.setattr(proof, "stored_miniature", none)
    found = selftest(quantized("one scale per tensor"))
    assert found.storage is not None and found.storage.passed is None
    first, *_, heading, why = found.table().splitlines()
    assert first.endswith("passed for plain weights, not tested for the format that these have")
    assert heading == "in the format of its weights, FP8 with one scale a tensor: NOT TESTED"
    assert why == "  not covered: no small model can be stored as this one is: no such sizes"


def test_plain_weights_have_no_format_to_test(saved: Callable[..., Path]) -> None:
    found = selftest(saved("mixtral", "per-expert", 0))
    assert found.storage is None and "storage" not in found.to_dict()
