"""How two models are matched: a value that checks itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_moe_lmc.errors import InputError

OrderMethod = Literal["gate", "expert", "best"]
UnitMethod = Literal["plain", "scaled"]
WIDENED: OrderMethod = "gate"  # the order of merges that keep the experts of both models: there it counts which tokens they get


@dataclass(frozen=True, kw_only=True)
class WeightMatching:
    """The two-stage algorithm of the paper (Algorithm 1), over the whole symmetry of gated experts.

    Attributes:
        order: order of the experts from router rows (`gate`, Eq. 10), from Gram matrices (`expert`, Eq. 11), or the `best`
            of both: whichever leaves the lower distance once the hidden units are matched.
        units: hidden units as they are (`plain`, Git Re-Basin's weight matching), or up to sign and scale (`scaled`).
        exact: compute all costs of wide experts in full; without, sketches with a proof come first.

    Raises:
        InputError: another word than these.

    Example:
        >>> WeightMatching(order="gate").facts()
        {'order': 'gate', 'units': 'scaled', 'exact': False}
    """

    order: OrderMethod = "best"
    units: UnitMethod = "scaled"
    exact: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("order", OrderMethod), ("units", UnitMethod)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(get_args(kind))}")

    def facts(self) -> dict[str, Any]:
        """What a result depends on, for resume."""
        return {"order": self.order, "units": self.units, "exact": self.exact}
