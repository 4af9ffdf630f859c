"""Inputs of the linear maps of a decoder layer, watched while one parent runs: what RegMean needs to know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe_lmc.repair.block_map import routed_inputs, taken
from hf_moe_lmc.repair.regmean import Gram
from hf_moe_lmc.repair.sites import Site


@dataclass
class Moments:
    """What one parent's linear maps were given in one decoder layer.

    Attributes:
        grams: by full name of the weight, of all maps that each token goes through.
        inputs, chosen: of the experts, in parts, as in `BlockMap`.
    """

    grams: dict[str, Gram] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    _last: tuple[Tensor, Gram] | None = None

    def add(self, name: str, inputs: Tensor) -> None:
        """Takes in the inputs of a map; maps that read the same values share a Gram."""
        if self._last is not None and self._last[0] is inputs and self.grams.get(name, self._last[1]) is self._last[1]:
            self.grams[name] = self._last[1]
            return
        if name not in self.grams:
            self.grams[name] = Gram.empty(inputs.shape[-1], inputs.device)
        self.grams[name].add(inputs)
        self._last = (inputs, self.grams[name])

    def of_expert(self, expert: int) -> Tensor:
        """Inputs of one expert, float32 [token, width]."""
        pairs = zip(self.inputs, self.chosen, strict=True)
        return torch.cat([taken(x, *(chosen == expert).nonzero(as_tuple=True)) for x, chosen in pairs]).float()


def linear_weights(path: str, layer: nn.Module, site: Site | None) -> dict[str, nn.Module]:
    """The maps of a layer that each token goes through: module by full name of its weight, the routers among them."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules(prefix=path):
        if isinstance(module, nn.Linear) and not (site is not None and name.startswith(f"{site.memory.experts}.")):
            found[f"{name}.weight"] = module
    if site is not None:
        router = site.roles["router"]
        owner = layer.get_submodule(router.rpartition(".")[0].removeprefix(f"{path}."))
        found.setdefault(router, owner)
    return found


def watch(weights: Mapping[str, nn.Module], site: Site | None, moments: Callable[[], Moments | None]) -> list[Any]:
    """Hooks on the maps of a layer; `moments` takes in what runs just now, or None where nobody asks."""

    def before_map(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            taking = moments()
            if taking is not None:
                taking.add(name, args[0])

        return hook

    def before_experts(module: nn.Module, args: Any, kwargs: Any) -> None:
        taking = moments()
        assert site is not None
        found = None if taking is None else routed_inputs(site, args, kwargs)
        if taking is not None and found is not None:
            taking.inputs.append(found[0])
            taking.chosen.append(found[1])

    handles = [module.register_forward_pre_hook(before_map(name)) for name, module in weights.items()]
    if site is not None:
        handles.append(site.experts.register_forward_pre_hook(before_experts, with_kwargs=True))
    return handles
