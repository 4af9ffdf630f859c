"""Weight matching of two MoE blocks: the paper's Algorithm 1, over the whole symmetry of gated experts.

Two stages, each a linear assignment problem and without data:

1. the order of the experts, from the router rows (`gate`, Eq. 10) or from Gram matrices that no symmetry of the hidden
   units changes (`expert`, Eq. 11 generalised to gate, up and down);
2. for each matched pair of experts, the order of the hidden units (Git Re-Basin's weight matching), and with `scaled`
   units the sign and scale of the linear branch as well.

The two stages are not the joint optimum over both; nothing here claims that they are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_moe_lmc.assignment import assign, assign_groups
from hf_moe_lmc.errors import CheckpointError, InputError
from hf_moe_lmc.family import RouterKind
from hf_moe_lmc.layer import ActedLayer, LayerSource, MoELayer
from hf_moe_lmc.symmetry import LayerSymmetry

OrderMethod = Literal["gate", "expert", "best"]
UnitMethod = Literal["plain", "scaled"]

SCALE_GAIN = 0.01  # scales are kept where they lower an expert's remaining squared distance by more than this share
WORKSPACE = 256 << 20  # bytes for the Gram matrices of one role; two experts in float32 where that is more
BLOCK = 32 << 20  # bytes of one row block of a unit cost matrix
SKETCH_SEED = 20250911  # one fixed projection, independent of the weights


def check_methods(order: str, units: str) -> None:
    """Raises InputError for an unknown `order` or `units`."""
    for what, value, known in (("order", order, get_args(OrderMethod)), ("units", units, get_args(UnitMethod))):
        if value not in known:
            raise InputError(f"{what} {value!r}: expected one of {', '.join(known)}")


# --- hidden units of one pair of experts --------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitRows:
    """The weights of one expert by hidden unit, float32: a unit's row of gate and up (with its bias), its down column.

    Attributes:
        gate: [unit, model (+ 1 with a bias)].
        up: [unit, model (+ 1 with a bias)].
        down: [unit, model].
        down_bias: [model], or None; it belongs to no unit.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    down_bias: Tensor | None = None

    @cached_property
    def norm_ratio(self) -> Tensor:
        """sqrt(||u|| / ||d||) of each unit, nan where either is 0."""
        up, down = self.up.norm(dim=1), self.down.norm(dim=1)
        return torch.where((up > 0) & (down > 0), up / down, torch.nan).sqrt()

    @classmethod
    def of(cls, source: LayerSource, roles: Sequence[str], expert: int | None, device: torch.device) -> UnitRows:
        """Reads one routed expert, or with `expert` None the shared one, of a source that has `roles`."""
        prefix = "" if expert is not None else "shared_"

        def read(role: str) -> Tensor:
            return source.read(prefix + role, expert).to(device=device, dtype=torch.float32)

        def rows(role: str) -> Tensor:
            bias = f"{role}_bias"
            return torch.cat([read(role), read(bias)[:, None]], dim=1) if prefix + bias in roles else read(role)

        return cls(rows("gate"), rows("up"), read("down"), read("down_bias") if prefix + "down_bias" in roles else None)

    @cached_property
    def squared_norm(self) -> float:
        return _squared(self.gate) + _squared(self.up) + _squared(self.down)

    def squared_distance(self, other: UnitRows) -> float:
        """Squared Frobenius distance, from differences."""
        total = sum(_squared(getattr(self, role) - getattr(other, role)) for role in ("gate", "up", "down"))
        return total + self._bias_distance(other)

    def _bias_distance(self, other: UnitRows) -> float:
        return 0.0 if self.down_bias is None or other.down_bias is None else _squared(self.down_bias - other.down_bias)


@dataclass(frozen=True)
class UnitMatch:
    """The hidden units of B's expert in A's coordinates.

    Attributes:
        order: int64 [unit]; scale: float32 [unit], exactly +-1 unless `scaled`.
        squared_norm: squared Frobenius norm of A's expert.
        squared_before: squared distance with the units as they were.
        squared_after: the remaining squared distance.
    """

    order: Tensor
    scale: Tensor
    scaled: bool
    squared_norm: float
    squared_before: float
    squared_after: float


def match_units(a: UnitRows, b: UnitRows, units: UnitMethod) -> UnitMatch:
    """Matches the hidden units of two experts by one linear assignment problem over `unit_cost`.

    Scales that do not pay are dropped for the whole expert, signs kept: two fine-tunes of one model are then rewritten
    without loss. They pay where they lower the remaining squared distance by more than SCALE_GAIN, and by more than three
    times what one free scale per unit gains on pure noise, 1 / (3 model).
    """
    order = assign(unit_cost(a, b, units)).to(a.up.device)
    norm, before = a.squared_norm, a.squared_distance(b)
    gate = _squared(a.gate - b.gate[order]) + a._bias_distance(b)
    up, down = b.up[order], b.down[order]
    if units == "plain":
        scale = torch.ones(len(order), device=order.device)
        after = gate + _squared(a.up - up) + _squared(a.down - down)
        return UnitMatch(order.cpu(), scale.cpu(), False, norm, before, after)
    on_up, on_down = (a.up * up).sum(dim=1), (a.down * down).sum(dim=1)
    sign = _sign(on_up + on_down)
    after = gate + _scaled_distance(a, up, down, sign)
    ratio = a.norm_ratio / b.norm_ratio[order]
    ratio = torch.where(ratio.isnan(), 1, ratio)
    scale = _sign(ratio * on_up + on_down / ratio) * ratio
    after_scaled = gate + _scaled_distance(a, up, down, scale)
    scaled = after_scaled < (1 - max(SCALE_GAIN, 1 / a.down.shape[1])) * after
    if scaled:
        sign, after = scale, after_scaled
    return UnitMatch(order.cpu(), sign.cpu(), scaled, norm, before, after)


def unit_cost(a: UnitRows, b: UnitRows, units: UnitMethod) -> Tensor:
    """Cost of matching A's unit k with B's unit l, float64 [unit, unit], up to constants of each row and column.

    plain:  ||g - g'||^2 + ||u - u'||^2 + ||d - d'||^2.
    scaled: ||g - g'||^2 + min over +-s of ||u - s u'||^2 + ||d - d'/s||^2 with s^2 = (||u|| ||d'||) / (||d|| ||u'||),
    the scale that balances the norms (s = +-1 where a norm is 0).

    Computed in blocks of rows: besides the result, BLOCK bytes for each of a few temporaries.
    """
    count = len(a.up)
    cost = torch.empty(count, count, dtype=torch.float64)
    step = max(1, BLOCK // (4 * count))
    for first in range(0, count, step):
        rows = slice(first, first + step)
        block = -2 * (a.gate[rows] @ b.gate.T)
        on_up, on_down = a.up[rows] @ b.up.T, a.down[rows] @ b.down.T
        if units == "plain":
            block -= 2 * (on_up + on_down)
        else:
            scale = a.norm_ratio[rows, None] / b.norm_ratio[None, :]
            scale = scale.masked_fill_(scale.isnan(), 1)
            block += scale.square() * b.up.square().sum(dim=1) + b.down.square().sum(dim=1) / scale.square()
            block -= 2 * (scale * on_up + on_down / scale).abs()
        cost[rows] = block.to("cpu", torch.float64)
    return cost


def _scaled_distance(a: UnitRows, up: Tensor, down: Tensor, scale: Tensor) -> float:
    return _squared(a.up - scale[:, None] * up) + _squared(a.down - down / scale[:, None])


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0)


def _squared(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


# --- order of the experts -------------------------------------------------------------------------------------------


def gate_cost(a: LayerSource, b: LayerSource, roles: Sequence[str], router: RouterKind) -> Tensor:
    """Distances between router rows, float64 [expert, expert] (Eq. 10).

    The rows of a softmax router are centred, since translating them changes nothing; a sigmoid router's are not. A
    router bias counts as one more column; a correction bias steers only the selection and does not count.
    """

    def rows(source: LayerSource) -> Tensor:
        parts = [source.read("router").double()]
        if "router_bias" in roles:
            parts.append(source.read("router_bias").double()[:, None])
        joined = torch.cat(parts, dim=1)
        return joined - joined.mean(dim=0) if router == "softmax" else joined

    return torch.cdist(rows(a), rows(b), compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class ExpertCost:
    """Distances between the Gram matrices of experts (Eq. 11), and the form they were computed in.

    Attributes:
        values: float64 [expert, expert].
        form: `gram` (d x d matrices), `products` (no Gram matrix is formed), or `sketch` (Gram matrices times one fixed
            random d x k matrix, where they would not fit the workspace; an unbiased estimate).
        columns: k for a sketch, else None.
    """

    values: Tensor
    form: Literal["gram", "products", "sketch"]
    columns: int | None = None


def expert_cost(a: MoELayer, b: MoELayer, units: UnitMethod, device: torch.device, workspace: int | None = None) -> ExpertCost:
    """sqrt of the summed squared distances between the Gram matrices of gate, up and down (Eq. 11, generalised).

    A Gram matrix X^T X over the hidden units does not see their order, nor their signs. With `scaled` units each unit is
    first balanced (||u|| = ||d||), so that it does not see their scales either; `plain` takes the weights as they are,
    as the paper does. The cheapest form that fits max(`workspace`, two experts in float32) bytes is used; `workspace` is
    WORKSPACE by default.
    """
    experts, unit, width = a.experts, a.sizes["unit"], a.sizes["model"]
    budget = max(WORKSPACE if workspace is None else workspace, 2 * 4 * a.expert_numel)
    columns = min(width, max(1, budget // (4 * experts * width)))
    gram_work = 2 * unit * width**2 + experts * width**2  # per expert of A and role
    if experts * unit**2 * width < gram_work and 4 * experts * unit * width <= budget:
        form: Literal["gram", "products", "sketch"] = "products"
        features, inner = (lambda rows: rows), _product_inner
    elif columns == width:
        form, inner = "gram", _feature_inner
        features = lambda rows: rows.T @ rows  # noqa: E731
    else:
        form, inner = "sketch", _feature_inner
        features = _sketch(columns, device)
    total = torch.zeros(experts, experts, dtype=torch.float64)
    for role in ("gate", "up", "down"):
        total += _squared_gram_distances(
            _rows_of(a, role, units, device), _rows_of(b, role, units, device), experts, features, inner
        )
    return ExpertCost(total.clamp_min_(0).sqrt_(), form, columns if form == "sketch" else None)


def _rows_of(layer: MoELayer, role: str, units: UnitMethod, device: torch.device) -> Callable[[int], Tensor]:
    """Expert -> its [unit, width] matrix of `role` whose Gram matrix counts, balanced if `units` are scaled."""

    def rows(expert: int) -> Tensor:
        if units == "plain" and role != "down":
            values = layer.read(role, expert).to(device, torch.float32)
            if f"{role}_bias" in layer.roles:
                values = torch.cat([values, layer.read(f"{role}_bias", expert).to(device, torch.float32)[:, None]], dim=1)
            return values
        whole = UnitRows.of(layer, layer.roles, expert, device)
        values = getattr(whole, role)
        if units == "scaled" and role != "gate":
            ratio = whole.norm_ratio.nan_to_num(1.0)[:, None]
            values = values / ratio if role == "up" else values * ratio
        if role == "down" and whole.down_bias is not None:
            values = torch.cat([values, whole.down_bias[None]])
        return values

    return rows


def _squared_gram_distances(
    of_a: Callable[[int], Tensor],
    of_b: Callable[[int], Tensor],
    experts: int,
    features: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """||K_i - K'_j||^2 for all i, j, from inner products; A's features are held, B's are made one at a time."""
    first = features(of_a(0))
    held = first.new_empty(experts, *first.shape)
    for i in range(experts):
        held[i] = features(of_a(i)) if i else first
    norms_a = torch.stack([inner(held[i : i + 1], held[i])[0] for i in range(experts)])
    norms_b, products = [], []
    for j in range(experts):
        feature = features(of_b(j))
        norms_b.append(inner(feature[None], feature)[0])
        products.append(inner(held, feature))
    return norms_a[:, None] + torch.stack(norms_b)[None, :] - 2 * torch.stack(products, dim=1)


def _feature_inner(held: Tensor, feature: Tensor) -> Tensor:
    return torch.mv(held.flatten(1), feature.flatten()).to("cpu", torch.float64)


def _product_inner(held: Tensor, feature: Tensor) -> Tensor:
    """<X^T X, Y^T Y> = ||X Y^T||^2."""
    return torch.stack([(rows @ feature.T).square().sum(dtype=torch.float64) for rows in held]).cpu()


def _sketch(columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    def features(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(SKETCH_SEED)
        signs = torch.randint(2, (rows.shape[1], columns), generator=generator).to(device, torch.float32) * 2 - 1
        return rows.T @ (rows @ signs) / columns**0.5

    return features


# --- one layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matching:
    """The group element that takes one block of B close to A's, and how close.

    Distances are Frobenius norms of differences, of the routed experts' weights unless named otherwise.

    Attributes:
        order_method: the order that was kept, `gate` or `expert`.
        candidates: distance after the units for each order that was tried.
        expert_cost_form: form and, for a sketch, number of columns of the `expert` cost; None if not computed.
        norm: Frobenius norm of A's routed experts.
        scales_kept: number of experts (the shared one included) whose scales paid.
    """

    symmetry: LayerSymmetry
    order_method: str
    candidates: dict[str, float]
    expert_cost_form: str | None
    norm: float
    distance_before: float
    distance_after_order: float
    distance_after_units: float
    router_distance_before: float
    router_distance_after: float
    shared_distance_before: float
    shared_distance_after: float
    scales_kept: int
    seconds: float


@dataclass
class _Pairs:
    """Matched pairs of experts, each computed once."""

    a: MoELayer
    b: MoELayer
    units: UnitMethod
    device: torch.device
    matches: dict[tuple[int, int], UnitMatch] = field(default_factory=dict)

    def match(self, i: int, j: int) -> UnitMatch:
        if (i, j) not in self.matches:
            self.matches[i, j] = match_units(self._rows(self.a, i), self._rows(self.b, j), self.units)
        return self.matches[i, j]

    def squared_before(self, i: int, j: int) -> float:
        if (i, j) in self.matches:
            return self.matches[i, j].squared_before
        return self._rows(self.a, i).squared_distance(self._rows(self.b, j))

    def _rows(self, layer: MoELayer, expert: int) -> UnitRows:
        rows = UnitRows.of(layer, layer.roles, expert, self.device)
        if not math.isfinite(rows.squared_norm):
            raise _not_finite(layer, f"expert {expert}")
        return rows


def match_layer(
    a: MoELayer,
    b: MoELayer,
    *,
    groups: int = 1,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    device: torch.device | None = None,
) -> Matching:
    """Algorithm 1 of the paper on one pair of blocks.

    Args:
        groups: expert groups that bind; experts then move only within and with their groups.
        order: `gate`, `expert`, or `best`: whichever leaves the lower distance of the expert weights once the units are
            matched (if both agree, the units are matched once).
        units: `plain` or `scaled`.

    Memory: two experts in float32, one float64 [unit, unit] matrix, and the workspace of `expert_cost`.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    for layer in (a, b):
        _check_router(layer)
    form = None
    orders: dict[str, Tensor] = {}
    if order in ("gate", "best"):
        orders["gate"] = assign_groups(gate_cost(a, b, a.roles, a.family.router), groups)
    if order in ("expert", "best"):
        cost = expert_cost(a, b, units, device)
        _check_finite(cost.values, a, b)
        form = cost.form if cost.columns is None else f"{cost.form} of {cost.columns} columns"
        orders["expert"] = assign_groups(cost.values, groups)
    pairs = _Pairs(a, b, units, device)
    candidates = {
        method: sum(pairs.match(i, int(j)).squared_after for i, j in enumerate(chosen)) ** 0.5
        for method, chosen in orders.items()
    }
    method = min(candidates, key=lambda name: candidates[name])
    chosen = orders[method]
    matches = [pairs.match(i, int(j)) for i, j in enumerate(chosen)]
    shared = _match_shared(a, b, units, device)
    symmetry = LayerSymmetry(
        expert_order=chosen,
        unit_order=torch.stack([match.order for match in matches]),
        unit_scale=torch.stack([match.scale for match in matches]),
        shared_order=shared.order,
        shared_scale=shared.scale,
    )
    router = a.read("router").double()
    return Matching(
        symmetry=symmetry,
        order_method=method,
        candidates=candidates,
        expert_cost_form=form,
        norm=sum(match.squared_norm for match in matches) ** 0.5,
        distance_before=sum(pairs.squared_before(i, i) for i in range(a.experts)) ** 0.5,
        distance_after_order=sum(match.squared_before for match in matches) ** 0.5,
        distance_after_units=candidates[method],
        router_distance_before=_squared(router - b.read("router").double()) ** 0.5,
        router_distance_after=_squared(router - ActedLayer(b, symmetry).read("router").double()) ** 0.5,
        shared_distance_before=shared.squared_before**0.5,
        shared_distance_after=shared.squared_after**0.5,
        scales_kept=sum(match.scaled for match in matches) + int(shared.scaled),
        seconds=time.perf_counter() - started,
    )


def _check_router(layer: MoELayer) -> None:
    """Raises CheckpointError, naming the first row that is not finite."""
    bad = (~layer.read("router").isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise _not_finite(layer, f"router row {int(bad[0])}")


def _check_finite(cost: Tensor, a: MoELayer, b: MoELayer) -> None:
    """Raises CheckpointError, naming the expert of A or B that makes a cost [expert, expert] not finite."""
    bad = ~cost.isfinite()
    if bool(bad.any()):
        rows, columns = bad.all(dim=1).nonzero(), bad.all(dim=0).nonzero()
        raise _not_finite(a, f"expert {int(rows[0])}") if len(rows) else _not_finite(b, f"expert {int(columns[0])}")


def _not_finite(layer: MoELayer, what: str) -> CheckpointError:
    return CheckpointError(f"{layer.checkpoint.name}: layer {layer.index}: {what} holds NaN or infinite weights")


def _match_shared(a: MoELayer, b: MoELayer, units: UnitMethod, device: torch.device) -> UnitMatch:
    if "shared_up" not in a.roles:
        return UnitMatch(torch.arange(0), torch.ones(0), False, 0.0, 0.0, 0.0)
    shared = [UnitRows.of(layer, layer.roles, None, device) for layer in (a, b)]
    for layer, rows in zip((a, b), shared, strict=True):
        if not math.isfinite(rows.squared_norm):
            raise _not_finite(layer, "the shared expert")
    return match_units(shared[0], shared[1], units)
