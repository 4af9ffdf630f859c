"""Memory is used again when, and only when, nothing refers to it any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from hf_moe_lmc.runtime import memory
from hf_moe_lmc.runtime.memory import LEAST, reused


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
    again = reused((2, LEAST - 4), torch.bfloat16)
    assert again.data_ptr() == place and again.dtype == torch.bfloat16 and again.shape == (2, LEAST - 4)


@pytest.mark.parametrize(
    ("nbytes", "again"),
    [(5 * LEAST, True), (4 * LEAST, True), (4 * LEAST - 1, False), (5 * LEAST + 1, False), (LEAST - 1, False)],
)
def test_a_buffer_serves_tensors_of_at_least_four_fifths_of_its_size(nbytes: int, again: bool) -> None:
    place = reused(5 * LEAST, torch.uint8).data_ptr()
    assert len(memory._waiting) == 1
    tensor = reused(nbytes, torch.uint8)
    assert (tensor.data_ptr() == place) == again and len(memory._waiting) == 1 - again


def test_the_buffer_that_was_used_last_is_used_first() -> None:
    first, last = reused(LEAST, torch.uint8), reused(LEAST, torch.uint8)
    place = last.data_ptr()
    del first
    del last
    assert reused(LEAST, torch.uint8).data_ptr() == place


def test_other_devices_have_allocators_of_their_own() -> None:
    assert reused((4, LEAST), torch.float32, torch.device("meta")).shape == (4, LEAST)
    assert not memory._waiting


def test_few_large_buffers_or_more_small_ones_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WAITING", 3)
    for limit, kept in ((0, 3), (5 * LEAST, 5), (100 * LEAST, 8)):
        memory._waiting.clear()
        monkeypatch.setattr(memory, "WAITING_BYTES", limit)
        held = [reused(LEAST, torch.uint8) for _ in range(8)]
        places = [one.data_ptr() for one in held]
        while held:
            del held[0]
        assert [one.ctypes.data for one in memory._waiting] == places[-kept:]


def test_threads_never_share_memory() -> None:
    def work(number: int) -> bool:
        for _ in range(20):
            mine = reused((64, LEAST // 256), torch.float32)
            mine.fill_(number)
            if not bool((mine == number).all()):
                return False
            del mine
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))
    assert 1 <= len(memory._waiting) <= 8  # and all of it came back: no more than threads had at once
