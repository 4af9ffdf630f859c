"""The verdict on the lineage of two models: of each MoE layer, and in one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_moe_lmc.lineage.experts import ExpertFinding
from hf_moe_lmc.lineage.outside import OutsideSample
from hf_moe_lmc.lineage.routers import RouterFinding, Says

Lineage = Literal["in place", "shuffled", "unrelated", "undecided"]
By = Literal["routers", "experts", "experts of other layers"]

MEASURE = "align first, measure the barrier"


@dataclass(frozen=True)
class LayerVerdict:
    """The lineage of one MoE layer.

    Attributes:
        verdict: `in place` or `shuffled`: of one lineage; `unrelated`; or `undecided`.
        by: what decided: the router rows, a sample of experts, or that and the sample of other layers with such routers.
        routers: what the router rows alone say: `in place`, `shuffled`, `alike` (byte for byte), `unlike` or `undecided`.
        why: for whom it is undecided, or what is out of the ordinary.
        moved: experts that have another place; None where the order is not known.
        cosine: mean cosine of the matched router rows, whitened; margin: by how much the cosines are above the best others, in
            the mean; least_margin: at the least. None where routers could not be compared.
        log10_chance: bound of the decimal logarithm of the probability that unrelated routers do as well.
        expert_cosine: mean cosine of hidden units of the sampled experts; None where none were.
    """

    layer: int
    verdict: Lineage
    by: By
    experts: int
    routers: Says = "in place"
    why: str = ""
    moved: int | None = None
    cosine: float | None = None
    margin: float | None = None
    least_margin: float | None = None
    log10_chance: float | None = None
    expert_cosine: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_verdict(
    layer: int, experts: int, router: RouterFinding, sample: ExpertFinding | None, *, elsewhere: bool = False
) -> LayerVerdict:
    """The verdict from what the routers say and, where that is not enough, from a sample of experts.

    Args:
        elsewhere: the sample is of other layers whose routers say the same.
    """
    said, by = _said(router, sample, elsewhere)
    found = router.resemblance
    return LayerVerdict(
        layer=layer,
        verdict=said,
        by=by,
        experts=experts,
        routers=router.says,
        why=_why(router, sample, said),
        moved=_moved(router, sample, said) if said in ("in place", "shuffled") else None,
        cosine=found.cosine if found else None,
        margin=found.gap if found else None,
        least_margin=float(found.gaps.min()) if found else None,
        log10_chance=found.least_chance if found else None,
        expert_cosine=sample.cosine if sample and not elsewhere else None,
    )


def _said(router: RouterFinding, sample: ExpertFinding | None, elsewhere: bool) -> tuple[Lineage, By]:
    by: By = "experts of other layers" if elsewhere else "experts"
    if router.says in ("in place", "shuffled"):
        if router.says == "in place" and sample and sample.says == "related" and not sample.in_order:
            return "shuffled", by
        return router.says, "routers"
    if sample is None or sample.says == "undecided":
        return "undecided", "routers"
    if sample.says == "unrelated":
        return "unrelated", by
    own = all(i == j for i, j in sample.partners.items()) and not (router.says == "alike" and router.moved)
    return "in place" if own and sample.in_order else "shuffled", by


def _moved(router: RouterFinding, sample: ExpertFinding | None, said: Lineage) -> int | None:
    """Experts that have another place, as far as that is known."""
    if router.moved is not None:
        return router.moved
    if sample is None or router.resemblance is None or router.says == "unlike" or not sample.apart:
        return None
    if said == "in place":
        return 0
    order = router.resemblance.order.tolist()
    return router.resemblance.moved if all(order[i] == j for i, j in sample.partners.items()) else None


def _why(router: RouterFinding, sample: ExpertFinding | None, said: Lineage) -> str:
    if said == "undecided":
        unlike = "the routers are those of unrelated models" if router.says == "unlike" else router.why
        return "; ".join(filter(None, [unlike, sample.why if sample else "no experts were sampled"]))
    facts = []
    if router.says == "unlike" and said != "unrelated":
        facts.append("the experts are of one lineage, the routers are not")
    if router.says == "undecided" and said != "unrelated" and sample and not sample.apart:
        facts.append("the experts are of one lineage, and too much alike to tell their order")
    if router.says == "alike" and said == "unrelated":
        facts.append("the routers are the same byte for byte, the experts are unrelated")
    if sample and sample.says == "related" and not sample.in_order and said == "shuffled":
        facts.append("the hidden units of the experts have other places")
    return "; ".join(facts)


def counted(layers: Sequence[LayerVerdict]) -> dict[Lineage, int]:
    """How many layers have which verdict."""
    found = Counter(layer.verdict for layer in layers)
    return {"in place": found["in place"], "shuffled": found["shuffled"], "unrelated": found["unrelated"],
            "undecided": found["undecided"]}  # fmt: skip


def sentence(layers: Sequence[LayerVerdict], outside: OutsideSample | None, other: str = "B", first: str = "A") -> str:
    """The verdict on two models in one sentence: what was found, and what to do; see `finding_and_advice`.

    Example:
        >>> layers = [LayerVerdict(i, "shuffled" if i < 2 else "in place", "routers", 8, moved=0) for i in range(4)]
        >>> sentence(layers, None)
        'B is of the same lineage as A, 2 of 4 layers shuffled: align first'
    """
    return ": ".join(finding_and_advice(layers, outside, other, first))


def finding_and_advice(
    layers: Sequence[LayerVerdict], outside: OutsideSample | None, other: str = "B", first: str = "A"
) -> tuple[str, str]:
    """What was found of two models, and what to do with them.

    Args:
        outside: None: nothing is known of what stands outside the MoE blocks.
        other, first: letters of the two models.
    """
    counts, total = counted(layers), len(layers)
    related = counts["in place"] + counts["shuffled"]
    if outside is not None and outside.unrelated:
        inside = ", in the MoE blocks too" if total and counts["unrelated"] == total else ""
        return f"outside the MoE blocks {first} and {other} are unrelated{inside}", "a merge makes no sense"
    if not total:
        return f"{first} and {other} resemble each other; they have no MoE blocks to align", "merge without alignment"
    own = sum(layer.routers == "unlike" for layer in layers if layer.verdict in ("in place", "shuffled"))
    untold = sum(layer.routers == "undecided" and layer.moved is None for layer in layers if layer.verdict == "in place")
    if own and related == total:
        return f"{other} grew from the same experts as {first}, with routers of its own{_where(own, total)}", MEASURE
    if untold and related == total:
        return f"{other} grew from the same experts as {first}, and nothing tells their order{_where(untold, total)}", MEASURE
    if counts["in place"] == total:
        return f"{other} is a fine-tune of the same model as {first}, experts in place", "merge without alignment"
    if related == total:
        return f"{other} is of the same lineage as {first}, {counts['shuffled']} of {total} layers shuffled", "align first"
    if counts["unrelated"] == total:
        shared = "" if outside is None else f"{first} and {other} share what stands outside their MoE blocks, "
        blocks = "the MoE blocks" if outside is None else "the blocks"
        return f"{shared}{blocks} are unrelated", MEASURE
    if counts["undecided"] == total:
        return f"the lineage of the MoE blocks of {first} and {other} cannot be told", MEASURE
    parts = [f"{counts[kind]} {kind}" for kind in ("in place", "shuffled", "unrelated", "undecided") if counts[kind]]
    return f"the {total} MoE layers of {first} and {other} are not all alike ({', '.join(parts)})", MEASURE


def _where(count: int, total: int) -> str:
    return "" if count == total else f" in {count} of {total} layers"
