"""All points of a path in one pass over the layers: each layer of both models is read once, whatever the number of points.

The model's own forward runs, paused before every decoder layer. A lane is one batch of windows at one point; while the
weights of a layer stand in their place, interpolated for one point, all lanes of that point pass through the layer, one
after the other. Nothing is known of the architecture but which modules are its decoder layers.

Lanes are greenlets: they share one thread, so that only one runs at a time and the libraries' own threads are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn

from hf_moe_lmc.errors import CheckpointError


@dataclass
class Lane:
    """One batch of windows at one point, on its way through the model.

    Attributes:
        layer: number of the decoder layer that it stands before; None before the first and after the last.
        again: runs only for the sake of others; its result is known.
    """

    point: int
    batch: int
    run: greenlet
    layer: int | None = None
    result: Any = None
    again: bool = False


class Sweep:
    """Runs lanes through a model whose decoder layers are filled one after the other.

    Attributes:
        running: the lane whose forward runs just now, for hooks of observers.

    Args:
        layers: the decoder layers in the order in which the forward calls them.
        forward: batch -> result; called within the lane.
    """

    def __init__(self, layers: Sequence[nn.Module], forward: Callable[[int], Any]) -> None:
        self._layers = layers
        self._forward = forward
        self._lanes: list[Lane] = []
        self.running: Lane | None = None
        self._hooks = [
            layer.register_forward_pre_hook(lambda *_, number=number: self._pause(number))
            for number, layer in enumerate(layers)
        ]

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for lane in self._lanes:
            if lane.run and not lane.run.dead:
                lane.run.throw(GreenletExit)
        self._lanes = []

    def start(self, points: Sequence[int], batches: Sequence[int]) -> list[Lane]:
        """A new lane for each batch at each point, standing before the model."""
        started = [Lane(point, batch, greenlet(self._through)) for point in points for batch in batches]
        self._lanes += started
        return started

    def advance(self, lane: Lane, expected: int | None) -> None:
        """Lets a lane run to the decoder layer `expected`, or with None to its end.

        Raises:
            CheckpointError: the forward takes the layers in another order.
        """
        self.running = lane
        lane.run.switch(lane)
        self.running = None
        found = None if lane.run.dead else lane.layer
        if found != expected:
            raise CheckpointError(
                f"the forward of this model comes to layer {found} where {expected} was expected; it cannot be evaluated "
                "layer by layer, only with all weights in memory (--activation-memory has no effect then)"
            )

    def _through(self, lane: Lane) -> None:
        lane.result = self._forward(lane.batch)

    def _pause(self, number: int) -> None:
        scheduler = getcurrent().parent
        if self.running is not None and scheduler is not None:
            self.running.layer = number
            scheduler.switch()
