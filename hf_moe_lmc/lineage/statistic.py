"""How much two sets of rows resemble each other in the best order, and how likely chance would do as well.

Rows that were drawn independently resemble each other by chance, the more the fewer directions they keep to. So both sets are
centred and whitened first: what all rows of a set share counts no more than what tells them apart. R, the mean cosine of
matched rows, is then that of two random directions in F dimensions, of which

    P(R >= r) <= (1 - r^2)^((F - 1) / 2) / 2      for one order,

as a cap of a sphere has that share of it at most. All n! orders together have at most n! times that probability. F is the
smaller of (n - 1) times the dimensions that cosines of rows that are not matched give evidence of, halved, and of those of the
rotations within the space of n - 1 centred rows. docs/compare.md has the derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.matching.assignment import assign, assign_groups

RIDGE = 0.1  # of the mean eigenvalue: directions that hold less are not blown up to the size of the others
CAUTION = 2.0  # by which the spread of cosines is taken larger than it was measured
IN_PLACE = 1e-6  # by which a row's own place is preferred, where another is as good
SURELY = 1e-12  # 1 - r^2 of rows that are equal but for rounding


@dataclass(frozen=True)
class Resemblance:
    """Rows of A beside those of B.

    Attributes:
        order: row i of A is matched with row order[i] of B.
        cosines: of each row of A and the one that it is matched with, whitened.
        gaps: by how much each of these is above the best other cosine of either row.
        cosine, in_place: the mean of them, and that of rows with one number.
        log10_chance, log10_chance_in_place: bounds of the probability that unrelated rows do as well, in the best order and in
            place; 0 where nothing can be said.
        freedom: F.
    """

    order: Tensor
    cosines: Tensor
    gaps: Tensor
    cosine: float
    in_place: float
    log10_chance: float
    log10_chance_in_place: float
    freedom: float

    @property
    def gap(self) -> float:
        """The mean gap."""
        return float(self.gaps.mean())

    @property
    def least_chance(self) -> float:
        """Decimal logarithm of the bound for the order that was found; where that is the rows' own, of the smaller one."""
        return self.log10_chance if self.moved else min(self.log10_chance, self.log10_chance_in_place)

    @property
    def moved(self) -> int:
        """Rows that are matched with one of another number."""
        return int((self.order != torch.arange(len(self.order))).sum())


def whitened(rows: Tensor) -> Tensor | None:
    """Unit rows without what they have in common: centred, made of one length, and whitened; None where all are equal.

    Args:
        rows: [n, d] or, for many sets, [..., n, d], finite.

    Returns:
        Float32, the same shape. They are the rows of (G + ridge)^(-1/2) X, for the centred X and G = X X^T, at length 1.
    """
    rows = rows.float()
    centred = rows - rows.mean(dim=-2, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    least = 1e-6 * float(torch.linalg.vector_norm(rows, dim=-1).max()) if rows.numel() else 0.0
    if not bool((norms > least).any()):
        return None
    x = centred / norms.clamp_min(max(least, torch.finfo(torch.float32).tiny))
    wide = x.shape[-2] <= x.shape[-1]
    gram = (x @ x.mT if wide else x.mT @ x).double()
    values, vectors = torch.linalg.eigh(gram)
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(-1) / x.shape[-2]
    root = ((vectors * (values.clamp_min(0) + ridge[..., None]).rsqrt()[..., None, :]) @ vectors.mT).float()
    found = root @ x if wide else x @ root
    return torch.nn.functional.normalize(found, dim=-1)


def resemblance(a: Tensor, b: Tensor, width: int, groups: int = 1) -> Resemblance:
    """Compares whitened rows in the order in which they resemble each other most.

    Args:
        a, b: whitened rows, [n, d].
        width: the dimensions that the rows could have, d for rows as they are.
        groups: orders that permute whole groups and the members inside each.
    """
    return judged((a @ b.T).double(), width, groups)


def judged(cosines: Tensor, width: int, groups: int = 1) -> Resemblance:
    """The same from the cosines of whitened rows, float64 [n, n]."""
    count = len(cosines)
    places = torch.arange(count)
    cost = -cosines - IN_PLACE * torch.eye(count, dtype=torch.float64)
    order = assign(cost) if groups == 1 else assign_groups(cost, groups)
    matched = cosines[places, order]
    others = cosines.index_put((places, order), torch.tensor(-1.0, dtype=torch.float64))
    gaps = matched - torch.maximum(others.amax(dim=1), others.amax(dim=0)[order])
    spread = float(cosines.square().sum() - matched.square().sum()) / max(count * (count - 1), 1)
    freedom = degrees_of_freedom(count, width, spread)
    cosine, in_place = float(matched.mean()), float(cosines.diagonal().mean())
    return Resemblance(
        order=order,
        cosines=matched,
        gaps=gaps,
        cosine=cosine,
        in_place=in_place,
        log10_chance=log10_chance(cosine, freedom, math.lgamma(count + 1)),
        log10_chance_in_place=log10_chance(in_place, freedom),
        freedom=freedom,
    )


def degrees_of_freedom(count: int, width: int, spread: float) -> float:
    """F: the dimensions in which the mean cosine of `count` rows is that of two random directions.

    Args:
        spread: mean square of the cosines of rows that are not matched.
    """
    dimensions = 1 / min(max(1 / width, CAUTION * spread), 1.0)
    spanned = min(count - 1, width)
    return min((count - 1) * dimensions, spanned * (spanned - 1) / 2)


def log10_chance(cosine: float, freedom: float, log_orders: float = 0.0) -> float:
    """Bound of the decimal logarithm of the probability of a mean cosine among unrelated rows; 0 where it says nothing.

    Args:
        freedom: see `degrees_of_freedom`.
        log_orders: natural logarithm of the number of orders among which the best was taken.

    Example:
        >>> round(log10_chance(0.5, 100), 1), log10_chance(-0.2, 100)
        (-6.5, 0.0)
    """
    if cosine <= 0 or freedom <= 1:
        return 0.0
    tail = (freedom - 1) / 2 * math.log(max(1 - cosine**2, SURELY)) - math.log(2)
    return min(0.0, tail + log_orders) / math.log(10)
