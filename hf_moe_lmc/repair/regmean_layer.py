"""RegMean of one decoder layer, or of the head: all its linear maps, from what both parents' maps were given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.path.endpoints import Part
from hf_moe_lmc.repair.fitted import Fitted, Role
from hf_moe_lmc.repair.moments import Moments
from hf_moe_lmc.repair.regmean import Gram, regmean
from hf_moe_lmc.repair.run_models import PATH, RunModels
from hf_moe_lmc.repair.sites import Site, canonical

ENDS = (None, PATH)  # of A and of B', among what `Endpoints` holds


@dataclass(frozen=True)
class RegmeanLayer:
    """The linear maps of a decoder layer, whose ends are loaded.

    Attributes:
        layer: its number; None: the head.
        site: its MoE block, if it has one.
    """

    models: RunModels
    layer: int | None
    site: Site | None

    def merged(
        self, names: Sequence[str], moments: Sequence[Moments], totals: tuple[int, int]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Merges the maps.

        Args:
            names: of the weights that each token goes through; those that no token reached are left out.
            moments: of A and of B'.
            totals: tokens that each of them read.

        Returns:
            Parameters by full name, in A's dtypes, and what the report says of them.
        """
        found = {name: self._map(name, moments, totals) for name in names if name in moments[0].grams}
        untouched: list[int] = []
        if self.site is not None:
            found |= self._experts(self.site, moments, totals, untouched)
        facts: dict[str, Any] = {"maps": len(found)}
        return found, {**facts, "averaged_experts": untouched} if untouched else facts

    def _map(self, name: str, moments: Sequence[Moments], totals: tuple[int, int]) -> Tensor:
        grams = [one.grams[name] for one in moments]
        a, b = (self.models.ends.held[end, name] for end in ENDS)
        device = grams[0].matrix.device
        return regmean(a.to(device).float(), b.to(device).float(), (grams[0], grams[1]), totals, self.models.t).to(a.dtype)

    def _experts(
        self, site: Site, moments: Sequence[Moments], totals: tuple[int, int], untouched: list[int]
    ) -> dict[str, Tensor]:
        """The routed experts, one after the other; `untouched` takes those that no token of either text reaches."""
        held = self.models.ends.held
        of_experts = [name for name in site.names if name.startswith(f"{site.memory.experts}.")]
        into, out_of = f"{site.memory.experts}.gate_up_proj", site.down
        found = {name: torch.empty_like(held[None, name]) for name in (into, out_of)}
        for expert in range(site.count):
            inputs = [one.of_expert(expert) for one in moments]
            ends = [{name: held[end, name] for name in of_experts} for end in ENDS]
            units = [site.units(expert, x, values) for x, values in zip(inputs, ends, strict=True)]
            if not any(len(x) for x in inputs):
                untouched.append(expert)
            for name, values in ((into, inputs), (out_of, units)):
                a, b = (end[name][expert].to(values[0].device).float() for end in ends)
                maps = (a.T, b.T) if site.transposed else (a, b)
                merged = regmean(*maps, (_gram_of(values[0]), _gram_of(values[1])), totals, self.models.t)
                found[name][expert] = (merged.T if site.transposed else merged).to(found[name])
        return found

    def on_disk(self, found: Mapping[str, Tensor]) -> tuple[dict[Role, Tensor], dict[str, Tensor]]:
        """Parameters in the checkpoint's terms; outside of MoE blocks, those that are tensors of their own there."""
        block: dict[Role, Tensor] = {}
        outside = {}
        for name, value in found.items():
            group = self.models.ends.conversions[0].group_of[name]
            if self.site is not None and name in self.site.memory.tensors:
                block |= canonical(self.site.memory.tensors[name], value)
            elif group.patterns[0] is None:
                outside[group.keys[0]] = value
        return block, outside

    def restored(self, stored: Fitted, part: Part) -> dict[str, Tensor]:
        """Parameters from the record of an earlier call: the inverse of `on_disk`."""
        found = {}
        for name in part.names:
            group = self.models.ends.conversions[0].group_of[name]
            if self.site is not None and name in self.site.memory.tensors:
                value = torch.empty_like(self.models.ends.held[None, name])
                for role, place in canonical(self.site.memory.tensors[name], value).items():
                    fitted = stored.value(self.site.layer, *role)
                    if fitted is not None:
                        place.copy_(fitted)
                        found[name] = value
            elif group.patterns[0] is None and (outside := stored.outside(group.keys[0])) is not None:
                found[name] = outside
        return found


def _gram_of(inputs: Tensor) -> Gram:
    gram = Gram.empty(inputs.shape[-1], inputs.device)
    gram.add(inputs)
    return gram
