"""The paused forward by itself, on modules that are no language model."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.path.sweep import Lane, Sweep


class Recorder(nn.Module):
    """A layer that notes who passes."""

    def __init__(self, number: int, seen: list[tuple[int, int]]) -> None:
        super().__init__()
        self.number, self.seen = number, seen

    def forward(self, state: Tensor, batch: int) -> Tensor:
        self.seen.append((self.number, batch))
        return state * 2 + self.number


@pytest.fixture
def seen() -> list[tuple[int, int]]:
    return []


@pytest.fixture
def layers(seen: list[tuple[int, int]]) -> list[Recorder]:
    return [Recorder(number, seen) for number in range(3)]


def forward_of(layers: list[Recorder]) -> Callable[[int], Tensor]:
    def forward(batch: int) -> Tensor:
        state = torch.tensor(float(batch))
        for layer in layers:
            state = layer(state, batch)
        return state

    return forward


def paused() -> int:
    gc.collect()
    return sum(type(found) is greenlet and bool(found) and found.parent is not None for found in gc.get_objects())


def test_all_lanes_pass_a_layer_before_any_comes_to_the_next(layers: list[Recorder], seen: list[tuple[int, int]]) -> None:
    with Sweep(layers, forward_of(layers)) as sweep:
        lanes = sweep.start([0, 1], [0, 1])
        assert [(lane.point, lane.batch) for lane in lanes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for stage in (0, 1, 2, None):
            for lane in lanes:
                sweep.advance(lane, stage)
                assert sweep.running is None
            assert {lane.layer for lane in lanes} == {2 if stage is None else stage}
        assert [lane.result.item() for lane in lanes] == [4.0, 12.0] * 2
    assert seen == [(layer, batch) for layer in range(3) for batch in (0, 1, 0, 1)]
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_without_layers_a_lane_runs_to_its_end(layers: list[Recorder]) -> None:
    with Sweep([], forward_of(layers)) as sweep:
        (lane,) = sweep.start([0], [1])
        sweep.advance(lane, None)
        assert lane.result.item() == 12


def test_hooks_know_whose_forward_runs(layers: list[Recorder]) -> None:
    found: list[Lane | None] = []
    with Sweep(layers, forward_of(layers)) as sweep:
        handle = layers[1].register_forward_hook(lambda *_: found.append(sweep.running))
        lanes = sweep.start([0, 1], [0])
        for stage in (0, 1, 2, None):
            for lane in reversed(lanes):
                sweep.advance(lane, stage)
        handle.remove()
    assert found == lanes[::-1]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 2, 1), "layer 2 where 1 was"),
        ((0, 1), "layer None where 2 was"),
        ((0, 0, 1, 2), "layer 0 where 1 was"),
        ((0, 1, 2, 2), "layer 2 where None was"),
    ],
)
def test_other_orders_are_refused(layers: list[Recorder], order: tuple[int, ...], message: str) -> None:
    before = paused()
    with pytest.raises(CheckpointError, match=message), Sweep(layers, forward_of([layers[i] for i in order])) as sweep:
        lanes = sweep.start([0, 1], [0, 1])
        for stage in (0, 1, 2, None):
            for lane in lanes:
                sweep.advance(lane, stage)
    assert paused() == before
    assert layers[0](torch.tensor(1.0), 0).item() == 2  # nothing pauses it any more


def test_leaving_early_ends_every_forward(layers: list[Recorder]) -> None:
    ended: list[int] = []

    def forward(batch: int) -> Any:
        try:
            return forward_of(layers)(batch)
        finally:
            ended.append(batch)

    before = paused()
    with Sweep(layers, forward) as sweep:
        lanes = sweep.start([0], [0, 1, 2])
        for lane in lanes[:2]:
            sweep.advance(lane, 0)
    assert ended == [0, 1] and paused() == before
    assert all(lane.run.dead or not lane.run for lane in lanes)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_what_a_lane_raises_comes_out(layers: list[Recorder], error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    before = paused()
    handle = layers[1].register_forward_hook(fail)
    with pytest.raises(type(error)), Sweep(layers, forward_of(layers)) as sweep:
        lanes = sweep.start([0, 1], [0, 1])
        for stage in (0, 1, 2):
            for lane in lanes:
                sweep.advance(lane, stage)
    handle.remove()
    assert paused() == before
