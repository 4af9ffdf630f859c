"""Alignment of two checkpoints, layer by layer, and the streamed rewrite of one in the other's coordinates."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.utils import tqdm

from hf_moe_lmc.checkpoints.pair import same_place
from hf_moe_lmc.matching.blocks import Matching, match_layer
from hf_moe_lmc.matching.distance import OutsideDistance, outside_distance
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.matching.records import matchings, write_matching
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import team
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.writing.workplace import Workplace

ALIGNMENT_VERSION = 1
SAME = "A and B hold the same weights; the alignment is the identity"


@dataclass(frozen=True)
class Alignment:
    """The symmetry that takes B close to A, and what was found on the way.

    Attributes:
        symmetry: acts on B; its metadata name the method and both inputs.
        layers: one matching per MoE layer that both models have, by layer number.
        outside: distance outside the MoE blocks.
        warnings: in words.
        seconds: of the whole computation.
    """

    symmetry: ModelSymmetry
    order: OrderMethod
    units: UnitMethod
    a: dict[str, str]
    b: dict[str, str]
    layers: dict[int, Matching]
    outside: OutsideDistance
    warnings: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The content of alignment.json."""
        return {
            "version": ALIGNMENT_VERSION,
            "family": self.symmetry.family,
            "groups": self.symmetry.groups,
            "order": self.order,
            "units": self.units,
            "a": self.a,
            "b": self.b,
            "lossless": self.symmetry.is_lossless,
            "totals": self.totals(),
            "layers": [layer_report(index, matching) for index, matching in self.layers.items()],
            "outside": asdict(self.outside),
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def with_output(self, fingerprint: str) -> Alignment:
        """The same, with the fingerprint of the aligned checkpoint on record: what the inverse acts on."""
        metadata = {**self.symmetry.metadata, "aligned_fingerprint": fingerprint}
        return replace(self, symmetry=replace(self.symmetry, metadata=metadata))

    def totals(self) -> dict[str, float]:
        """Counts and relative distances over all layers."""
        reports = [layer_report(index, matching) for index, matching in self.layers.items()]
        reports += [bank for report in reports for bank in report.get("banks", {}).values()]
        norm = math.hypot(*(report["norm"] for report in reports)) or 1.0
        counts = ("experts", "experts_moved", "units", "units_moved", "signs", "scales_kept")
        distances = ("distance_before", "distance_after_order", "distance_after_units")
        return {
            **{name: sum(report[name] for report in reports) for name in counts},
            **{f"relative_{name}": math.hypot(*(report[name] for report in reports)) / norm for name in distances},
        }


def layer_report(index: int, matching: Matching) -> dict[str, Any]:
    """One layer's entry in alignment.json; `banks` holds the same for each further bank of experts."""
    symmetry = matching.symmetry
    identity = LayerSymmetry.identity(*symmetry.sizes.values())
    banks = {name: layer_report(index, other) for name, other in matching.others.items()}
    moved = {
        name: int((getattr(symmetry, name) != getattr(identity, name)).sum())
        for name in ("expert_order", "unit_order", "shared_order")
    }
    return {
        "layer": index,
        "expert_order": symmetry.expert_order.tolist(),
        "order_method": matching.order_method,
        "candidates": matching.candidates,
        "expert_cost_form": matching.expert_cost_form,
        "norm": matching.norm,
        "distance_before": matching.distance_before,
        "distance_after_order": matching.distance_after_order,
        "distance_after_units": matching.distance_after_units,
        "router_distance_before": matching.router_distance_before,
        "router_distance_after": matching.router_distance_after,
        "shared_distance_before": matching.shared_distance_before,
        "shared_distance_after": matching.shared_distance_after,
        "experts": len(symmetry.expert_order),
        "experts_moved": moved["expert_order"],
        "units": symmetry.unit_order.numel() + len(symmetry.shared_order),
        "units_moved": moved["unit_order"] + moved["shared_order"],
        "signs": int((symmetry.unit_scale < 0).sum() + (symmetry.shared_scale < 0).sum()),
        "scales_kept": matching.scales_kept,
        "way": matching.way,
        "shared_way": matching.shared_way,
        "ways": dict(Counter([*matching.way, *([matching.shared_way] if matching.shared_way else [])])),
        "order_decided": matching.order_decided,
        "order_margin": matching.order_margin,
        "seconds": matching.seconds,
        **({"banks": banks} if banks else {}),
    }


def align_models(
    a: MoEModel,
    b: MoEModel,
    method: WeightMatching,
    *,
    allow_nonfinite: bool = False,
    progress: Workplace | None = None,
    tell: Callable[[int, LayerSymmetry], None] = lambda layer, element: None,
) -> Alignment:
    """The symmetry that takes `b` close to `a`, computed layer by layer on accelerate's device.

    Several processes take layers in turn, and each ends up with all of them. With `progress` (in process 0), layers that an
    earlier call has matched are taken from there.

    Args:
        tell: called with each layer of `b` and its element as soon as that is known.

    Memory: see `match_layer`; nothing is kept of a layer but its symmetry, 12 bytes a hidden unit.
    """
    mates = team()
    started = time.perf_counter()
    device = _device()
    origin_a, origin_b = a.checkpoint.origin(), b.checkpoint.origin()
    found = []
    layers: dict[int, Matching] = {}
    wanted = sorted(a.layers.keys() & b.layers.keys())
    kept = progress.kept("matching", matching_facts(a, b, method)) if progress else None
    before = dict(matchings(kept)) if kept else {}
    for index in mates.from_main(sorted(before)):
        earlier = mates.from_main(before.get(index))
        assert earlier is not None
        layers[index] = earlier
        tell(index, earlier.symmetry)
    alone = sorted(b.layers.keys() - a.layers.keys())
    for index in alone:
        tell(index, b.layers[index].identity())
    if before:
        warn(f"continuing: {len(before)} of {len(wanted)} layers were matched by an earlier call")
    left = [index for index in wanted if index not in layers]
    with tqdm(total=len(wanted), initial=len(layers), desc="matching layers", unit="layer") as bar:
        for first in range(0, len(left), mates.count):  # a round: one layer for each process
            members = left[first : first + mates.count]
            mine = [
                match_layer(a.layers[index], b.layers[index], method, groups=a.groups, device=device)
                for index in mates.share(members)
            ]
            matched = [matching for of_one in mates.exchange(mine) for matching in of_one]
            for index, matching in zip(members, matched, strict=True):
                layers[index] = matching
                if kept:
                    write_matching(kept, index, matching)
                tell(index, matching.symmetry)
            bar.update(len(members))
    layers = dict(sorted(layers.items()))
    if alone:
        found.append(f"A lacks the multi-token-prediction layers {alone} of B; they are left as they are")
    worse = [index for index, matching in layers.items() if matching.distance_after_units > 1.001 * matching.distance_before]
    if worse:
        found.append(
            f"in layers {worse} the experts are further apart in the order that `{method.order}` found than they were; "
            "`best` compares orders"
        )
    if b.experts_outside:
        found.append(
            f"experts under {', '.join(b.experts_outside)} do not belong to the text model's layers and are left as they are; "
            "a merge averages them unaligned"
        )
    if b.quantization:
        found.append(
            f"the weights are quantised ({b.quantization.method}): whole experts change places with their scales; hidden units "
            "keep theirs, as anything else would need new scales"
        )
    outside = mates.from_main(outside_distance(a, b, allow_nonfinite=allow_nonfinite) if mates.is_main else None)
    assert outside is not None
    if outside.relative_distance == 0 and all(matching.is_trivial for matching in layers.values()):
        found.append(SAME)
    if outside.unrelated:
        found.append(
            f"outside the MoE blocks the two models are unrelated (median cosine {outside.median_cosine:.2f}, "
            f"relative distance {outside.relative_distance:.2f}): no alignment of experts can repair that, expect a barrier"
        )
    for warning in found:
        if warning != SAME or not same_place(a.checkpoint, b.checkpoint):  # which was said when they were opened
            warn(warning)
    symmetries = {**b.identity().layers, **{index: matching.symmetry for index, matching in layers.items()}}
    metadata: dict[str, str] = {"method": "weight matching", "order": method.order, "units": method.units}
    metadata |= {f"{side}_{key}": value for side, origin in (("a", origin_a), ("b", origin_b)) for key, value in origin.items()}
    return Alignment(
        symmetry=ModelSymmetry(b.family.name, b.groups, symmetries, metadata),
        order=method.order,
        units=method.units,
        a=origin_a,
        b=origin_b,
        layers=layers,
        outside=outside,
        warnings=tuple(found),
        seconds=mates.from_main(time.perf_counter() - started),
    )


def matching_facts(a: MoEModel, b: MoEModel, method: WeightMatching) -> dict[str, Any]:
    """What the symmetry that `align_models` finds depends on."""
    return {
        "version": ALIGNMENT_VERSION,
        "a": a.checkpoint.fingerprint(),
        "b": b.checkpoint.fingerprint(),
        "family": b.family.name,
        **method.facts(),
        "device": _device().type,
    }


def _device() -> torch.device:
    device = PartialState().device
    return torch.device("cpu") if device.type == "mps" else device  # distances are summed in float64, which MPS lacks
