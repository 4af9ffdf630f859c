"""A checkpoint as a model: its family, its MoE layers as views, and the tensors outside of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.mtp import has_own_prefix, uncounted
from hf_moe_lmc.errors import SymmetryError, listing
from hf_moe_lmc.formats.decoded import storage_of
from hf_moe_lmc.formats.recognition import Storage
from hf_moe_lmc.moe.action import ActedLayer, AwaitedLayer, Elements
from hf_moe_lmc.moe.family import MoEFamily
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.ties import Tied, bound_orders, in_words, is_trivial
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry

_EXPERTS_ANYWHERE = re.compile(r"(?P<prefix>.*?[^.]+)\.\d+\.(?:[^.]+\.)*experts\.(?:\d+\.)?[^.]*(?:w[123]|fc[123]|_proj)")


@dataclass(frozen=True)
class MoEModel:
    """A checkpoint whose every tensor has been accounted for, from headers alone.

    Attributes:
        config: as AutoConfig reads it, the whole of a composite one.
        num_layers: layers of all stacks of the text model.
        groups: number of expert groups that bind (1: none).
        top_k: experts per token.
        layers: the MoE layers by number, multi-token-prediction layers included: those have numbers from num_layers on.
        towers: what stands before `layers.` (or what the family has in its place), by stack.
    """

    checkpoint: Checkpoint
    family: MoEFamily
    config: PreTrainedConfig
    num_layers: int
    groups: int
    top_k: int
    layers: Mapping[int, MoELayer]
    towers: tuple[str, ...]

    @cached_property
    def layer_of(self) -> dict[str, MoELayer]:
        """The MoE layer that claims a tensor, by tensor name; names outside the MoE blocks are absent."""
        return {name: layer for layer in self.layers.values() for name in layer.claims}

    @cached_property
    def outside(self) -> tuple[str, ...]:
        """Names of the tensors outside the MoE blocks."""
        return tuple(name for name in self.checkpoint.tensors if name not in self.layer_of)

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.config.get_text_config()

    @property
    def storage(self) -> Storage | None:
        """How its quantized weights are stored; None where all are plain."""
        return storage_of(self.checkpoint)

    def on(self, checkpoint: Checkpoint) -> MoEModel:
        """The same model, read from another checkpoint that holds the same tensors."""
        if checkpoint is self.checkpoint:
            return self
        layers = {index: replace(layer, checkpoint=checkpoint) for index, layer in self.layers.items()}
        return replace(self, checkpoint=checkpoint, layers=layers)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the axis words in the first MoE layer; in nearly all models, of every one."""
        return next(iter(self.layers.values())).sizes

    @cached_property
    def extra_layers(self) -> tuple[int, ...]:
        """The multi-token-prediction layers that are present and have experts."""
        return tuple(index for index in self.layers if index >= self.num_layers)

    @cached_property
    def experts_outside(self) -> tuple[str, ...]:
        """Prefixes under which experts stand that are not of the text model's layers: those of other towers."""
        matches = (_EXPERTS_ANYWHERE.match(name) for name in self.outside)
        return tuple(dict.fromkeys(match["prefix"] for match in matches if match))

    def is_extra(self, name: str) -> bool:
        """Whether a tensor belongs to multi-token prediction: to one of its layers, or to what they share."""
        if has_own_prefix(name):
            return True
        if len(self.towers) > 1:
            return False
        match = self.family.stacks[0].pattern(self.towers[0]).fullmatch(name)
        return match is not None and int(match["layer"]) >= self.num_layers

    def without_extra(self) -> dict[str, Any]:
        """Changes of the configuration that go with leaving out multi-token prediction."""
        counts = self.family.mtp_counts
        stated = uncounted(self.checkpoint.config, counts)
        defaults = [key for key in counts if getattr(self.text_config, key, None)]
        return stated or dict.fromkeys(defaults[:1], 0)

    def identity(self) -> ModelSymmetry:
        """The identity of this model's group."""
        return ModelSymmetry(self.family.name, self.groups, {index: layer.identity() for index, layer in self.layers.items()})

    def random(self, generator: torch.Generator, *, scale: float = 1.0) -> ModelSymmetry:
        """A random element of this model's group; `scale`: see LayerSymmetry.random."""
        layers = {index: layer.random(generator, groups=self.groups, scale=scale) for index, layer in self.layers.items()}
        return ModelSymmetry(self.family.name, self.groups, layers)

    def check_symmetry(self, symmetry: ModelSymmetry) -> None:
        """Raises SymmetryError unless `symmetry` acts on this model; either may lack layers for multi-token prediction."""
        where = self.checkpoint.name
        if symmetry.family != self.family.name:
            raise SymmetryError(f"the symmetry is of family {symmetry.family}, {where} is of family {self.family.name}")
        expected = self.identity()
        problems = [
            f"layer {index}: {'absent from the model' if index not in expected.layers else 'absent from the symmetry'}"
            for index in sorted(symmetry.layers.keys() ^ expected.layers.keys())
            if index < self.num_layers
        ]
        problems += [
            f"layer {index}: expected {expected.layers[index].sizes}, found {layer.sizes}"
            for index, layer in symmetry.layers.items()
            if index in expected.layers and layer.sizes != expected.layers[index].sizes
        ]
        if problems:
            raise SymmetryError(f"the symmetry does not have the shapes of {where}:\n{listing(problems)}")
        ModelSymmetry(symmetry.family, self.groups, symmetry.layers).validate(f"the symmetry for {where}")
        problems = [
            problem
            for index, layer in self.layers.items()
            if index in symmetry.layers
            for problem in layer.problems(symmetry.layers[index])
        ]
        if problems:
            raise SymmetryError(f"{where}: no element of the group of family {self.family.name}:\n{listing(problems)}")

    @cached_property
    def bound(self) -> Mapping[int, Mapping[str, Tied]]:
        """Banks whose experts ties between router rows keep in their places, by layer; see `ties`. Reads the routers.

        Layers without such a bank are absent.
        """
        found = {index: bound_orders(layer, self.groups, self.top_k) for index, layer in self.layers.items()}
        return {index: banks for index, banks in found.items() if banks}

    def check_ties(self, symmetry: ModelSymmetry) -> None:
        """Raises SymmetryError where a valid `symmetry` moves experts that ties between router rows keep in their places.

        Experts of one tie that are equal may change places among themselves. Reads the weights.
        """
        broken = []
        for index in sorted(symmetry.layers.keys() & self.layers.keys()):  # either may lack those for multi-token prediction
            layer = self.layers[index]
            orders = {name: bank.expert_order for name, bank in symmetry.layers[index].banks.items()}
            moved = {name for name, order in orders.items() if not torch.equal(order, torch.arange(len(order)))}
            if moved and index in self.bound:
                bound = self.bound[index]
                if any(not is_trivial(layer, name, orders[name].tolist()) for name in moved & bound.keys()):
                    broken.append(in_words(index, bound))
        if broken:
            raise SymmetryError(
                f"{self.checkpoint.name}: the symmetry moves experts in layers whose router rows are tied:\n{listing(broken)}\n"
                "Top-k breaks such ties by the places of all experts, so that moving any changes the function. Align again: "
                "these layers then keep their order, and their hidden units are matched"
            )

    def acted(self, elements: Elements) -> dict[int, LayerSource]:
        """The MoE layers in the coordinates that group elements give them; a read waits for an element to come.

        Layers for multi-token prediction for which there is none keep their own.
        """
        return {
            index: _acted(layer, elements[index]) if index in elements or index < self.num_layers else layer
            for index, layer in self.layers.items()
        }


def _acted(layer: MoELayer, element: LayerSymmetry | Future[LayerSymmetry]) -> LayerSource:
    if isinstance(element, Future):
        return AwaitedLayer(layer, element, layer.units)
    return ActedLayer(layer, element, layer.units)
