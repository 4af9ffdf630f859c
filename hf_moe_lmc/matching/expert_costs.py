"""Costs of matching expert i with expert j: distances of router rows (Eq. 10) and of Gram matrices (Eq. 11, generalised)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_moe_lmc.matching.options import UnitMethod
from hf_moe_lmc.matching.units import UnitRows
from hf_moe_lmc.moe.experts import MATRICES, Bank

WORKSPACE = 256 << 20  # most bytes for the Gram matrices of one role; see `_workspace`
SKETCH_SEED = 20250911  # one fixed projection, independent of the weights


def gate_cost(a: Bank, b: Bank) -> Tensor:
    """Distances between router rows, float64 [expert, expert] (Eq. 10).

    The rows of a softmax router are centred, since translating them changes nothing; a sigmoid router's are not. A
    router bias counts as one more column; a correction bias steers only the selection and does not count.
    """

    def rows(bank: Bank) -> Tensor:
        parts = [bank.values("router").double()]
        if "router_bias" in bank.roles:
            parts.append(bank.values("router_bias").double()[:, None])
        joined = torch.cat(parts, dim=1)
        return joined - joined.mean(dim=0) if bank.router == "softmax" else joined

    return torch.cdist(rows(a), rows(b), compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class ExpertCost:
    """Distances between the Gram matrices of experts (Eq. 11), and the form they were computed in.

    Attributes:
        values: float64 [expert, expert].
        form: `gram` (d x d matrices), `products` (no Gram matrix is formed), or `sketch` (Gram matrices times one fixed
            random d x k matrix, where they would not fit the workspace; an unbiased estimate). Where hidden units cannot
            move, `direct`: the weights themselves.
        columns: k for a sketch, else None.
    """

    values: Tensor
    form: Literal["gram", "products", "sketch", "direct"]
    columns: int | None = None


def expert_cost(a: Bank, b: Bank, units: UnitMethod, device: torch.device, workspace: int | None = None) -> ExpertCost:
    """sqrt of the summed squared distances between the Gram matrices of gate, up and down (Eq. 11, generalised).

    A Gram matrix X^T X over the hidden units is invariant to their permutation and signs. With `scaled` units each unit is
    first balanced (||u|| = ||d||), so that it is invariant to their scales as well; `plain` takes the weights as they are,
    as the paper does. The cheapest form that fits `workspace` bytes is used, by default a few experts; see `_workspace`.
    """
    experts, unit, width = a.experts, a.unit_count, a.width
    budget = workspace or _workspace(4 * a.expert_numel)
    columns = min(width, max(1, budget // (4 * experts * width)))
    gram_work = 2 * unit * width**2 + experts * width**2  # per expert of A and role
    form: Literal["gram", "products", "sketch", "direct"]
    if not a.kind.permutation:
        columns = min(width, max(1, budget // (4 * experts * unit)))
        form, inner = "direct", _feature_inner
        features = (lambda rows: rows) if columns == width else _projection(width, columns, device)
    elif experts * unit**2 * width < gram_work and 4 * experts * unit * width <= budget:
        form, inner = "products", _product_inner
        features = lambda rows: rows  # noqa: E731
    elif columns == width:
        form, inner = "gram", _feature_inner
        features = lambda rows: rows.T @ rows  # noqa: E731
    else:
        form, inner = "sketch", _feature_inner
        features = _sketch(width, columns, device)
    total = torch.zeros(experts, experts, dtype=torch.float64)
    for role in [role for role in MATRICES if role in a.roles]:
        total += _squared_gram_distances(
            _rows_of(a, role, units, device), _rows_of(b, role, units, device), experts, features, inner
        )
    estimated = form == "sketch" or (form == "direct" and columns < width)
    return ExpertCost(total.clamp_min_(0).sqrt_(), form, columns if estimated else None)


def sketched_expert_cost(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Unbiased estimates of the squares of `expert_cost`, float64 [expert, expert], from Gram matrices of sketches.

    Args:
        a, b: of each expert S^T K S / r for each role, [role, r, r], with S a Rademacher matrix of r columns.

    For a difference D of Gram matrices, s_p.D s_q has the mean square ||D||^2 if p and q are different columns. The spread
    of the mean over all of them is about sqrt(4 / r^2) of it where D is spread over many directions.
    """
    columns = a[0].shape[-1]
    apart = 1 - torch.eye(columns, dtype=torch.float64)
    flat_a, flat_b = (torch.stack([gram * apart for gram in side]).flatten(1) for side in (a, b))
    return torch.cdist(flat_a, flat_b, compute_mode="donot_use_mm_for_euclid_dist").square() * columns / max(1, columns - 1)


def margin(cost: Tensor, permutation: Tensor) -> float:
    """Largest ratio of the cost of a chosen pair to the other costs in its row and its column; 0 where there are none."""
    chosen = cost.gather(1, permutation[:, None])
    others = cost.scatter(1, permutation[:, None], torch.inf)
    least = torch.minimum(others.amin(dim=1), others.amin(dim=0)[permutation])
    return float((chosen[:, 0] / least).nan_to_num(nan=1.0, posinf=1e300).max())


def _workspace(expert: int) -> int:
    """Bytes for the Gram matrices of one role: eight experts in float32, at most WORKSPACE unless two are more than that."""
    return max(2 * expert, min(8 * expert, WORKSPACE))


def _rows_of(bank: Bank, role: str, units: UnitMethod, device: torch.device) -> Callable[[int], Tensor]:
    """Expert -> its [unit, width] matrix of `role` whose Gram matrix counts, balanced if `units` are scaled."""
    balanced = units == "scaled" and bank.kind.scale

    def rows(expert: int) -> Tensor:
        if role == "gate" or (role == "up" and not balanced):
            values = bank.values(role, expert).to(device, torch.float32)
            if f"{role}_bias" in bank.roles:
                bias = bank.values(f"{role}_bias", expert).to(device, torch.float32)
                values = torch.cat([values, bias[:, None] + (bank.kind.offset if role == "up" else 0)], dim=1)
            return values
        unit_rows = UnitRows.of(bank, expert, device)
        values = getattr(unit_rows, role).float()
        if balanced:
            ratio = unit_rows.norm_ratio.nan_to_num(1.0)[:, None].to(device, torch.float32)
            values = values / ratio if role == "up" else values * ratio**bank.kind.power
        if role == "down" and unit_rows.down_bias is not None:
            values = torch.cat([values, unit_rows.down_bias[None]])
        return values

    return rows


def _squared_gram_distances(
    rows_a: Callable[[int], Tensor],
    rows_b: Callable[[int], Tensor],
    experts: int,
    features: Callable[[Tensor], Tensor],
    inner: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """||K_i - K'_j||^2 for all i, j, from inner products; A's features are held, B's are made one at a time."""
    first = features(rows_a(0))
    held = first.new_empty(experts, *first.shape)
    for i in range(experts):
        held[i] = features(rows_a(i)) if i else first
    norms_a = torch.stack([inner(held[i : i + 1], held[i])[0] for i in range(experts)])
    norms_b, products = [], []
    for j in range(experts):
        feature = features(rows_b(j))
        norms_b.append(inner(feature[None], feature)[0])
        products.append(inner(held, feature))
    return norms_a[:, None] + torch.stack(norms_b)[None, :] - 2 * torch.stack(products, dim=1)


def _feature_inner(held: Tensor, feature: Tensor) -> Tensor:
    return torch.mv(held.flatten(1), feature.flatten()).to("cpu", torch.float64)


def _product_inner(held: Tensor, feature: Tensor) -> Tensor:
    """<X^T X, Y^T Y> = ||X Y^T||^2."""
    return torch.stack([(rows @ feature.T).square().sum(dtype=torch.float64) for rows in held]).cpu()


def _sketch(width: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Expert -> its Gram matrix times a fixed Rademacher matrix [width, columns]; with a bias, a row more."""
    project = _projection(width, columns, device)
    return lambda rows: rows.T @ project(rows)


def _projection(width: int, columns: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Expert -> its matrix times a fixed Rademacher matrix [width, columns]; with a bias, a row more."""
    generator = torch.Generator().manual_seed(SKETCH_SEED)
    rademacher = torch.randint(2, (width + 1, columns), generator=generator).to(device, torch.float32) * 2 - 1
    return lambda rows: rows @ rademacher[: rows.shape[1]] / columns**0.5
