"""The verdict on the lineage of two models: of each MoE layer, and in one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_moe_lmc.lineage.experts import ExpertFinding
from hf_moe_lmc.lineage.outside import OutsideSample
from hf_moe_lmc.lineage.routers import RouterFinding

Lineage = Literal["in place", "shuffled", "unrelated", "undecided"]
By = Literal["routers", "experts", "experts of other layers"]


@dataclass(frozen=True)
class LayerVerdict:
    """The lineage of one MoE layer.

    Attributes:
        verdict: `in place` or `shuffled`: of one lineage; `unrelated`; or `undecided`.
        by: what decided: the router rows, a sample of experts, or that and the sample of other layers with such routers.
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
    order_known = by == "routers" or said == "in place"
    return LayerVerdict(
        layer=layer,
        verdict=said,
        by=by,
        experts=experts,
        why=_why(router, sample, said),
        moved=(router.moved if by == "routers" else 0) if order_known and said in ("in place", "shuffled") else None,
        cosine=found and found.cosine,
        margin=found and found.gap,
        least_margin=found and float(found.gaps.min()),
        log10_chance=found and min(found.log10_chance, found.log10_chance_in_place if not found.moved else 0.0),
        expert_cosine=sample.cosine if sample and not elsewhere else None,
    )


def _said(router: RouterFinding, sample: ExpertFinding | None, elsewhere: bool) -> tuple[Lineage, By]:
    if router.says in ("in place", "shuffled"):
        return router.says, "routers"
    by: By = "experts of other layers" if elsewhere else "experts"
    if sample is None:
        return "undecided", "routers"
    said: dict[str, Lineage] = {"in place": "in place", "moved": "shuffled", "unrelated": "unrelated"}
    return said.get(sample.says, "undecided"), by


def _why(router: RouterFinding, sample: ExpertFinding | None, said: Lineage) -> str:
    if router.says == "unlike" and said in ("in place", "shuffled"):
        return "the experts are of one lineage, the routers are not"
    if router.says == "alike" and said == "unrelated":
        return "the routers are the same byte for byte, the experts are unrelated"
    if said == "undecided":
        unlike = "the routers are those of unrelated models" if router.says == "unlike" else router.why
        return "; ".join(filter(None, [unlike, sample.why if sample else "no experts were sampled"]))
    return ""


def counted(layers: Sequence[LayerVerdict]) -> dict[Lineage, int]:
    """How many layers have which verdict."""
    found = Counter(layer.verdict for layer in layers)
    return {"in place": found["in place"], "shuffled": found["shuffled"], "unrelated": found["unrelated"],
            "undecided": found["undecided"]}  # fmt: skip


def sentence(layers: Sequence[LayerVerdict], outside: OutsideSample | None, other: str = "B", first: str = "A") -> str:
    """The verdict on two models in one sentence.

    Args:
        outside: None: nothing is known of what stands outside the MoE blocks.
        other, first: letters of the two models.

    Example:
        >>> layers = [LayerVerdict(i, "shuffled" if i < 2 else "in place", "routers", 8) for i in range(4)]
        >>> sentence(layers, None)
        'B is of the same lineage as A, 2 of 4 layers shuffled: align first'
    """
    counts, total = counted(layers), len(layers)
    related = counts["in place"] + counts["shuffled"]
    if outside is not None and outside.unrelated:
        inside = ", in the MoE blocks too" if total and counts["unrelated"] == total else ""
        return f"outside the MoE blocks {first} and {other} are unrelated{inside}: a merge makes no sense"
    if not total:
        return f"{first} and {other} resemble each other; they have no MoE blocks to align: merge without alignment"
    if counts["in place"] == total:
        return f"{other} is a fine-tune of the same model as {first}, experts in place: merge without alignment"
    if related == total:
        return f"{other} is of the same lineage as {first}, {counts['shuffled']} of {total} layers shuffled: align first"
    if counts["unrelated"] == total:
        shared = "" if outside is None else f"{first} and {other} share what stands outside their MoE blocks, "
        blocks = "the MoE blocks" if outside is None else "the blocks"
        return f"{shared}{blocks} are unrelated: align first, and measure the barrier"
    if counts["undecided"] == total:
        return f"the lineage of the MoE blocks of {first} and {other} cannot be told: align first, and measure the barrier"
    parts = [f"{counts[kind]} {kind}" for kind in ("in place", "shuffled", "unrelated", "undecided") if counts[kind]]  # type: ignore[index]
    return f"of the {total} MoE layers of {first} and {other} are {', '.join(parts)}: align first, and measure the barrier"
