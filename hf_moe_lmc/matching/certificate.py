"""Matching hidden units from random projections (sketches), with a proof that no other assignment is cheaper.

Let S have r columns of independent random signs (a Rademacher matrix), divided by sqrt(r), and let x be a fixed vector. Then
||S^T x||^2 is ||x||^2 on average. For 0 < c < r / (2 ||x||^2), as for each column s

    E exp(c (s.x)^2 / r) = E_g E_s exp(sqrt(2 c / r) g s.x) <= E_g exp(c g^2 ||x||^2 / r) = (1 - 2 c ||x||^2 / r)^(-1/2),

g a standard normal (E_s exp(a s.x) = prod cosh(a x_i) <= exp(a^2 ||x||^2 / 2)), Chernoff's bound at its best c is

    P(||S^T x||^2 > (1 + t) ||x||^2) <= exp(-(r / 2) (t - ln(1 + t))).

It also holds for a weighted sum over several vectors, each with r columns of its own. The bound on the moment is then a
product of (1 - 2 c w_i / r)^(-r / 2). It is largest where one w_i is all of their sum.

Choose t so that the right side, times the number of pairs and signs, is FAILURE. Then sketched costs divided by 1 + t are
lower bounds of all costs at once. This fails with a probability of at most FAILURE over the draw of S. The draw is fixed by a
seed and has not seen the weights.

Rounding is part of the bound. Each sketch Y has an error of norm at most e (`rows.projection_error` times the row's norm), so

    ||Y* - Y'*||^2 >= (1 - SLACK) ||Y - Y'||^2 - 2 (1 / SLACK - 1) (e^2 + e'^2)

for the exact Y*, which falls apart into terms of either row and the inner product. One matrix product gives all of these. Its
error is at most (terms + 8) EPSILON times the magnitudes that it sums, at most 2 (||Y||^2 + ||Y'||^2): subtracted, too.

Every row has a proposed partner. If that costs less than the bound of all other partners, the row's minimum is met. If so in
all rows, and the columns are all different, the assignment is the one optimum. A few rows may miss that. Their costs are
computed in full, they are assigned among the columns that remain, and prices show that this, too, is the optimum
(`_completed_in_full`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from hf_moe_lmc.matching import rows
from hf_moe_lmc.matching.assignment import assign, prices
from hf_moe_lmc.matching.options import UnitMethod
from hf_moe_lmc.matching.units import Paired, UnitRows, unit_cost
from hf_moe_lmc.moe.experts import MATRICES
from hf_moe_lmc.runtime.memory import reused

CERTIFICATES = {
    "sketch": "optimal, proved by a sketch of the gate rows",
    "wider sketch": "optimal, proved by a wider sketch of all rows",
    "partly exact": "optimal, proved by a sketch but for a few units, whose costs were computed in full",
    "exact": "optimal, from all costs in full",
    "small": "optimal, from all costs in full, which is cheap",
    "fixed": "nothing to match",
}
FAILURE = 1e-12  # probability over the draw of the projections that any bound of a pair of experts is wrong
COLUMNS, WIDER = 16, 96  # of the projection of each role
SEED = 20251122  # independent of the weights
SLACK = 1 / 32  # share of a sketched distance that is given up to rounding
FEW, SOME = 64, 8  # one in so many units may be matched in full, after the first sketch and after the wider one
AT_ONCE = 1 << 20  # entries of a block of the costs on the CPU
ON_DEVICE = 1 << 26
CLASSES = 128  # of the columns of such a block, by their places


def excess(columns: int, events: float, failure: float = FAILURE) -> float:
    """t with exp(-(columns / 2) (t - ln(1 + t))) * events = failure."""
    aim = 2 * math.log(events / failure) / columns
    t = aim + math.log1p(aim)
    for _ in range(100):  # a contraction, from below
        t = aim + math.log1p(t)
    return t * (1 + 1e-9)


@lru_cache(maxsize=12)
def rademacher(width: int, columns: int, role: str) -> Tensor:
    """A fixed matrix of random signs, float32 [width, columns]; other roles have others."""
    generator = torch.Generator().manual_seed(SEED + MATRICES.index(role) + 16 * columns)
    return torch.randint(2, (width, columns), generator=generator).float() * 2 - 1


@dataclass(frozen=True)
class Sketch:
    """The rows of one role, sketched.

    Attributes:
        values: float32 [unit, columns], divided by sqrt(columns).
        lowered: float64 [unit]: squared norms of `values`, less all that rounding may add to a bound.
    """

    values: Tensor
    lowered: Tensor


@dataclass
class Sketched:
    """An expert, and the sketches of it that have been asked for; up and down are balanced in norm.

    Where a norm is 0 there is nothing to balance, and the sketch of up and of down is 0.
    """

    rows: UnitRows
    units: UnitMethod
    sketches: dict[tuple[str, int], Sketch] = field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role in MATRICES if getattr(self.rows, role).shape[1])

    @property
    def balanced(self) -> bool:
        return self.rows.kind.scale and self.units == "scaled"

    @property
    def balance(self) -> Tensor:
        """The ratio that balances each unit, float64 [unit]; nan where a norm is 0."""
        return self.rows.norm_ratio if self.balanced else torch.ones(self.rows.count, dtype=torch.float64)

    def weight(self, role: str) -> Tensor:
        """What a squared distance of balanced rows counts in the cost of this expert's units, float64 [unit]."""
        power = {"gate": 0, "up": 2, "down": -2 * self.rows.kind.power}[role]
        return self.balance.nan_to_num(nan=0.0).pow(power).nan_to_num(posinf=0.0)

    def sketch(self, role: str, columns: int) -> Sketch:
        if (role, columns) not in self.sketches:
            self.draw(columns)
        return self.sketches[role, columns]

    def draw(self, columns: int) -> None:
        """Reads all of the expert: all roles are sketched, and their norms become known."""
        raw = {}
        squares = {role: torch.zeros(self.rows.count, dtype=torch.float64) for role in MATRICES}
        for role in self.roles:
            x = getattr(self.rows, role)
            raw[role], squares[role] = rows.project(x, rademacher(x.shape[1], columns, role).to(x.device))
        self.rows.__dict__.setdefault("squares", squares)
        for role, values in raw.items():
            power = {"gate": 0, "up": -1, "down": self.rows.kind.power}[role]
            factor = self.balance.pow(power).nan_to_num(nan=0.0)
            values = values.mul_((factor / columns**0.5)[:, None].to(values.device, torch.float32))
            error = rows.projection_error(getattr(self.rows, role)) + 8 * rows.EPSILON
            squared_error = error**2 * squares[role] * factor.square()
            loss = SLACK + 8 * (3 * columns + 8) * rows.EPSILON
            lowered = (1 - loss) * values.double().square().sum(dim=1).cpu() - 2 * (1 / SLACK - 1) * squared_error
            self.sketches[role, columns] = Sketch(values, lowered)

    def grams(self, columns: int) -> Tensor:
        """Y^T Y of each role's sketch: that of its Gram matrix from both sides; float64 [role, columns, columns]."""
        own = [self.sketch(role, columns).values.double() for role in self.roles]
        return torch.stack([y.T @ y for y in own]).cpu()


def certified_permutation(a: Sketched, b: Sketched) -> tuple[Paired, str] | None:
    """The optimal permutation of B's units, with the certificate that proves it; None where sketches prove none."""
    tries: list[tuple[tuple[str, ...], int, int, str]] = [(a.roles, WIDER, SOME, "wider sketch")]
    if "gate" in a.roles:
        tries.insert(0, (("gate",), COLUMNS, FEW, "sketch"))
    for roles, columns, share, certificate in tries:
        partner, bound = _two_least(_LowerBounds(a, b, roles, columns))
        bound /= 1 + excess(columns, 2.0 * a.rows.count**2)
        alone = torch.bincount(partner, minlength=len(partner))[partner] == 1
        if int((~alone).sum()) * share > len(partner):
            continue
        permutation = _completed(partner, alone)
        pairs = Paired.of(a.rows, b.rows, a.units, permutation)
        cost, error = pairs.cost()
        slack = bound - cost - error
        unproved = (~(alone & (slack > 0))).nonzero()[:, 0]
        if not len(unproved):
            return pairs, certificate
        if len(unproved) * share <= len(partner):
            optimum = _completed_in_full(a, b, permutation, unproved, slack)
            if optimum is not None:
                same = torch.equal(optimum, permutation)
                return (pairs if same else Paired.of(a.rows, b.rows, a.units, optimum)), "partly exact"
    return None


def _completed(partner: Tensor, alone: Tensor) -> Tensor:
    """A permutation that keeps the partners of the rows that are `alone` with them."""
    permutation = partner.clone()
    free = torch.ones(len(partner), dtype=torch.bool)
    free[partner[alone]] = False
    permutation[~alone] = free.nonzero()[:, 0]
    return permutation


def _completed_in_full(a: Sketched, b: Sketched, permutation: Tensor, unproved: Tensor, slack: Tensor) -> Tensor | None:
    """`permutation` with some units assigned anew among their columns by their costs in full; None if no proof results.

    All other rows are at their minimum, by at least their slack. With prices of -slack for their columns and of at most 0 for
    those of the unproved rows they stay there. It remains to be seen that at these prices no unproved row wants one of theirs.

    Args:
        unproved: int64 [few], the units of A to assign.
        slack: float64 [unit].
    """
    kind = a.rows.kind
    cost = unit_cost(a.rows, b.rows, a.units, unproved).double()
    squares = b.rows.squares
    cost += squares["gate"]
    if not (kind.scale and a.units == "scaled"):
        cost += squares["up"] + squares["down"]
    columns = permutation[unproved].sort().values
    own = cost[:, columns]
    chosen = assign(own.clone())
    price = prices(own, chosen)
    row_price = own.gather(1, chosen[:, None])[:, 0] - price[chosen]
    column_price = torch.zeros(len(permutation), dtype=torch.float64)
    column_price[permutation] = -slack
    cost -= column_price
    cost[:, columns] = torch.inf
    if bool((cost.amin(dim=1) < row_price).any()):
        return None
    optimum = permutation.clone()
    optimum[unproved] = columns[chosen]
    return optimum


class _LowerBounds:
    """Lower bounds of all costs, times 1 + t, as products of matrices: left @ right.T - |signed left @ signed right.T|.

    With Y balanced and w the weights of A's unit k, a role adds w_k (q_k + q'_l - 2 (1 - SLACK) Y_k.Y'_l), q lowered squared
    norms; up and down lie within the magnitude, where signs are free. Where either unit has no balance, only gates count.
    """

    def __init__(self, a: Sketched, b: Sketched, roles: tuple[str, ...], columns: int) -> None:
        device = a.rows.up.device
        count = a.rows.count
        unbalanced = b.balance.isnan()
        left: list[Tensor] = []
        right: list[Tensor] = []
        signed_left: list[Tensor] = []
        signed_right: list[Tensor] = []
        row_term, balanced_row_term = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        column_term = torch.zeros(count, dtype=torch.float64)
        signed = a.rows.kind.sign and a.units == "scaled"
        for role in roles:
            sketch_a, sketch_b = a.sketch(role, columns), b.sketch(role, columns)
            weight = a.weight(role) if role != "gate" else torch.ones(count, dtype=torch.float64)
            weight32 = weight.to(device, torch.float32)
            inner = sketch_a.values * (-2 * (1 - SLACK) * weight32[:, None])
            within = signed and role != "gate"
            (signed_left if within else left).append(inner)
            (signed_right if within else right).append(sketch_b.values)
            row_term += weight * sketch_a.lowered
            if role == "gate":
                column_term += sketch_b.lowered
            else:
                balanced_row_term += weight * sketch_a.lowered
                left.append(weight32[:, None])
                right.append(sketch_b.lowered.masked_fill(unbalanced, 0.0).to(device, torch.float32)[:, None])
        ones = torch.ones(count, 1, device=device)
        left += [ones, row_term.to(device, torch.float32)[:, None]]
        right += [column_term.to(device, torch.float32)[:, None], ones]
        if bool(unbalanced.any()):
            left.append((-balanced_row_term).to(device, torch.float32)[:, None])
            right.append(unbalanced.to(device, torch.float32)[:, None])
        self.left, self.right = torch.cat(left, dim=1), torch.cat(right, dim=1)
        self.signed = (torch.cat(signed_left, dim=1), torch.cat(signed_right, dim=1)) if signed_left else None

    def block(self, strip: slice) -> Tensor:
        """Rows of the bounds, which may lie below 0, float32 [row, group, CLASSES].

        Places beyond the last unit hold inf.
        """
        height, count, device = strip.stop - strip.start, len(self.right), self.left.device
        groups = max(2, -(-count // CLASSES))
        whole = reused((height, groups * CLASSES), torch.float32, device)
        bounds = torch.mm(self.left[strip], self.right.T, out=whole[:, :count])
        if self.signed is not None:
            within = reused((height, count), torch.float32, device)
            bounds.sub_(torch.mm(self.signed[0][strip], self.signed[1].T, out=within).abs_())
        whole[:, count:] = torch.inf
        return whole.view(height, groups, CLASSES)


def _two_least(bounds: _LowerBounds) -> tuple[Tensor, Tensor]:
    """For each row the place of its least entry, int64 [unit], and a lower bound of all others, float64 [unit]; on the CPU.

    One pass leaves the least entry of each class; the second least is among these, or within the class of the least one.
    """
    count = len(bounds.left)
    on_cpu = bounds.left.device.type == "cpu"
    partner, bound = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)

    def least_two(block: Tensor) -> tuple[Tensor, Tensor]:
        least, chosen = block.amin(dim=1).topk(2, dim=1, largest=False)
        own = chosen[:, :1]
        members = block.gather(2, own[:, None].expand(-1, block.shape[1], 1))[:, :, 0]
        values, group = members.topk(2, dim=1, largest=False)
        return (group[:, 0] * CLASSES + own[:, 0]).cpu(), torch.minimum(least[:, 1], values[:, 1]).clamp_min(0).cpu().double()

    def work(strip: slice) -> None:
        for part in _steps(strip, max(1, (AT_ONCE if on_cpu else ON_DEVICE) // count)):
            partner[part], bound[part] = least_two(bounds.block(part))

    rows.in_strips(count, work, size=count**2, threads=on_cpu)
    return partner, bound


def _steps(strip: slice, step: int) -> Iterator[slice]:
    for first in range(strip.start, strip.stop, step):
        yield slice(first, min(first + step, strip.stop))
