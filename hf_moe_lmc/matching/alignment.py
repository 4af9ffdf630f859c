"""Alignment of two models: the search for the symmetry, layer by layer, and the value that it gives."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import PartialState

from hf_moe_lmc.checkpoints.pair import same_place
from hf_moe_lmc.matching.blocks import match_layer
from hf_moe_lmc.matching.distance import OutsideDistance, outside_distance
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.matching.records import matchings, write_matching
from hf_moe_lmc.matching.report import in_words as changes_in_words
from hf_moe_lmc.matching.report import layer_report
from hf_moe_lmc.matching.result import Matching
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.ties import in_words
from hf_moe_lmc.runtime.notices import note, warn
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.runtime.progress import bar
from hf_moe_lmc.runtime.threads import Products, suited
from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.writing.workspace import ResultFolder, Workspace

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
        vocabulary: how many rows of a merge's vocabulary come from where; None: all are interpolated.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> alignment = lmc.align("model-a", "model-b", "symmetry", symmetry_only=True)
        >>> sorted(alignment.layers), alignment.totals()["experts"]
        ([0, 1, 2], 18)
        >>> alignment.layers[0].first.distance_after_units < alignment.layers[0].first.distance_before
        True
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
    vocabulary: Mapping[str, int] | None = None

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
            **({} if self.vocabulary is None else {"vocabulary": dict(self.vocabulary)}),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def with_output(self, fingerprint: str) -> Alignment:
        """The same, with the fingerprint of the aligned checkpoint on record: what the inverse acts on."""
        metadata = {**self.symmetry.metadata, "aligned_fingerprint": fingerprint}
        return replace(self, symmetry=replace(self.symmetry, metadata=metadata))

    def sentences(self) -> tuple[str, ...]:
        """What was changed in B, and how close it came to A, for a card or a terminal."""
        return changes_in_words(self.totals(), [layer_report(index, matching) for index, matching in self.layers.items()])

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


def align_models(
    a: MoEModel,
    b: MoEModel,
    method: WeightMatching,
    *,
    allow_nonfinite: bool = False,
    workspace: Workspace | None = None,
    deliver: Callable[[int, LayerSymmetry], None] = lambda layer, element: None,
) -> Alignment:
    """The symmetry that takes `b` close to `a`, computed layer by layer on accelerate's device.

    Several processes take layers in turn, and each ends up with all of them. With a `workspace` (in process 0), layers that an
    earlier call has matched are taken from there.

    Args:
        allow_nonfinite: tensors outside the MoE blocks may hold weights that are NaN or infinite.
        deliver: called with each layer of `b` and its element as soon as that is known.

    Memory: see `match_layer`; nothing is kept of a layer but its symmetry, 12 bytes a hidden unit.

    Raises:
        CheckpointError: weights that are NaN or infinite.

    Example:
        >>> from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
        >>> from hf_moe_lmc.moe.reading import read_model
        >>> a, b = (read_model(Checkpoint.open(folder)) for folder in ("model-a", "model-b"))
        >>> totals = align_models(a, b, WeightMatching()).totals()
        >>> totals["relative_distance_after_units"] < 0.1 * totals["relative_distance_before"]
        True
    """
    processes = process_group()
    started = time.perf_counter()
    origins = {"a": a.checkpoint.origin(), "b": b.checkpoint.origin()}
    with suited(_products(a)):
        layers = _match_layers(a, b, method, workspace, deliver)
        outside = processes.from_main(outside_distance(a, b, allow_nonfinite=allow_nonfinite) if processes.is_main else None)
    assert outside is not None
    warnings = tuple(_warnings(a, b, method, layers, outside))
    for warning in warnings:
        if warning != SAME or not same_place(a.checkpoint, b.checkpoint):  # which was said when they were opened
            warn(warning)
    elements = {**b.identity().layers, **{index: matching.symmetry for index, matching in layers.items()}}
    metadata: dict[str, str] = {"method": "weight matching", "order": method.order, "units": method.units}
    metadata |= {f"{side}_{key}": value for side, origin in origins.items() for key, value in origin.items()}
    return Alignment(
        symmetry=ModelSymmetry(b.family.name, b.groups, elements, metadata),
        order=method.order,
        units=method.units,
        a=origins["a"],
        b=origins["b"],
        layers=layers,
        outside=outside,
        warnings=warnings,
        seconds=processes.from_main(time.perf_counter() - started),
    )


def _products(model: MoEModel) -> list[Products]:
    """Costs of hidden units against each other, of one pair of experts in each layer and bank."""
    banks = [bank for layer in model.layers.values() for bank in layer.banks.values()]
    return [Products(1, bank.unit_count * bank.width, bank.unit_count) for bank in banks if bank.unit_count]


def _match_layers(
    a: MoEModel,
    b: MoEModel,
    method: WeightMatching,
    workspace: Workspace | None,
    deliver: Callable[[int, LayerSymmetry], None],
) -> dict[int, Matching]:
    """Matches the layers that both models have, one of each process at a time; those of an earlier call are read back."""
    processes, device = process_group(), _device()
    common = sorted(a.layers.keys() & b.layers.keys())
    records = workspace.results("matching", matching_facts(a, b, method)) if workspace else None
    layers = _matched_before(records)
    for index, matching in layers.items():
        deliver(index, matching.symmetry)
    for index in _only_in_b(a, b):
        deliver(index, b.layers[index].identity())
    if layers and processes.is_main:
        note(f"continuing: {len(layers)} of {len(common)} layers were matched by an earlier call")
    remaining = [index for index in common if index not in layers]
    with bar(total=len(common), initial=len(layers), desc="matching layers", unit="layer") as shown:
        for first in range(0, len(remaining), processes.count):  # a round: one layer for each process
            indices = remaining[first : first + processes.count]
            own = [
                match_layer(
                    a.layers[index],
                    b.layers[index],
                    method,
                    groups=a.groups,
                    device=device,
                    bound=b.bound.get(index, {}),
                )
                for index in processes.share(indices)
            ]
            matched = [matching for of_one_process in processes.exchange(own) for matching in of_one_process]
            for index, matching in zip(indices, matched, strict=True):
                layers[index] = matching
                if records:
                    write_matching(records, index, matching)
                deliver(index, matching.symmetry)
            shown.update(len(indices))
    return dict(sorted(layers.items()))


def _matched_before(records: ResultFolder | None) -> dict[int, Matching]:
    """Layers that an earlier call has matched, as process 0 finds them."""
    processes = process_group()
    in_main = dict(matchings(records)) if records else {}
    layers = {}
    for index in processes.from_main(sorted(in_main)):
        matching = processes.from_main(in_main.get(index))
        assert matching is not None
        layers[index] = matching
    return layers


def _only_in_b(a: MoEModel, b: MoEModel) -> list[int]:
    """Multi-token-prediction layers that A lacks; they keep their coordinates."""
    return sorted(b.layers.keys() - a.layers.keys())


def _warnings(
    a: MoEModel, b: MoEModel, method: WeightMatching, layers: Mapping[int, Matching], outside: OutsideDistance
) -> Iterator[str]:
    if only_in_b := _only_in_b(a, b):
        yield f"A lacks the multi-token-prediction layers {only_in_b} of B; they are left as they are"
    firsts = {index: matching.first for index, matching in layers.items()}
    worse = [index for index, first in firsts.items() if first.distance_after_units > 1.001 * first.distance_before]
    if worse:
        yield (
            f"in layers {worse} the experts are further apart in the order that `{method.order}` found than they were; "
            "`best` compares orders"
        )
    if b.experts_outside:
        yield (
            f"experts under {', '.join(b.experts_outside)} do not belong to the text model's layers and are left as they are; "
            "a merge averages them unaligned"
        )
    if bound := {index: b.bound[index] for index in layers if index in b.bound}:
        yield (
            f"in layers {sorted(bound)} of B router rows are tied between experts that differ, and top-k breaks ties by the "
            "places of all experts: these layers keep their order, and their hidden units are matched "
            f"({_first([in_words(index, banks) for index, banks in bound.items()])})"
        )
    if outside.relative_distance == 0 and all(matching.is_trivial for matching in layers.values()):
        yield SAME
    if outside.unrelated:
        yield (
            f"outside the MoE blocks the two models are unrelated (median cosine {outside.median_cosine:.2f}, "
            f"relative distance {outside.relative_distance:.2f}): no alignment of experts can repair that, expect a barrier"
        )


def _first(words: list[str], limit: int = 4) -> str:
    return "; ".join(words[:limit]) + (f"; and {len(words) - limit} layers more" if len(words) > limit else "")


def matching_facts(a: MoEModel, b: MoEModel, method: WeightMatching) -> dict[str, Any]:
    """What the symmetry that `align_models` finds depends on."""
    return {
        "version": ALIGNMENT_VERSION,
        "a": a.checkpoint.resume_key(),
        "b": b.checkpoint.resume_key(),
        "family": b.family.name,
        **method.facts(),
        "device": _device().type,
        **({"keep_their_order": sorted(b.bound)} if b.bound else {}),
    }


def _device() -> torch.device:
    device = PartialState().device
    return torch.device("cpu") if device.type == "mps" else device  # distances are summed in float64, which MPS lacks
