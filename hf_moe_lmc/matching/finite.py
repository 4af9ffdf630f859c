"""Weights that are NaN or infinite cannot be matched: which expert holds them, and where on disk."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_moe_lmc.errors import CheckpointError
from hf_moe_lmc.matching.units import UnitRows
from hf_moe_lmc.moe.experts import Bank, SharedExpert
from hf_moe_lmc.moe.layer import MoELayer
from hf_moe_lmc.moe.notation import EXPERT_VECTORS


def finite_rows(experts: Bank | SharedExpert, expert: int | None, device: torch.device) -> UnitRows:
    """Reads one expert of a bank, or with `expert` None the shared one.

    Raises:
        CheckpointError: it is not finite.
    """
    rows = UnitRows.of(experts, expert, device)
    check_rows(rows, experts, expert)
    return rows


def check_rows(rows: UnitRows, experts: Bank | SharedExpert, expert: int | None) -> None:
    """Raises CheckpointError where an expert that has been read is not finite."""
    if not math.isfinite(rows.squared_norm):
        raise not_finite(experts, "the shared expert" if expert is None else f"expert {expert}")


def check_router(bank: Bank) -> None:
    """Raises CheckpointError, naming the first router row, or vector beside the router, that is not finite."""
    bad = (~bank.values("router").isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise not_finite(bank, f"router row {int(bad[0])}")
    for role in bank.roles:
        if role in EXPERT_VECTORS and not bool(bank.values(role).isfinite().all()):
            raise not_finite(bank, role.replace("_", " "))


def check_shared_router(layer: MoELayer) -> None:
    """Raises CheckpointError where the gate of the shared expert is not finite."""
    if "shared_router" in layer.roles and not bool(layer.stored("shared_router").isfinite().all()):
        raise not_finite(layer.shared, "shared router")


def check_cost(cost: Tensor, a: Bank, b: Bank) -> None:
    """Raises CheckpointError, naming the expert of A or B that makes a cost [expert, expert] not finite."""
    bad = ~cost.isfinite()
    if bool(bad.any()):
        bad_in_a = bad.all(dim=1)
        bank, experts = (a, bad_in_a) if bool(bad_in_a.any()) else (b, bad.any(dim=0))
        raise not_finite(bank, f"expert {int(experts.nonzero()[0])}")


def not_finite(experts: Bank | SharedExpert, what: str) -> CheckpointError:
    """What to say of weights that cannot be matched: the tensor as well, which `what` is a part of."""
    checkpoint = experts.layer.checkpoint
    places = ((name, place) for name in experts.layer.claims if (place := checkpoint.first_not_finite(name)))
    name, place = next(places, (None, None))
    where = f"; in {checkpoint.tensors[name].shard}, tensor {name}, the first at {place}" if name else ""
    return CheckpointError(
        f"{experts.full_name}: {what} holds NaN or infinite weights{where}. Repair the checkpoint: "
        "such weights cannot be matched"
    )
