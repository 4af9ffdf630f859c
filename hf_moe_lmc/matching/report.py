"""The entry of one layer in alignment.json."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from hf_moe_lmc.matching.result import BEFORE_SHARED, Matching
from hf_moe_lmc.symmetry.banks import FIRST
from hf_moe_lmc.symmetry.elements import UnitSymmetry


def layer_report(index: int, matching: Matching) -> dict[str, Any]:
    """The entry of a layer: that of its first bank, and of the shared expert; `banks` holds one for each further bank."""
    entries = {name: _bank_report(index, matching, name) for name in matching.banks}
    first = entries.pop(FIRST)
    return {**first, **({"banks": entries} if entries else {})}


def _bank_report(index: int, matching: Matching, name: str) -> dict[str, Any]:
    element, numbers = matching.banks[name].symmetry, matching.numbers(name)
    shared = matching.shared.symmetry if name == FIRST else UnitSymmetry.identity(0)
    used = Counter([*numbers["way"], *([numbers["shared_way"]] if numbers["shared_way"] else [])])
    derived = {
        "layer": index,
        "expert_order": element.expert_order.tolist(),
        "experts": len(element.expert_order),
        "experts_moved": _moved(element.expert_order),
        "units": element.unit_order.numel() + len(shared.order),
        "units_moved": _moved(element.unit_order) + _moved(shared.order),
        "signs": int((element.unit_scale < 0).sum() + (shared.scale < 0).sum()),
        "ways": dict(used),
    }
    values = {**numbers, **derived}
    keys = (*_KEYS, "tied") if numbers["order_decided"] == "tied" else _KEYS
    return {key: values[key] for key in keys}


_KEYS = (
    "layer",
    "expert_order",
    *BEFORE_SHARED,
    "shared_distance_before",
    "shared_distance_after",
    "experts",
    "experts_moved",
    "units",
    "units_moved",
    "signs",
    "scales_kept",
    "way",
    "shared_way",
    "ways",
    "order_decided",
    "order_margin",
    "seconds",
)


def _moved(permutation: Tensor) -> int:
    """Entries that are not their own place, in one permutation or in a row of them each."""
    return int((permutation != torch.arange(permutation.shape[-1])).sum())
