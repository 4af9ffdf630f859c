"""Routers of merges whose experts are not averaged: logits that are as large as those of the parents.

The average of two routers that have little in common is short. All logits are then close to each other, and every expert gets
some of every token. The straight line has no other choice, but a merge that keeps the experts of both has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.ties import rivals
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.symmetry.banks import qualified

GATE = "shared_router"  # of the shared expert


@dataclass(frozen=True)
class Router:
    """The rows of a router that compete with each other, over all banks that it selects from.

    Attributes:
        roles: that hold its rows: weights, and their biases.
        banks: of these the ones of each bank; a bias is one more column.
        centred: softmax: a vector that is added to all rows changes nothing, so that their mean does not count.
    """

    banks: tuple[tuple[str, ...], ...]
    centred: bool

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for roles in self.banks for role in roles)

    def rows(self, source: LayerSource) -> Tensor:
        """All rows, float64 [expert, model], with a bias [expert, model + 1]."""
        parts = []
        for roles in self.banks:
            columns = [source.stored(role).double() for role in roles]
            parts.append(torch.cat([one.view(len(one), -1) for one in columns], dim=1))
        return torch.cat(parts)


def routers_of(layer: MoELayer) -> tuple[Router, ...]:
    """The routers of a block, and the gate of its shared expert."""
    found = []
    for names in rivals(layer):
        banks = tuple(
            tuple(qualified(name, role) for role in ("router", "router_bias") if role in layer.banks[name].roles)
            for name in names
        )
        found.append(Router(banks, layer.router == "softmax"))
    return (*found, Router(((GATE,),), False)) if GATE in layer.roles else tuple(found)


def gain(a: Tensor, b: Tensor, t: float) -> float:
    """What the average m = (1 - t) a + t b of two routers is multiplied by: ((1 - t)|a| + t|b|)^2 / |m|^2.

    Then the average's mean product with its parents, (1 - t)<m, a> + t<m, b>, is what it would be if both pointed one way. A
    token that lies along the rows of a parent gets logits as large as this parent's. The gain is 1 where the two are alike, and
    2 at t = 0.5 where they have nothing in common. Opposite ones count as if they had nothing in common: the gain is bounded.

    Args:
        a, b: rows, float64 [expert, width].

    Example:
        >>> one, other = torch.eye(2, dtype=torch.float64)[:, None]
        >>> gain(one, one, 0.3), gain(one, other, 0.5), gain(one, -one, 0.5)
        (1.0, 2.0, 2.0)
    """
    parts = (1 - t) * float(a.norm()), t * float(b.norm())
    if 0.0 in parts:  # there is nothing that averaging could shorten
        return 1.0
    apart = parts[0] ** 2 + parts[1] ** 2
    return sum(parts) ** 2 / max(float(torch.lerp(a, b, t).square().sum()), apart)


@dataclass(frozen=True)
class AveragedRouters:
    """The routers of a block at a point between two blocks, multiplied by their gain.

    Attributes:
        a, b: A's block, and B''s.
        t: between 0 and 1; at the ends they are the parents'.
    """

    routers: tuple[Router, ...]
    a: LayerSource
    b: LayerSource
    t: float

    @cached_property
    def of_role(self) -> Mapping[str, Router]:
        return {role: router for router in self.routers for role in router.roles}

    def stored(self, role: str) -> Tensor:
        """The rows of a role, or its biases, in float32 (float64 stays)."""
        router = self.of_role[role]
        own, other = self.a.stored(role), self.b.stored(role)
        dtype = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
        values = torch.lerp(own.double(), other.double(), self.t)
        a, b = router.rows(self.a), router.rows(self.b)
        if not router.centred:
            return (gain(a, b, self.t) * values).to(dtype)
        mean = torch.lerp(_mean(router, self.a, role), _mean(router, self.b, role), self.t)
        factor = gain(a - a.mean(dim=0), b - b.mean(dim=0), self.t)
        return (mean + factor * (values - mean)).to(dtype)


def _mean(router: Router, source: LayerSource, role: str) -> Tensor:
    """Over all rows that compete, of the columns of a role."""
    (place,) = (roles.index(role) for roles in router.banks if role in roles)
    return torch.cat([source.stored(roles[place]).double() for roles in router.banks]).mean(dim=0)
