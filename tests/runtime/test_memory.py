"""Memory is used again when, and only when, nothing refers to it any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from hf_moe_lmc.runtime import memory
from hf_moe_lmc.runtime.memory import HELD, LEAST, reused


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    gc.collect()
    memory._waiting.clear()
    yield
    memory._waiting.clear()


def test_memory_is_used_again_when_all_views_of_it_are_gone() -> None:
    first = reused(LEAST, torch.float32)
    place, view = first.data_ptr(), first.view(2, -1)[1].t()
    del first
    other = reused(LEAST, torch.float32)
    assert other.data_ptr() != place  # a view still refers to it
    view.fill_(3)
    del view
    again = reused(2 * LEAST - 8, torch.bfloat16)
    assert again.data_ptr() == place and again.dtype == torch.bfloat16 and len(again) == 2 * LEAST - 8


def test_small_tensors_and_other_sizes_are_new_and_few_wait() -> None:
    assert reused(3, torch.float32).shape == (3,) and not memory._waiting
    reused(LEAST, torch.uint8)
    assert len(memory._waiting) == 1
    big = reused(2 * LEAST, torch.uint8)
    assert len(memory._waiting) == 1 and big.numel() == 2 * LEAST
    held = [reused((2 + i) * LEAST, torch.uint8) for i in range(HELD + 3)]
    del held
    assert len(memory._waiting) == HELD
