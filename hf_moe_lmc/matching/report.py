"""The entry of one layer in alignment.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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


def in_words(totals: Mapping[str, float], layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What an alignment changed, in sentences.

    Args:
        totals: counts and relative distances over all layers.
        layers: entries of alignment.json.

    Example:
        >>> totals = {
        ...     "experts": 16, "experts_moved": 5, "units": 512, "units_moved": 0, "signs": 0, "scales_kept": 12,
        ...     "relative_distance_before": 1.0, "relative_distance_after_order": 0.5, "relative_distance_after_units": 0.25,
        ... }
        >>> for sentence in in_words(totals, [{"experts_moved": 5}, {"experts_moved": 0}])[:3]:
        ...     print(sentence)
        5 of 16 experts changed places, in 1 of 2 MoE layers.
        No hidden unit changed its place.
        No hidden unit changed its sign; the scales of 12 experts were changed.
    """
    moved = sum(layer["experts_moved"] > 0 for layer in layers)
    experts, units = (f"{totals[name]:,} of {totals[of]:,}" for name, of in _COUNTED)
    signs, scales = totals["signs"], totals["scales_kept"]
    changes = f"{_count(signs, 'hidden unit')} changed sign" if signs else "No hidden unit changed its sign"
    changes += f"; the scales of {_count(scales, 'expert')} were changed." if scales else "; no scale was changed."
    return (
        f"{experts} experts changed places, in {moved} of {len(layers)} MoE layers."
        if moved
        else "No expert changed its place.",
        f"{units} hidden units changed places within their experts."
        if totals["units_moved"]
        else "No hidden unit changed its place.",
        changes,
        f"Distance of the expert weights to A's, relative to their norm: {totals['relative_distance_before']:.4f} before, "
        f"{totals['relative_distance_after_order']:.4f} after the order of the experts, "
        f"{totals['relative_distance_after_units']:.4f} after the hidden units.",
    )


_COUNTED = (("experts_moved", "experts"), ("units_moved", "units"))


def _count(number: float, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
