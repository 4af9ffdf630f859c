"""A merge whose weights were fitted, as a way to make the point between two models."""

from __future__ import annotations

from dataclasses import dataclass

from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.repair.choice import Choice
from hf_moe_lmc.repair.data_free import REPAIRS
from hf_moe_lmc.repair.fitted import Fitted, FittedLayer
from hf_moe_lmc.writing.spans import TensorSource
from hf_moe_lmc.writing.streams import STRAIGHT, Between, MadeLayer, Merging


@dataclass(frozen=True)
class FittedMerging:
    """One point between two models with fitted weights in place of those that it started from.

    Attributes:
        start: what it started from.
        model: A.
    """

    start: Merging
    fitted: Fitted
    model: MoEModel

    def between(self, layer: MoELayer) -> Between:
        started = self.start.between(layer)

        def point(index: int, a: LayerSource, b: LayerSource, t: float, rounded: bool = False) -> MadeLayer:
            return FittedLayer(index, started(index, a, b, t, rounded), self.fitted)

        return point

    def outside(self, start: TensorSource) -> TensorSource:
        return self.fitted.outside_of(self.model, self.start.outside(start))


def merging_of(choice: Choice, model: MoEModel) -> Merging:
    """How a merge with this repair is made: on the straight line where it was not accepted."""
    if not choice.accepted:
        return STRAIGHT
    start = REPAIRS.get(choice.method.start, STRAIGHT)
    return start if choice.fitted is None else FittedMerging(start, choice.fitted, model)
