"""Ties between router rows: experts that the selection cannot tell apart by their logits.

Top-k breaks ties by the places of all entries, those of other experts included. Where the experts of a tie differ, the
function therefore depends on the order of the whole block, and no order but its own keeps it. Hidden units stay free.

A tie asks for equality in all that the selection sees: the router row, its bias and its correction bias, as stored. A tie
of experts that are equal as weights binds nothing, unless it spans groups of experts that routing is limited to. Where a
table names the experts of each token, nothing is selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.notation import is_expert_role, split_role
from hf_moe_lmc.moe.view import LayerSource
from hf_moe_lmc.symmetry.banks import FIRST, in_bank, qualified

SEEN = ("router", "router_bias", "correction_bias")  # what the selection sees of an expert

MANY = 6  # experts of one tie that are listed one by one

Expert = tuple[str, int]  # bank and number
Tied = tuple[tuple[int, ...], ...]  # numbers of experts of one bank, tie by tie


def rivals(layer: MoELayer) -> list[tuple[str, ...]]:
    """Names of the banks, those together whose experts compete in one selection: their rows are in one tensor.

    A bank without the correction bias that the first one has is selected apart, or always.
    """
    found: dict[tuple[str, bool], list[str]] = {}
    for name, bank in layer.banks.items():
        claim, _ = layer.holders[qualified(name, "router"), None]
        found.setdefault((claim.name, "correction_bias" in bank.roles), []).append(name)
    return [tuple(names) for names in found.values()]


def router_ties(layer: MoELayer, source: LayerSource | None = None) -> list[tuple[Expert, ...]]:
    """The ties of a block, each with its experts in ascending order. Reads nothing but the router.

    Args:
        source: where the values come from, the block itself by default.
    """
    if "expert_table" in layer.roles:
        return []
    ties: list[tuple[Expert, ...]] = []
    for banks in rivals(layer):
        alike: dict[tuple[bytes, ...], list[Expert]] = {}
        for name in banks:
            parts = [
                _bytes((source or layer).stored(qualified(name, role)) + 0)  # zeros of both signs give one logit
                for role in SEEN
                if role in layer.banks[name].roles
            ]
            for expert in range(layer.banks[name].experts):
                key = tuple(part[expert].numpy().tobytes() for part in parts)
                alike.setdefault(key, []).append((name, expert))
        ties += [tuple(experts) for experts in alike.values() if len(experts) > 1]
    return ties


def bound_orders(
    layer: MoELayer, groups: int = 1, top_k: int | None = None, source: LayerSource | None = None
) -> dict[str, Tied]:
    """The banks whose experts can only stay where they are, and the ties that bind them.

    Reads the router, and of experts those that are tied.

    Args:
        groups: groups of experts that limit the routing of the first bank.
        top_k: experts per token; where all are chosen, no tie decides.
        source: where the values come from, the block itself by default.

    Returns:
        Ties by bank. One of a single expert is with experts of another bank.
    """
    source = source or layer
    ties = router_ties(layer, source)
    bound: dict[str, Tied] = {}
    for banks in rivals(layer) if ties else []:
        chosen = top_k is not None and top_k >= sum(layer.banks[name].experts for name in banks)
        if chosen and layer.router != "sparsemixer":  # whose second choice has another weight than the first
            continue
        binding = [tie for tie in ties if tie[0][0] in banks and _binds(layer, tie, groups, source)]
        for name in banks if binding else ():
            own = (tuple(expert for bank, expert in tie if bank == name) for tie in binding)
            bound[name] = tuple(tie for tie in own if tie)
    return bound


def _binds(layer: MoELayer, tie: tuple[Expert, ...], groups: int, source: LayerSource) -> bool:
    """Whether it matters which of the tied experts is selected."""
    size = layer.banks[FIRST].experts // groups
    if len({expert // size for bank, expert in tie if bank == FIRST}) > 1 and groups > 1:
        return True  # between the groups, whose other members differ
    first, *others = tie
    return not all(_equal(layer, first, other, source) for other in others)


def _equal(layer: MoELayer, one: Expert, other: Expert, source: LayerSource) -> bool:
    """Whether two experts have the same weights, byte for byte."""
    if one[0] != other[0]:
        return False
    pairs = zip(_weights(layer, one, source), _weights(layer, other, source), strict=True)
    return all(torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _weights(layer: MoELayer, expert: Expert, source: LayerSource) -> Iterator[Tensor]:
    """All that an expert has, apart from what the selection sees; nothing where the experts of its bank have no units."""
    name, number = expert
    bank = layer.banks[name]
    if "expert_scale" in bank.roles:
        yield source.stored(qualified(name, "expert_scale"))[number].reshape(1)
    for role in layer.roles if bank.unit_count else ():
        if split_role(role)[0] == name and is_expert_role(role):
            yield source.stored(role, number)


def _bytes(values: Tensor) -> Tensor:
    """uint8 [rows, bytes of a row]."""
    plain = values.clone(memory_format=torch.contiguous_format)
    return plain.view(-1).view(torch.uint8).view(len(values), -1)


def is_trivial(layer: MoELayer, bank: str, order: Sequence[int]) -> bool:
    """Whether an order gives each place of a bank an expert that is equal to its own, router row included."""
    moved = {frozenset(((bank, i), (bank, j))) for i, j in enumerate(order) if i != j}
    ties = [frozenset(tie) for tie in router_ties(layer)]
    return all(any(pair <= tie for tie in ties) for pair in moved) and all(
        _equal(layer, min(pair), max(pair), layer) for pair in moved
    )


def numbers(tie: Sequence[object], between: str) -> str:
    """The experts of one tie, a long one shortened.

    >>> numbers(range(3), ", "), numbers(range(256), " = ")
    ('0, 1, 2', '0 = 1 = ... = 255 (256 experts)')
    """
    if len(tie) <= MANY:
        return between.join(map(str, tie))
    return f"{between.join([str(tie[0]), str(tie[1]), '...', str(tie[-1])])} ({len(tie)} experts)"


def in_words(index: int, tied: Mapping[str, Tied]) -> str:
    """The ties of one layer: layer 3: experts 0 and 5.

    >>> in_words(3, {"": ((0, 5), (1, 2, 4)), "zero": ((7,),)})
    'layer 3: experts 0, 5; 1, 2, 4; layer 3, bank zero: experts 7'
    """
    return "; ".join(
        f"{in_bank(f'layer {index}', bank)}: experts {'; '.join(numbers(tie, ', ') for tie in ties)}"
        for bank, ties in tied.items()
        if ties
    )
