"""Matching the hidden units of two experts: Git Re-Basin's weight matching, and its extension to sign and scale.

What a unit allows is its kind's (`UnitKind`): its up row times s, its down column divided by s**power, where s may be
negative, or of any magnitude, or neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hf_moe_lmc.matching import rows
from hf_moe_lmc.matching.assignment import SPARSE, assign
from hf_moe_lmc.matching.moves import worthwhile
from hf_moe_lmc.matching.options import UnitMethod
from hf_moe_lmc.moe.experts import MATRICES, Bank, SharedExpert
from hf_moe_lmc.moe.notation import UNIT_KINDS, UnitKind
from hf_moe_lmc.symmetry.elements import UnitSymmetry

SCALE_GAIN = 0.01  # scales are kept where they lower an expert's remaining squared distance by more than this share
BLOCK = 32 << 20  # bytes of one row block of a unit cost matrix
SMALL = 1024  # experts of at most so many units are always matched by their full similarity
PROBE = 128  # columns that a first guess of the signs looks at
STORED = (torch.bfloat16, torch.float16, torch.float32)  # dtypes in which weights are held; others in float32


@dataclass(frozen=True)
class UnitRows:
    """The weights of one expert by hidden unit: a unit's row of gate and up (with its bias), its down column.

    In the dtype and layout of the checkpoint, or in float32 where a bias is joined; all arithmetic is float32 at least.

    Attributes:
        gate: [unit, model (+ 1 with a bias)]; [unit, 0] where the expert has no gate.
        up: [unit, model (+ 1 with a bias)]; the bias counts from the kind's offset, so that a scale acts on all of it.
        down: [unit, model].
        down_bias: [model], or None; it belongs to no unit.
        kind: what the units allow.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    down_bias: Tensor | None = None
    kind: UnitKind = UNIT_KINDS["swiglu"]

    @classmethod
    def of(cls, experts: Bank | SharedExpert, expert: int | None, device: torch.device) -> UnitRows:
        """Reads one expert of a bank, or with `expert` None the shared one."""
        kind, roles = experts.kind, experts.roles

        def matrix(role: str) -> Tensor:
            values = experts.values(role, expert)
            return values.to(device, values.dtype if values.dtype in STORED else torch.float32)

        def with_bias(role: str, offset: int = 0) -> Tensor:
            bias = f"{role}_bias"
            if bias not in roles:
                return matrix(role)
            return torch.cat([matrix(role).float(), matrix(bias).float()[:, None] + offset], dim=1)

        gated = "gate" in roles
        jobs = [lambda: with_bias("up", kind.offset), lambda: matrix("down"), *([lambda: with_bias("gate")] if gated else [])]
        up, down, *rest = rows.all_of(*jobs) if experts.expert_numel > rows.BLOCK else [job() for job in jobs]
        gate = rest[0] if gated else up[:, :0]
        down_bias = matrix("down_bias").float() if "down_bias" in roles else None
        return cls(gate, up, down, down_bias, kind)

    @property
    def count(self) -> int:
        return len(self.up)

    @cached_property
    def squares(self) -> dict[str, Tensor]:
        """Squared norms of the rows of gate, up and down, float64 [unit], on the CPU."""
        return {role: rows.squares(getattr(self, role)) for role in MATRICES}

    @cached_property
    def norm_ratio(self) -> Tensor:
        """What balances norms: (||u|| / ||d||)^(1 / (1 + power)) of each unit, nan where either is 0; float64 [unit]."""
        up, down = self.squares["up"].sqrt(), self.squares["down"].sqrt()
        return torch.where((up > 0) & (down > 0), up / down, torch.nan).pow(1 / (1 + self.kind.power))

    @cached_property
    def squared_norm(self) -> float:
        return float(torch.stack(list(self.squares.values())).sum())

    def squared_distance(self, other: UnitRows) -> float:
        """Squared Frobenius distance, from differences."""
        total = sum(float(rows.distances(getattr(self, role), getattr(other, role)).sum()) for role in MATRICES)
        return total + self.bias_distance(other)

    def bias_distance(self, other: UnitRows) -> float:
        if self.down_bias is None or other.down_bias is None:
            return 0.0
        return float((self.down_bias - other.down_bias).square().sum(dtype=torch.float64))


@dataclass(frozen=True)
class UnitMatch:
    """The hidden units of B's expert in A's coordinates.

    Attributes:
        symmetry: acts on B's units; its scales are exactly +-1 unless they pay.
        squared_norm: squared Frobenius norm of A's expert.
        squared_before: squared distance with the units as they were.
        squared_after: the remaining squared distance.
        certificate: why the permutation is optimal; a key of `certificate.CERTIFICATES`.
    """

    symmetry: UnitSymmetry
    squared_norm: float
    squared_before: float
    squared_after: float
    certificate: str


@dataclass(frozen=True)
class Paired:
    """Two experts with their units paired, and the distances that this leaves. All [unit], on the CPU.

    Attributes:
        permutation: of B's units, int64.
        sign: +-1, float32: the better one of each unit without scales, where the kind and the method allow signs.
        gate, up, down: squared distances of the rows with these signs, float64.
    """

    a: UnitRows
    b: UnitRows
    units: UnitMethod
    permutation: Tensor
    sign: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, a: UnitRows, b: UnitRows, units: UnitMethod, permutation: Tensor) -> Paired:
        permutation = permutation.cpu()
        signed = a.kind.sign and units == "scaled"
        sign = _probed_sign(a, b, permutation) if signed else torch.ones(len(permutation))
        gate, up, down = (
            rows.distances(getattr(a, role), getattr(b, role), permutation, None if role == "gate" else sign)
            for role in MATRICES
        )
        pairs = cls(a, b, units, permutation, sign, gate, up, down)
        return pairs._corrected() if signed else pairs

    @property
    def signed(self) -> bool:
        return self.a.kind.sign and self.units == "scaled"

    @property
    def scalable(self) -> bool:
        return self.a.kind.scale and self.units == "scaled"

    @cached_property
    def squares(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """||u||^2, ||u'||^2, ||d||^2, ||d'||^2."""
        a, b = self.a.squares, self.b.squares
        return a["up"], b["up"][self.permutation], a["down"], b["down"][self.permutation]

    @cached_property
    def inner(self) -> tuple[Tensor, Tensor]:
        """<u, sign u'> and <d, sign d'>."""
        u, u2, d, d2 = self.squares
        return (u + u2 - self.up) / 2, (d + d2 - self.down) / 2

    def _corrected(self) -> Paired:
        """With the other sign where the first guess was wrong."""
        wrong = (self.inner[0] + self.inner[1] < 0).nonzero()[:, 0]
        if not len(wrong):
            return self
        sign, up, down = self.sign.clone(), self.up.clone(), self.down.clone()
        sign[wrong] *= -1
        for role, distances in (("up", up), ("down", down)):
            x, y = (getattr(side, role) for side in (self.a, self.b))
            places = wrong.to(x.device), self.permutation[wrong].to(x.device)
            distances[wrong] = rows.distances(x[places[0]].float(), y[places[1]].float(), None, sign[wrong])
        return replace(self, sign=sign, up=up, down=down)

    @cached_property
    def ratio(self) -> Tensor:
        """The magnitude of the scale that balances norms; 1 where a norm is 0, or where none is allowed."""
        if not self.scalable:
            return torch.ones(len(self.permutation), dtype=torch.float64)
        return (self.a.norm_ratio / self.b.norm_ratio[self.permutation]).nan_to_num(nan=1.0)

    @cached_property
    def scaled_parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Up and down distance with the balancing scale, and whether its sign is `sign`; all [unit].

        Written around the distance without scales, so that hardly anything cancels where the scales are near 1.
        """
        u, u2, d, d2 = self.squares
        on_up, on_down = self.inner
        s, power = self.ratio, self.a.kind.power
        same_sign = (s * on_up + on_down / s**power >= 0) if self.signed else torch.ones(len(s), dtype=torch.bool)
        scaled = []
        for x, y, inner, distance, factor in ((u, u2, on_up, self.up, s), (d, d2, on_down, self.down, s**-power)):
            more = factor - 1
            near = distance - more * (x - y - distance) + more.square() * y
            scaled.append(torch.where(same_sign, near, x + factor.square() * y + 2 * factor * inner))
        return scaled[0], scaled[1], same_sign

    @property
    def squared_before(self) -> float:
        """Squared distance without these signs: of the experts as they are, if no unit moves."""
        u, u2, d, d2 = self.squares
        flipped = self.sign < 0
        up, down = (
            torch.where(flipped, 2 * (u + u2) - self.up, self.up),
            torch.where(flipped, 2 * (d + d2) - self.down, self.down),
        )
        return float(self.gate.sum() + up.sum() + down.sum()) + self.a.bias_distance(self.b)

    def settled(self, standing: Paired) -> Paired:
        """With the units back in their places that gain no more than noise by moving, see `moves`.

        Args:
            standing: the same experts, no unit moved.
        """
        moves = worthwhile(self.permutation, standing.cost()[0], self.cost()[0])
        if bool((moves | (self.permutation == standing.permutation)).all()):
            return self

        def kept(own: Tensor, others: Tensor) -> Tensor:
            return torch.where(moves, own, others)

        return replace(
            self,
            permutation=kept(self.permutation, standing.permutation),
            sign=kept(self.sign, standing.sign),
            gate=kept(self.gate, standing.gate),
            up=kept(self.up, standing.up),
            down=kept(self.down, standing.down),
        )

    def cost(self) -> tuple[Tensor, Tensor]:
        """The cost of each pair (see `unit_cost`, constants included), and a bound on its error; float64 [unit]."""
        up, down, same_sign = self.scaled_parts
        u, u2, d, d2 = self.squares
        s, t = self.ratio, self.ratio**-self.a.kind.power
        width = max(self.a.up.shape[1], self.a.gate.shape[1])
        terms = self.gate + self.up + self.down
        terms = terms + 2 * (s - 1).abs() * (u + u2 + self.up) + 2 * (t - 1).abs() * (d + d2 + self.down)
        terms = terms + s.square() * u2 * (s - 1).square() + t.square() * d2 * (t - 1).square()
        terms = terms + torch.where(same_sign, 0.0, u + d + s.square() * u2 + t.square() * d2)
        return self.gate + up + down, 4 * rows.sum_error(width) * terms

    def match(self, certificate: str) -> UnitMatch:
        """Decides which units move and about the scales, each only where it is more than noise.

        Moves that do not pay are undone, see `settled`. Scales that do not pay are dropped for the whole expert, signs kept:
        two fine-tunes of one model are then rewritten without loss. They pay where they lower the remaining squared distance
        by more than SCALE_GAIN of it, and by more than 1 / model of it. On pure noise, one free scale per unit gains a third
        of the latter. Where the kind of the units allows no scales, or with `plain`, there are none.
        """
        nothing = torch.arange(len(self.permutation))
        if torch.equal(self.permutation, nothing):
            return self._scaled(certificate, self.squared_before)
        standing = Paired.of(self.a, self.b, self.units, nothing)
        return self.settled(standing)._scaled(certificate, standing.squared_before)

    def _scaled(self, certificate: str, squared_before: float) -> UnitMatch:
        """With scales where they pay."""
        gate = float(self.gate.sum()) + self.a.bias_distance(self.b)
        after, norm = gate + float(self.up.sum() + self.down.sum()), self.a.squared_norm
        least = (1 - max(SCALE_GAIN, 1 / self.a.down.shape[1])) * after
        up, down, same_sign = self.scaled_parts
        if self.scalable and gate + float(up.sum() + down.sum()) < least:
            scale = (torch.where(same_sign, 1, -1) * self.sign * self.ratio).float()
            exact = (
                rows.distances(getattr(self.a, role), getattr(self.b, role), self.permutation, factor)
                for role, factor in (("up", scale), ("down", 1 / scale**self.a.kind.power))
            )
            scaled = gate + sum(float(distance.sum()) for distance in exact)
            if scaled < least:
                return UnitMatch(UnitSymmetry(self.permutation, scale), norm, squared_before, scaled, certificate)
        return UnitMatch(UnitSymmetry(self.permutation, self.sign), norm, squared_before, after, certificate)


def _probed_sign(a: UnitRows, b: UnitRows, permutation: Tensor) -> Tensor:
    """A first guess of the sign of each pair, from few columns; float32 [unit]."""
    place = permutation.to(b.up.device)

    def probe(x: Tensor, y: Tensor) -> Tensor:
        return (x[:, :PROBE].float() * y[:, :PROBE][place].float()).sum(dim=1)

    inner = probe(a.up, b.up) + probe(a.down, b.down)
    return torch.where(inner < 0, -1.0, 1.0).cpu()


def is_wide(count: int) -> bool:
    """Whether so many hidden units are matched from sketches first."""
    return count > SMALL


def match_units(a: UnitRows, b: UnitRows, units: UnitMethod) -> UnitMatch:
    """Matches the hidden units of two experts by one linear assignment problem over all of `unit_cost`.

    Which moves and scales the match keeps: see `Paired.match`. Where the kind allows no permutation, units stay where they are.

    Example:
        B's units are A's in reverse, with other signs:

        >>> a = UnitRows(*torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0)))
        >>> b = UnitRows(a.gate.flip(0), -a.up.flip(0), -a.down.flip(0))
        >>> match = match_units(a, b, "scaled")
        >>> match.symmetry.order.tolist(), match.symmetry.scale.tolist(), match.squared_after
        ([3, 2, 1, 0], [-1.0, -1.0, -1.0, -1.0], 0.0)
    """
    if not a.kind.permutation:
        permutation, certificate = torch.arange(a.count), "fixed"
    else:
        permutation, certificate = assign(unit_cost(a, b, units)), "exact" if is_wide(a.count) else "small"
    return Paired.of(a, b, units, permutation).match(certificate)


def unit_cost(a: UnitRows, b: UnitRows, units: UnitMethod, subset: Tensor | None = None) -> Tensor:
    """Cost of matching A's unit k with B's unit l, [unit, unit], up to constants of each row and column.

    plain:  ||g - g'||^2 + ||u - u'||^2 + ||d - d'||^2.
    scaled: ||g - g'||^2 + min over the signs that the kind allows of ||u - s u'||^2 + ||d - d'/s^p||^2, with
    |s|^(1+p) = (||u|| ||d'||) / (||d|| ||u'||), the scale that balances the norms (1 where a norm is 0, or where the kind
    allows no scale), and p the kind's power.

    Args:
        subset: int64 [few]; only these units of A.

    Returns:
        float64, or float32 if it has more than SPARSE rows. Computed in blocks of rows: besides the result, B's expert in
        float32 and four times BLOCK bytes.
    """
    count, power, device = b.count, a.kind.power, a.up.device
    signed, scalable = a.kind.sign and units == "scaled", a.kind.scale and units == "scaled"
    wanted = torch.arange(a.count) if subset is None else subset.cpu()
    cost = torch.empty(len(wanted), count, dtype=torch.float32 if len(wanted) > SPARSE else torch.float64)
    to_gate, to_up, to_down = b.gate.float(), b.up.float(), b.down.float()
    up, down = (b.squares[role].to(device, torch.float32) for role in ("up", "down"))
    ratio_a, ratio_b = a.norm_ratio.to(device, torch.float32), b.norm_ratio.to(device, torch.float32)
    step = max(1, BLOCK // (4 * count))
    for first in range(0, len(wanted), step):
        places = slice(first, first + step)
        chosen = places if subset is None else wanted[places].to(device)
        block = (a.gate[chosen].float() @ to_gate.T).mul_(-2)
        on_up, on_down = a.up[chosen].float() @ to_up.T, a.down[chosen].float() @ to_down.T
        if scalable:
            scale = ratio_a[chosen, None] / ratio_b[None, :]
            scale.nan_to_num_(nan=1.0)
            inner = on_up.mul_(scale).add_(on_down.div_(scale.pow(power)))
        else:
            inner = on_up.add_(on_down)
        block.sub_(inner.abs_() if signed else inner, alpha=2)
        if scalable:
            scale.square_()
            block.add_(torch.mul(scale, up, out=on_up)).add_(torch.div(down, scale.pow_(power), out=on_down))
        cost[places] = block.to("cpu", cost.dtype)
    return cost
