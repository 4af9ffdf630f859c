"""Whole tensors stored as others are: recognised again, and within the rule's rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.errors import FamilyError
from hf_moe_lmc.formats.decoded import decoded, storage_of
from hf_moe_lmc.formats.encoding import encoded_like, misfit
from tests import tiny
from tests.formats.published import LAYOUTS, numbers


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_stored_as_another_is_keeps_its_layout_and_nearly_its_values(
    quantized: Callable[..., Path], name: str
) -> None:
    folder = quantized(name)
    stored = tiny.tensors(folder)
    with decoded(Checkpoint.open(folder)) as checkpoint:
        storage = storage_of(checkpoint)
        assert storage and storage.weights
        for weight in list(storage.weights.values())[:6]:
            values = checkpoint.read(weight.name).view(weight.shape)
            found = encoded_like(weight, weight.name, values)
            assert found.keys() == {info.name for info in weight.infos}
            for key, tensor in found.items():
                assert (tensor.dtype, tensor.shape) == (stored[key].dtype, stored[key].shape), key
            again = numbers(found)[weight.name].view(weight.shape)
            bound = 0.2 * values.abs().max()
            assert (again - values).abs().max() <= bound
            # the control: scales of other values
            wrong = {
                **found,
                **{
                    part.info.name: encoded_like(weight, weight.name, 4 * values)[part.info.name]
                    for role, part in weight.parts.items()
                    if role != "codes"
                },
            }
            assert (numbers(wrong)[weight.name].view(weight.shape) - values).abs().max() > bound


def test_another_number_of_axes_is_refused(quantized: Callable[..., Path]) -> None:
    with decoded(Checkpoint.open(quantized("qwen3_moe"))) as checkpoint:
        storage = storage_of(checkpoint)
        assert storage
        with pytest.raises(FamilyError, match="has 3 axes; expected 2"):
            encoded_like(next(iter(storage.weights.values())), "experts", torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "columns", "reason"),
    [("int4", 48, "48 columns, which are no whole groups of 32"), ("nvfp4, packed", 40, "groups of 16"), ("qwen3_moe", 41, "")],
)
def test_sizes_that_a_format_cannot_store_are_told(
    quantized: Callable[..., Path], name: str, columns: int, reason: str
) -> None:
    with decoded(Checkpoint.open(quantized(name))) as checkpoint:
        storage = storage_of(checkpoint)
        assert storage
        weight = next(iter(storage.weights.values()))
        found = misfit(weight, (weight.rows, columns))
        assert found.endswith(reason) and bool(found) == bool(reason)
        assert misfit(weight, weight.shape) == "" and "3 axes in place of 2" in misfit(weight, (4, *weight.shape))
        assert reason or encoded_like(weight, "w", torch.ones(weight.rows, columns))
