"""Weight matching of two MoE blocks: the paper's Algorithm 1, over the whole symmetry of gated experts.

Two stages, each a linear assignment problem and without data:

1. A permutation of the experts (`candidates`). `gate` matches router rows (Eq. 10). `expert` matches Gram matrices, which are
   invariant to the symmetry of the hidden units (Eq. 11, generalised to gate, up and down).
2. For each matched pair of experts, a permutation of the hidden units (`units`): Git Re-Basin's weight matching. With `scaled`
   units, the sign and scale of the linear branch as well.

The two stages are not the joint optimum over both; nothing here claims that they are. Further banks of experts are
matched in the same way, each for itself. Where a table names the expert of each token, it decides stage 1. Where router
rows are tied, B's own order is the only one (see `moe.ties`), and the units are matched in it.

Experts of more than SMALL units are first surveyed along the `gate` permutation. Each is read once. Its units are matched from
sketches where that comes with a proof (`certificate`), and the Gram costs are estimated from the same sketches. Pairs without
a proof are matched by their full similarity. `exact` does without sketches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_moe_lmc.matching.candidates import as_it_is, candidates
from hf_moe_lmc.matching.certificate import Sketched
from hf_moe_lmc.matching.finite import check_router, check_shared_router, finite_rows
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.matching.pairs import ExpertPairs, match_sketched
from hf_moe_lmc.matching.result import BankMatching, Matching, SharedMatching
from hf_moe_lmc.matching.units import UnitMatch, is_wide, match_units
from hf_moe_lmc.moe.experts import SharedExpert
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.ties import Tied, bound_orders
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry


def match_layer(
    a: MoELayer,
    b: MoELayer,
    method: WeightMatching,
    *,
    groups: int = 1,
    device: torch.device | None = None,
    bound: Mapping[str, Tied] | None = None,
) -> Matching:
    """Algorithm 1 of the paper on one pair of blocks.

    Args:
        method: where both orders are asked for and agree, the units are matched once.
        groups: expert groups that bind; experts then move only within and with their groups.
        bound: banks of `b` that keep their order, and the ties between router rows that bind them, see `ties`; by default
            they are looked for.

    Memory: two experts as they are stored and, from sketches, 3 * WIDER float32 numbers for each of their units; otherwise
    one of them in float32 and one [unit, unit] matrix (float64 up to assignment.SPARSE units, then float32), and the workspace
    of `expert_cost`. A survey keeps three [WIDER, WIDER] float64 matrices of each expert besides.

    Raises:
        CheckpointError: weights that are NaN or infinite; the message names the expert, the tensor and the place.

    Example:
        >>> from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
        >>> from hf_moe_lmc.moe.reading import read_model
        >>> a, b = (read_model(Checkpoint.open(folder)) for folder in ("model-a", "model-b"))
        >>> matching = match_layer(a.layers[1], b.layers[1], WeightMatching())
        >>> matching.symmetry.sizes
        {'expert': 6, 'unit': 24, 'shared': 0}
        >>> matching.first.distance_after_units < 0.1 * matching.first.distance_before
        True
        >>> matching.first.order_method, set(matching.first.certificates)
        ('gate', {'small'})
    """
    device = device or torch.device("cpu")
    bound = bound_orders(b, groups) if bound is None else bound
    banks, seconds = {}, {}
    shared = SharedMatching(UnitSymmetry.identity(0))
    for name, bank in a.banks.items():
        started = time.perf_counter()
        if name == FIRST:
            check_shared_router(a)
            check_shared_router(b)
        pairs = ExpertPairs(bank, b.banks[name], method.units, device, method.exact)
        banks[name] = _match_bank(pairs, method, groups if name == FIRST else 1, bound.get(name))
        if name == FIRST and a.shared.unit_count:
            shared = _match_shared(a.shared, b.shared, method, device)
        seconds[name] = time.perf_counter() - started
    return Matching(banks, shared, seconds)


def _match_bank(pairs: ExpertPairs, method: WeightMatching, groups: int, tied: Tied | None) -> BankMatching:
    """Matches one bank; with `tied`, in the order that it has."""
    a, b = pairs.a, pairs.b
    for bank in (a, b):
        check_router(bank)
    has_units = a.unit_count > 0  # else there is nothing but router rows
    choice = candidates(pairs, groups, method.order) if tied is None else as_it_is(a)
    distances = {
        name: sum(pairs.match(i, int(j)).squared_after for i, j in enumerate(permutation)) ** 0.5 if has_units else 0.0
        for name, permutation in choice.permutations.items()
    }
    best = min(distances, key=lambda name: distances[name])
    permutation = choice.permutations[best]
    matches = [pairs.match(i, int(j)) for i, j in enumerate(permutation)] if has_units else []
    router_a, router_b = a.values("router").double(), b.values("router").double()
    return BankMatching(
        symmetry=_bank_symmetry(permutation, matches),
        order_method=best,
        candidates=distances,
        expert_cost_form=choice.form,
        norm=sum(match.squared_norm for match in matches) ** 0.5,
        distance_before=sum(pairs.squared_before(i) for i in range(a.experts)) ** 0.5 if has_units else 0.0,
        distance_after_order=sum(match.squared_before for match in matches) ** 0.5,
        distance_after_units=distances[best],
        router_distance_before=float((router_a - router_b).norm()),
        router_distance_after=float((router_a - router_b[permutation]).norm()),
        order_decided=choice.decided,
        order_margin=choice.margin,
        certificates=[match.certificate for match in matches],
        tied=tied or (),
    )


def _bank_symmetry(permutation: Tensor, matches: Sequence[UnitMatch]) -> BankSymmetry:
    if not matches:
        return replace(BankSymmetry.identity(len(permutation), 0), expert_order=permutation)
    return BankSymmetry(
        expert_order=permutation,
        unit_order=torch.stack([match.symmetry.order for match in matches]),
        unit_scale=torch.stack([match.symmetry.scale for match in matches]),
    )


def _match_shared(a: SharedExpert, b: SharedExpert, method: WeightMatching, device: torch.device) -> SharedMatching:
    rows_a, rows_b = finite_rows(a, None, device), finite_rows(b, None, device)
    match = None
    if not method.exact and rows_a.kind.permutation and is_wide(rows_a.count):
        match = match_sketched(Sketched(rows_a, method.units), Sketched(rows_b, method.units))
    match = match or match_units(rows_a, rows_b, method.units)
    return SharedMatching(
        symmetry=match.symmetry,
        distance_before=match.squared_before**0.5,
        distance_after=match.squared_after**0.5,
        certificate=match.certificate,
    )
