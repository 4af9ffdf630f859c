"""Matching hidden units from random sketches, with a proof that no other assignment is cheaper.

For S with r columns of independent random signs, divided by sqrt(r), and a fixed vector x, ||S^T x||^2 is ||x||^2 on average.
For 0 < c < r / (2 ||x||^2), as for each column s

    E exp(c (s.x)^2 / r) = E_g E_s exp(sqrt(2 c / r) g s.x) <= E_g exp(c g^2 ||x||^2 / r) = (1 - 2 c ||x||^2 / r)^(-1/2),

g a standard normal (E_s exp(a s.x) = prod cosh(a x_i) <= exp(a^2 ||x||^2 / 2)), Chernoff's bound at its best c is

    P(||S^T x||^2 > (1 + t) ||x||^2) <= exp(-(r / 2) (t - ln(1 + t))).

It also holds for a weighted sum over several vectors, each with r columns of its own: the bound on the moment is a product of
(1 - 2 c w_i / r)^(-r / 2), largest where one of the w_i is all of their sum. With t such that the right side, times the number
of pairs and signs, is FAILURE, sketched costs divided by 1 + t are lower bounds of all costs at once, but with a probability of
at most FAILURE over the draw of the signs, which are fixed by a seed and have not seen the weights.

Rounding is part of the bound. Each sketch Y has an error of norm at most e (`rows.projection_error` times the row's norm), so

    ||Y* - Y'*||^2 >= (1 - SLACK) ||Y - Y'||^2 - 2 (1 / SLACK - 1) (e^2 + e'^2)

for the exact Y*, which falls apart into terms of either row and the inner product. The matrix product that gives all of these
has an error of at most (terms + 8) EPSILON times the magnitudes that it sums, at most 2 (||Y||^2 + ||Y'||^2): subtracted, too.

If every row's proposed partner costs less than the bound of all its other partners, each row's minimum is met and the columns
are all different: the assignment is the one optimum. Where a few rows miss that, their costs are computed in full, they are
assigned among the columns that are left, and prices show that this, too, is the optimum (`_rest`).
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
from hf_moe_lmc.runtime.memory import reused

CERTIFICATES = {
    "sketch": "optimal, proved by a sketch of the gate rows",
    "wider sketch": "optimal, proved by a wider sketch of all rows",
    "partly exact": "optimal, proved by a sketch but for a few units, whose costs were computed in full",
    "exact": "optimal, from all costs in full",
    "small": "optimal, from all costs in full, which is cheap",
    "fixed": "nothing to match",
}
FAILURE = 1e-12  # probability over the draw of signs that any of one pair's bounds is wrong
COLUMNS, WIDER = 16, 96  # signs for each role
SEED = 20251122  # independent of the weights
SLACK = 1 / 32  # share of a sketched distance that is given up to rounding
FEW, SOME = 64, 8  # one in so many units may be left to the exact way, after the first sketch and after the wider one
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
def signs(width: int, columns: int, role: str) -> Tensor:
    """Fixed random signs, float32 [width, columns]; other roles have others."""
    generator = torch.Generator().manual_seed(SEED + ("gate", "up", "down").index(role) + 16 * columns)
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
        return tuple(role for role in ("gate", "up", "down") if getattr(self.rows, role).shape[1])

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
        squares = {role: torch.zeros(self.rows.count, dtype=torch.float64) for role in ("gate", "up", "down")}
        for role in self.roles:
            x = getattr(self.rows, role)
            raw[role], squares[role] = rows.project(x, signs(x.shape[1], columns, role).to(x.device))
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

    def forget(self, columns: int) -> None:
        self.sketches = {key: sketch for key, sketch in self.sketches.items() if key[1] != columns}

    def grams(self, columns: int) -> Tensor:
        """Y^T Y of each role's sketch: that of its Gram matrix from both sides; float64 [role, columns, columns]."""
        own = [self.sketch(role, columns).values.double() for role in self.roles]
        return torch.stack([y.T @ y for y in own]).cpu()


def certified_order(a: Sketched, b: Sketched, *, patient: bool = True) -> tuple[Paired, str] | None:
    """The optimal order of B's units and the way in which that was proved; None where it could not be proved so.

    Args:
        patient: try the wider sketch, too.
    """
    tries: list[tuple[tuple[str, ...], int, int, str]] = [(("gate",), COLUMNS, FEW, "sketch")] if "gate" in a.roles else []
    if patient:
        tries.append((a.roles, WIDER, SOME, "wider sketch"))
    for roles, columns, share, way in tries:
        partner, bound = _two_least(_Costs(a, b, roles, columns))
        bound /= 1 + excess(columns, 2.0 * a.rows.count**2)
        alone = torch.bincount(partner, minlength=len(partner))[partner] == 1
        if int((~alone).sum()) * share > len(partner):
            continue
        order = _completed(partner, alone)
        pairs = Paired.of(a.rows, b.rows, a.units, order)
        cost, error = pairs.cost()
        slack = bound - cost - error
        left = (~(alone & (slack > 0))).nonzero()[:, 0]
        if not len(left):
            return pairs, way
        if len(left) * share <= len(partner):
            found = _rest(a, b, order, left, slack)
            if found is not None:
                return (pairs if torch.equal(found, order) else Paired.of(a.rows, b.rows, a.units, found)), "partly exact"
    return None


def _completed(partner: Tensor, alone: Tensor) -> Tensor:
    """A permutation that keeps the partners of the rows that are `alone` with them."""
    order = partner.clone()
    free = torch.ones(len(partner), dtype=torch.bool)
    free[partner[alone]] = False
    order[~alone] = free.nonzero()[:, 0]
    return order


def _rest(a: Sketched, b: Sketched, order: Tensor, left: Tensor, slack: Tensor) -> Tensor | None:
    """`order` with the units `left` assigned among their columns by their costs in full; None if that might not be optimal.

    All other rows are at their minimum, by at least their slack. With prices of -slack for their columns and of at most 0 for
    those that are left they stay there; it remains to be seen that at these prices no row that is left wants one of theirs.
    """
    kind = a.rows.kind
    cost = unit_cost(a.rows, b.rows, a.units, left).double()
    squares = b.rows.squares
    cost += squares["gate"]
    if not (kind.scale and a.units == "scaled"):
        cost += squares["up"] + squares["down"]
    columns = order[left].sort().values
    own = cost[:, columns]
    chosen = assign(own.clone())
    price = prices(own, chosen)
    of_row = own.gather(1, chosen[:, None])[:, 0] - price[chosen]
    price_of_all = torch.zeros(len(order), dtype=torch.float64)
    price_of_all[order] = -slack
    cost -= price_of_all
    cost[:, columns] = torch.inf
    if bool((cost.amin(dim=1) < of_row).any()):
        return None
    found = order.clone()
    found[left] = columns[chosen]
    return found


class _Costs:
    """Lower bounds of all costs, times 1 + t, as products of matrices: left @ right.T - |signed left @ signed right.T|.

    With Y balanced and w the weights of A's unit k, a role adds w_k (q_k + q'_l - 2 (1 - SLACK) Y_k.Y'_l), q lowered squared
    norms; up and down lie within the magnitude, where signs are free. Where either unit has no balance, only gates count.
    """

    def __init__(self, a: Sketched, b: Sketched, roles: tuple[str, ...], columns: int) -> None:
        device = a.rows.up.device
        count = a.rows.count
        dead = b.balance.isnan()
        left: list[Tensor] = []
        right: list[Tensor] = []
        signed_left: list[Tensor] = []
        signed_right: list[Tensor] = []
        of_row, undone = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
        of_column = torch.zeros(count, dtype=torch.float64)
        signed = a.rows.kind.sign and a.units == "scaled"
        for role in roles:
            of_a, of_b = a.sketch(role, columns), b.sketch(role, columns)
            weight = a.weight(role) if role != "gate" else torch.ones(count, dtype=torch.float64)
            weight32 = weight.to(device, torch.float32)
            inner = of_a.values * (-2 * (1 - SLACK) * weight32[:, None])
            within = signed and role != "gate"
            (signed_left if within else left).append(inner)
            (signed_right if within else right).append(of_b.values)
            of_row += weight * of_a.lowered
            if role == "gate":
                of_column += of_b.lowered
            else:
                undone += weight * of_a.lowered
                left.append(weight32[:, None])
                right.append(of_b.lowered.masked_fill(dead, 0.0).to(device, torch.float32)[:, None])
        ones = torch.ones(count, 1, device=device)
        constants = [(ones, of_column), (of_row, None)] + ([(-undone, dead.double())] if bool(dead.any()) else [])
        for of_a_side, of_b_side in constants:
            left.append(of_a_side if of_a_side is ones else of_a_side.to(device, torch.float32)[:, None])
            right.append(ones if of_b_side is None else of_b_side.to(device, torch.float32)[:, None])
        self.left, self.right = torch.cat(left, dim=1), torch.cat(right, dim=1)
        self.signed = (torch.cat(signed_left, dim=1), torch.cat(signed_right, dim=1)) if signed_left else None

    def block(self, some: slice) -> Tensor:
        """Rows of the bounds, which may lie below 0, float32 [some, group, CLASSES].

        Places beyond the last unit hold inf.
        """
        height, count, device = some.stop - some.start, len(self.right), self.left.device
        groups = max(2, -(-count // CLASSES))
        whole = reused((height, groups * CLASSES), torch.float32, device)
        found = torch.mm(self.left[some], self.right.T, out=whole[:, :count])
        if self.signed is not None:
            within = reused((height, count), torch.float32, device)
            found.sub_(torch.mm(self.signed[0][some], self.signed[1].T, out=within).abs_())
        whole[:, count:] = torch.inf
        return whole.view(height, groups, CLASSES)


def _two_least(costs: _Costs) -> tuple[Tensor, Tensor]:
    """For each row the place of its least entry, int64 [unit], and a lower bound of all others, float64 [unit]; on the CPU.

    One pass leaves the least entry of each class; the rest is found among these, and within the class of the least one.
    """
    count = len(costs.left)
    on_cpu = costs.left.device.type == "cpu"
    partner, bound = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)

    def least_two(block: Tensor) -> tuple[Tensor, Tensor]:
        least, chosen = block.amin(dim=1).topk(2, dim=1, largest=False)
        own = chosen[:, :1]
        members = block.gather(2, own[:, None].expand(-1, block.shape[1], 1))[:, :, 0]
        values, group = members.topk(2, dim=1, largest=False)
        return (group[:, 0] * CLASSES + own[:, 0]).cpu(), torch.minimum(least[:, 1], values[:, 1]).clamp_min(0).cpu().double()

    def work(strip: slice) -> None:
        for some in _steps(strip, max(1, (AT_ONCE if on_cpu else ON_DEVICE) // count)):
            partner[some], bound[some] = least_two(costs.block(some))

    rows.in_strips(count, work, size=count**2, threads=on_cpu)
    return partner, bound


def _steps(strip: slice, step: int) -> Iterator[slice]:
    for first in range(strip.start, strip.stop, step):
        yield slice(first, min(first + step, strip.stop))
