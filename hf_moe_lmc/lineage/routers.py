"""What the router rows of two MoE layers say of their origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_moe_lmc.lineage.statistic import Resemblance, log10_chance, resemblance, whitened
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.symmetry.banks import FIRST

FALSE_ALARMS = 1e-6  # probability that any layer of two unrelated models is taken for one of the same lineage
LEAST_COSINE = 0.5  # of matched rows in the mean: less is a resemblance, and no lineage
LEAST_GAP = 0.1  # in the mean: rows that resemble many others as much are not told apart
EQUAL = 0.99  # mean cosine of rows that are nearly equal: what a test must at least be able to recognise

Says = Literal["in place", "shuffled", "alike", "unlike", "undecided"]


@dataclass(frozen=True)
class RouterFinding:
    """What the router rows of one layer say.

    Attributes:
        says: `in place` or `shuffled`: of the same lineage; `alike`: byte for byte the same in some order, so that they were
            frozen, and tell nothing of the experts; `unlike`: as those of unrelated models.
        why: for whom it is undecided.
        resemblance: of the first bank; None where its rows could not be compared.
        moved: experts of all banks that have another place, where the lineage is the same.
        distance: ||A - P B||^2 and ||A||^2 of the centred rows of the first bank, in the order that was found.
    """

    says: Says
    why: str = ""
    resemblance: Resemblance | None = None
    moved: int | None = None
    distance: tuple[float, float] | None = None


Rows = Mapping[str, Tensor]  # router rows by bank, [expert, model]


def router_rows(layer: MoELayer) -> Rows:
    """The router rows of each bank, in the dtype on disk: all that is read of a layer to judge it."""
    return {name: bank.values("router").flatten(1) for name, bank in layer.banks.items()}


def judge_routers(a: Rows, b: Rows, layers: int, groups: int = 1) -> RouterFinding:
    """What the router rows of two layers say.

    Args:
        a, b: see `router_rows`.
        layers: that are judged; all together have a probability of FALSE_ALARMS to be taken for relatives by chance.
        groups: groups of experts that limit the routing of the first bank.
    """
    if not all(bool(rows.isfinite().all()) for side in (a, b) for rows in side.values()):
        return RouterFinding("undecided", "router rows hold NaN or infinite values")
    found = {name: _judge_bank(a[name], b[name], layers, groups if name == FIRST else 1) for name in a if len(a[name]) > 1}
    if not found:
        return RouterFinding("undecided", "there is one expert")
    first = found[FIRST] if FIRST in found else next(iter(found.values()))
    if first.says in ("in place", "shuffled", "alike"):
        moved = sum(one.moved or 0 for one in found.values())
        says: Says = "shuffled" if moved and first.says == "in place" else first.says
        return RouterFinding(says, "", first.resemblance, moved, first.distance)
    return first


def _judge_bank(a: Tensor, b: Tensor, layers: int, groups: int) -> RouterFinding:
    white_a, white_b = whitened(a), whitened(b)
    if white_a is None or white_b is None:
        return RouterFinding("undecided", "all router rows are equal")
    found = resemblance(white_a, white_b, a.shape[1], groups)
    distance = _distance(a, b, found.order)
    says, why = said_by(found, layers)
    related = says in ("in place", "shuffled")
    if related and a.dtype == b.dtype and torch.equal(a, b[found.order]):
        says = "alike"
    return RouterFinding(says, why, found, found.moved if related else None, distance)


def said_by(found: Resemblance, layers: int) -> tuple[Says, str]:
    """What a resemblance of the router rows of one of so many layers says, and why nothing where it does not."""
    limit = threshold(layers)
    count = len(found.order)
    sure_in_place = found.moved == 0 and found.log10_chance_in_place <= limit
    if found.log10_chance <= limit or sure_in_place:
        if found.cosine >= LEAST_COSINE and found.gap >= LEAST_GAP:
            return "shuffled" if found.moved else "in place", ""
        return "undecided", f"router rows resemble each other a little (mean cosine {found.cosine:.2f})"
    if log10_chance(EQUAL, found.freedom, math.lgamma(count + 1)) > limit:
        return "undecided", f"{count} router rows are too few, or too much alike, to be told from chance"
    if found.cosine >= LEAST_COSINE:
        return "undecided", f"router rows resemble each other no more than by chance (mean cosine {found.cosine:.2f})"
    return "unlike", ""


def threshold(layers: int) -> float:
    """Decimal logarithm of the probability below which one of two tests of each layer is taken for no chance."""
    return math.log10(FALSE_ALARMS / (2 * max(layers, 1)))


def _distance(a: Tensor, b: Tensor, order: Tensor) -> tuple[float, float]:
    x, y = (rows.float() - rows.float().mean(dim=0) for rows in (a, b))
    return float((x - y[order]).square().sum()), float(x.square().sum())
