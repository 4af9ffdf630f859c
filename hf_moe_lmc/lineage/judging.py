"""The lineage of models, layer by layer: routers first, then a sample of experts where these do not tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from torch import Tensor

from hf_moe_lmc.checkpoints.checkpoint import reads_at_once
from hf_moe_lmc.lineage.experts import (
    ExpertFinding,
    all_units,
    are_sampled,
    judge_experts,
    pairs_to_compare,
    read_units,
)
from hf_moe_lmc.lineage.routers import RouterFinding, Says, judge_routers, router_rows, threshold
from hf_moe_lmc.lineage.verdict import LayerVerdict, layer_verdict
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.runtime.ahead import read_ahead
from hf_moe_lmc.runtime.progress import tracked

SAMPLED = 8  # layers, among those whose routers say the same

Findings = dict[int, RouterFinding]  # by layer


def layers_in_common(a: MoEModel, b: MoEModel) -> list[int]:
    """The MoE layers that both have, with banks of the same sizes; those for multi-token prediction among them."""

    def sizes(model: MoEModel, index: int) -> dict[str, tuple[int, ...]]:
        layer = model.layers[index]
        return {name: (bank.experts, layer.sizes["model"]) for name, bank in layer.banks.items()}

    return [index for index in a.layers if index in b.layers and sizes(a, index) == sizes(b, index)]


def judge_all_routers(
    models: Sequence[MoEModel], pairs: Sequence[tuple[int, int]] | None = None
) -> dict[tuple[int, int], Findings]:
    """What the router rows say of pairs of models, by default of all; each row is read once.

    Memory: the rows of a few layers of all models.
    """
    pairs = list(combinations(range(len(models)), 2)) if pairs is None else pairs
    common = {(i, j): set(layers_in_common(models[i], models[j])) for i, j in pairs}
    found: dict[tuple[int, int], Findings] = {pair: {} for pair in pairs}
    indices = sorted(set().union(*common.values()))
    if not indices:
        return found

    def read(index: int) -> dict[int, Mapping[str, Tensor]]:
        return {i: router_rows(model.layers[index]) for i, model in enumerate(models) if index in model.layers}

    layers = read_ahead(read, indices, reads_at_once(*(model.checkpoint for model in models)))
    for index, rows in zip(tracked(indices, desc="routers", unit="layer"), layers, strict=True):
        for i, j in pairs:
            if index in common[i, j]:
                groups = models[i].groups if models[i].groups == models[j].groups else 1
                found[i, j][index] = judge_routers(rows[i], rows[j], len(common[i, j]), groups)
    return found


def judge_layers(a: MoEModel, b: MoEModel, routers: Findings) -> list[LayerVerdict]:
    """The verdict on each layer; samples of experts are read where the routers do not tell."""
    kinds: tuple[Says, ...] = ("in place", "alike", "unlike", "undecided")  # routers do not tell of the order of hidden units
    verdicts: dict[int, LayerVerdict] = {}
    for kind in kinds:
        of_kind = [index for index, finding in routers.items() if finding.says == kind]
        sampled = [index for index in spread(of_kind) if are_sampled(a.layers[index], b.layers[index])]
        samples = _sample(a, b, routers, sampled)
        said = {(finding.says, finding.in_order) for finding in samples.values()}
        alike = next(iter(samples.values())) if len(said) == 1 and not any(one == "undecided" for one, _ in said) else None
        for index in of_kind:
            verdicts[index] = layer_verdict(
                index,
                a.layers[index].experts,
                routers[index],
                samples.get(index, alike),
                elsewhere=index not in samples,
            )
    for index, finding in routers.items():
        if index not in verdicts:
            verdicts[index] = layer_verdict(index, a.layers[index].experts, finding, None)
    return [verdicts[index] for index in sorted(verdicts)]


def judged_by_routers(a: MoEModel, b: MoEModel) -> list[LayerVerdict]:
    """The verdicts that need no sample: routers that are the same byte for byte count as in place."""
    routers = judge_all_routers([a, b])[0, 1]
    related = ExpertFinding("related")
    return [
        layer_verdict(index, a.layers[index].experts, finding, related if finding.says == "alike" else None)
        for index, finding in sorted(routers.items())
    ]


def spread(indices: Sequence[int], count: int = SAMPLED) -> list[int]:
    """At most so many of the given, from the first to the last.

    Example:
        >>> spread(range(10), 4)
        [0, 3, 6, 9]
    """
    if len(indices) <= count:
        return list(indices)
    return [indices[round(i * (len(indices) - 1) / (count - 1))] for i in range(count)]


def _sample(a: MoEModel, b: MoEModel, routers: Findings, indices: Sequence[int]) -> dict[int, ExpertFinding]:
    """What samples of the experts of some layers say."""
    pairs = {}
    for index in indices:
        resemblance = routers[index].resemblance
        sure = routers[index].says in ("in place", "alike")
        order = list(range(a.layers[index].experts)) if resemblance is None else resemblance.order.tolist()
        pairs[index] = pairs_to_compare(order, sure=sure)
    wanted = [
        (index, place, expert)
        for index in indices
        for place in (0, 1)
        for expert in dict.fromkeys(pair[place] for pair in pairs[index])
    ]
    at_once = reads_at_once(a.checkpoint, b.checkpoint)
    limit = threshold(len(routers))
    read: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}
    found: dict[int, ExpertFinding] = {}
    units = read_ahead(lambda one: read_units((a, b)[one[1]].layers[one[0]], [one[2]]), wanted, at_once)
    for at, ((index, place, _), rows) in enumerate(zip(wanted, units, strict=True)):
        read[place].update(rows)
        if at + 1 == len(wanted) or wanted[at + 1][0] != index:
            any_order = all_units(a.layers[index]) and all_units(b.layers[index])
            found[index] = judge_experts(*read, pairs[index], limit, any_order=any_order)
            read = {}, {}
    return found
