"""What matching two MoE blocks gives: a group element for each bank and for the shared expert, and the distances it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_moe_lmc.moe.ties import Tied
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import BankSymmetry, UnitSymmetry
from hf_moe_lmc.symmetry.group import LayerSymmetry

DECIDED = {  # how the order of the experts was chosen
    "table": "by the table of token experts",
    "tied": "router rows of B are tied between experts that differ: no order but B's own keeps the function",
    "asked": "one order was asked for, and computed in full",
    "distance": "the units were matched for both orders; the lower distance decided",
    "both": "both orders are the same",
    "margin": "both orders are the same, or one was asked for: its sketched Gram costs are less than half of all others",
    "sketch": "the experts are unrelated: the order of the sketched Gram costs, unproved; units were matched for it alone",
}

BEFORE_SHARED = (  # attributes of BankMatching that files call the same, in their order there
    "order_method",
    "candidates",
    "expert_cost_form",
    "norm",
    "distance_before",
    "distance_after_order",
    "distance_after_units",
    "router_distance_before",
    "router_distance_after",
)


@dataclass(frozen=True)
class BankMatching:
    """The group element that takes one bank of B close to A's, and how close.

    Distances are Frobenius norms of differences, of the experts' weights unless named otherwise.

    Attributes:
        order_method: the order that was kept, `gate` or `expert`; `table` where a table of token experts decided it, `tied`
            where B's own is the only one.
        candidates: distance after the units for each order that was tried.
        expert_cost_form: form and, for a sketch, number of columns of the `expert` cost; None if not computed.
        norm: Frobenius norm of A's experts.
        order_decided: one of DECIDED.
        order_margin: largest ratio of a kept pair's sketched squared Gram cost to the others in its row and its column; None
            where it was not sketched.
        certificates: how the units of each expert of A were matched, keys of `certificate.CERTIFICATES`.
        tied: where B's order is kept, the ties between its router rows: numbers of experts, one of a single expert being
            with experts of another bank.
    """

    symmetry: BankSymmetry
    order_method: str
    candidates: dict[str, float]
    expert_cost_form: str | None
    norm: float
    distance_before: float
    distance_after_order: float
    distance_after_units: float
    router_distance_before: float
    router_distance_after: float
    order_decided: str
    order_margin: float | None
    certificates: list[str]
    tied: Tied = ()

    @property
    def scales_kept(self) -> int:
        """Experts whose scales paid; signs alone do not count."""
        return int((self.symmetry.unit_scale.abs() != 1).any(dim=1).sum())

    @property
    def is_trivial(self) -> bool:
        """Whether the banks were equal to begin with."""
        return self.distance_before == self.router_distance_before == 0


@dataclass(frozen=True)
class SharedMatching:
    """The same for the shared expert; without hidden units, and at no distance, where there is none.

    Attributes:
        certificate: a key of `certificate.CERTIFICATES`; None where there is no shared expert.
    """

    symmetry: UnitSymmetry
    distance_before: float = 0.0
    distance_after: float = 0.0
    certificate: str | None = None

    @property
    def scales_kept(self) -> int:
        """1 where its scales paid, else 0."""
        return int(not self.symmetry.is_lossless)


@dataclass(frozen=True)
class Matching:
    """The group element that takes one block of B close to A's, and how close.

    Attributes:
        banks: by name of the bank, the first one first.
        seconds: of the computation, by bank; those of the first bank include the shared expert's.
    """

    banks: Mapping[str, BankMatching]
    shared: SharedMatching
    seconds: Mapping[str, float]

    @property
    def symmetry(self) -> LayerSymmetry:
        """The group element of the whole block."""
        return LayerSymmetry({name: bank.symmetry for name, bank in self.banks.items()}, self.shared.symmetry)

    @property
    def first(self) -> BankMatching:
        """The first bank, the only one of nearly all models."""
        return self.banks[FIRST]

    @property
    def is_trivial(self) -> bool:
        """Whether the blocks were equal to begin with."""
        return self.shared.distance_before == 0 and all(bank.is_trivial for bank in self.banks.values())

    def numbers(self, name: str) -> dict[str, Any]:
        """What files say of one bank besides its group element, by the names that they have there.

        The entry of the first bank is that of the shared expert as well, which counts in `scales_kept`.
        """
        bank = self.banks[name]
        shared = self.shared if name == FIRST else SharedMatching(UnitSymmetry.identity(0))
        return {
            **{field: getattr(bank, field) for field in BEFORE_SHARED},
            "shared_distance_before": shared.distance_before,
            "shared_distance_after": shared.distance_after,
            "scales_kept": bank.scales_kept + shared.scales_kept,
            "seconds": self.seconds[name],
            "way": bank.certificates,
            "shared_way": shared.certificate,
            "order_decided": bank.order_decided,
            "order_margin": bank.order_margin,
            **({"tied": [list(tie) for tie in bank.tied]} if bank.order_decided == "tied" else {}),
        }

    @classmethod
    def of_numbers(cls, numbers: Mapping[str, Mapping[str, Any]], symmetry: LayerSymmetry) -> Matching:
        """The inverse of `numbers` for all banks, given the group element.

        Raises:
            KeyError, ValueError: something is missing, or the banks are not those of the group element.
        """
        if numbers.keys() != symmetry.banks.keys():
            raise ValueError(f"expected the banks {sorted(symmetry.banks)}, found {sorted(numbers)}")
        first = numbers[FIRST]
        return cls(
            banks={
                name: BankMatching(
                    symmetry=symmetry.banks[name],
                    certificates=own["way"],
                    order_decided=own["order_decided"],
                    order_margin=own["order_margin"],
                    tied=tuple(map(tuple, own["tied"])) if own["order_decided"] == "tied" else (),
                    **{field: own[field] for field in BEFORE_SHARED},
                )
                for name, own in numbers.items()
            },
            shared=SharedMatching(
                symmetry.shared, first["shared_distance_before"], first["shared_distance_after"], first["shared_way"]
            ),
            seconds={name: own["seconds"] for name, own in numbers.items()},
        )
