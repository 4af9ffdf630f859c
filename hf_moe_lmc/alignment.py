"""Alignment of two checkpoints, layer by layer, and the streamed rewrite of one in the other's coordinates."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.utils import tqdm

from hf_moe_lmc.card import model_card
from hf_moe_lmc.checkpoint import Checkpoint, bring
from hf_moe_lmc.distribution import team, together
from hf_moe_lmc.errors import CheckpointError, Faults, InputError
from hf_moe_lmc.hub import check_publishable, publish
from hf_moe_lmc.matching import Matching, OrderMethod, check_methods, match_layer
from hf_moe_lmc.memory import scratch
from hf_moe_lmc.model import MoEModel, check_pair
from hf_moe_lmc.output import begin, writing
from hf_moe_lmc.pairing import same_place
from hf_moe_lmc.pipeline import Awaited, written_meanwhile
from hf_moe_lmc.recognition import recognise
from hf_moe_lmc.resume import digest, matchings, write_matching
from hf_moe_lmc.rows import BLOCK
from hf_moe_lmc.streams import rewritten
from hf_moe_lmc.symmetry import LayerSymmetry, ModelSymmetry
from hf_moe_lmc.units import UnitMethod
from hf_moe_lmc.vocabulary import check_tokenizers
from hf_moe_lmc.workplace import Workplace, check_output

ALIGNMENT_VERSION = 1
UNRELATED_COSINE = 0.5  # median over matrices outside the MoE blocks; independent initialisations have about 0


@dataclass(frozen=True)
class OutsideDistance:
    """How far apart two models are outside their MoE blocks, which no expert alignment changes.

    Attributes:
        relative_distance: ||A - B|| / ||A|| over all tensors outside.
        median_cosine: median over the matrices among them of <A, B> / (||A|| ||B||); gains and biases, which start out
            equal in unrelated models, do not count. None without matrices.
        furthest: the tensors with the largest relative distances, largest first.
    """

    relative_distance: float
    median_cosine: float | None
    furthest: dict[str, float]

    @property
    def unrelated(self) -> bool:
        return self.median_cosine is not None and self.median_cosine < UNRELATED_COSINE


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


def open_models(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    stack: ExitStack,
    *,
    output: str | os.PathLike[str] | None = None,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    each: Callable[[MoEModel], object] | None = None,
    ignore_extra_layers: bool = False,
    overwrite: bool = False,
) -> tuple[MoEModel, MoEModel]:
    """Opens, recognises and compares two checkpoints from headers alone, and looks at the output and at a saved symmetry.

    Args:
        each: a further check of either model.
        ignore_extra_layers: see `check_pair`.

    Raises:
        InputError: whatever is wrong with either, with the other two, or between A and B; all of it in one list.
    """
    faults = Faults()
    found: list[str] = []
    opened = [_opened(model, stack, faults) for model in (a, b)]
    checkpoints = [checkpoint for checkpoint in opened if checkpoint]
    if output is not None and team().is_main:
        with faults.gather():
            check_output(output, [checkpoint.folder for checkpoint in checkpoints], overwrite=overwrite)
    if symmetry is not None:
        _given(symmetry, faults)
    models = [_recognised(checkpoint, faults) for checkpoint in checkpoints]
    if len(checkpoints) == 2:
        with faults.gather():
            found += check_tokenizers(*checkpoints)
    recognised = [model for model in models if model]
    for model in recognised:
        with faults.gather():
            if each:
                each(model)
    if len(recognised) == 2:
        with faults.gather():
            found += check_pair(*recognised, ignore_extra_layers=ignore_extra_layers)
    faults.check()
    if same_place(*checkpoints):
        found.insert(0, f"A and B hold the same weights: both are {checkpoints[0].name}")
    for warning in found:
        warnings.warn(warning, stacklevel=3)
    model_a, model_b = recognised
    return model_a, model_b


def _opened(model: str | os.PathLike[str], stack: ExitStack, faults: Faults) -> Checkpoint | None:
    with faults.gather():
        return stack.enter_context(Checkpoint.open(model))
    return None


def _given(symmetry: str | os.PathLike[str] | ModelSymmetry, faults: Faults) -> ModelSymmetry | None:
    with faults.gather():
        return symmetry if isinstance(symmetry, ModelSymmetry) else ModelSymmetry.load(symmetry)
    return None


def _recognised(checkpoint: Checkpoint, faults: Faults) -> MoEModel | None:
    with faults.gather():
        return recognise(checkpoint)
    return None


def align_models(
    a: MoEModel,
    b: MoEModel,
    *,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    exact: bool = False,
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
    check_methods(order, units)
    mates = team()
    started = time.perf_counter()
    device = _device()
    origin_a, origin_b = a.checkpoint.origin(), b.checkpoint.origin()
    found = []
    layers: dict[int, Matching] = {}
    wanted = sorted(a.layers.keys() & b.layers.keys())
    kept = progress.kept("matching", matching_facts(a, b, order=order, units=units, exact=exact)) if progress else None
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
        warnings.warn(f"continuing: {len(before)} of {len(wanted)} layers were matched by an earlier call", stacklevel=2)
    left = [index for index in wanted if index not in layers]
    with tqdm(total=len(wanted), initial=len(layers), desc="matching layers", unit="layer") as bar:
        for first in range(0, len(left), mates.count):  # a round: one layer for each process
            members = left[first : first + mates.count]
            mine = [
                match_layer(
                    a.layers[index], b.layers[index], groups=a.groups, order=order, units=units, exact=exact, device=device
                )
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
            f"in layers {worse} the experts are further apart in the order that `{order}` found than they were; "
            "`best` compares orders"
        )
    if b.experts_outside:
        found.append(
            f"experts under {', '.join(b.experts_outside)} do not belong to the text model's layers and are left as they are; "
            "a merge averages them unaligned"
        )
    if b.quantisation:
        found.append(
            f"the weights are quantised ({b.quantisation.method}): whole experts change places with their scales; hidden units "
            "keep theirs, as anything else would need new scales"
        )
    outside = mates.from_main(outside_distance(a, b, allow_nonfinite=allow_nonfinite) if mates.is_main else None)
    assert outside is not None
    if outside.relative_distance == 0 and all(matching.is_trivial for matching in layers.values()):
        found.append("A and B hold the same weights; the alignment is the identity")
    if outside.unrelated:
        found.append(
            f"outside the MoE blocks the two models are unrelated (median cosine {outside.median_cosine:.2f}, "
            f"relative distance {outside.relative_distance:.2f}): no alignment of experts can repair that, expect a barrier"
        )
    for warning in found:
        warnings.warn(warning, stacklevel=2)
    symmetries = {**b.identity().layers, **{index: matching.symmetry for index, matching in layers.items()}}
    metadata: dict[str, str] = {"method": "weight matching", "order": order, "units": units}
    metadata |= {f"{side}_{key}": value for side, origin in (("a", origin_a), ("b", origin_b)) for key, value in origin.items()}
    return Alignment(
        symmetry=ModelSymmetry(b.family.name, b.groups, symmetries, metadata),
        order=order,
        units=units,
        a=origin_a,
        b=origin_b,
        layers=layers,
        outside=outside,
        warnings=tuple(found),
        seconds=mates.from_main(time.perf_counter() - started),
    )


def matching_facts(a: MoEModel, b: MoEModel, *, order: OrderMethod, units: UnitMethod, exact: bool) -> dict[str, Any]:
    """What the symmetry that `align_models` finds depends on."""
    return {
        "version": ALIGNMENT_VERSION,
        "a": a.checkpoint.fingerprint(),
        "b": b.checkpoint.fingerprint(),
        "family": b.family.name,
        "order": order,
        "units": units,
        "exact": exact,
        "device": _device().type,
    }


def _device() -> torch.device:
    device = PartialState().device
    return torch.device("cpu") if device.type == "mps" else device  # distances are summed in float64, which MPS lacks


def outside_distance(a: MoEModel, b: MoEModel, *, allow_nonfinite: bool = False) -> OutsideDistance:
    """Compares the tensors outside the MoE blocks that both models have, streaming; quantised ones do not count.

    Raises:
        CheckpointError: a weight that is NaN or infinite, unless allowed: then its tensor does not count.
    """
    relative, cosines = {}, []
    total = total_norm = 0.0
    in_both = set(b.outside)
    for name in tqdm([name for name in a.outside if name in in_both], desc="comparing the rest", unit="tensor"):
        info = a.checkpoint.tensors[name]
        if not info.dtype.is_floating_point or info.dtype.itemsize < 2 or info.numel == 0:
            continue  # quantised values mean nothing without their scales
        found = _moments(a.checkpoint, b.checkpoint, name, allow_nonfinite=allow_nonfinite)
        if found is None:
            continue
        distance, norm_a, norm_b, inner = found
        total, total_norm = total + distance, total_norm + norm_a
        relative[name] = math.sqrt(distance / (norm_a or norm_b or 1.0))
        if len(info.shape) > 1 and norm_a and norm_b:
            cosines.append(inner / math.sqrt(norm_a * norm_b))
    furthest = sorted(relative, key=lambda name: -relative[name])[:5]
    return OutsideDistance(
        relative_distance=math.sqrt(total / total_norm) if total_norm else 0.0,
        median_cosine=float(torch.tensor(cosines).median()) if cosines else None,
        furthest={name: relative[name] for name in furthest},
    )


def _moments(
    a: Checkpoint, b: Checkpoint, name: str, *, allow_nonfinite: bool, dtype: torch.dtype = torch.float32
) -> tuple[float, float, float, float] | None:
    """||a - b||^2, ||a||^2, ||b||^2, <a, b> of one tensor; None where weights that are not finite are allowed and there."""
    sums = torch.zeros(4, dtype=torch.float64)
    for first, values in a.chunks(name):
        for of_a, of_b in zip(values.split(BLOCK), b.read(name, first, len(values)).split(BLOCK), strict=True):
            x, y = (scratch(side, of.shape, dtype, of.device).copy_(of) for side, of in (("a", of_a), ("b", of_b)))
            parts = [torch.dot(left, right) for left, right in ((x, x), (y, y), (x, y))]
            x.sub_(y)
            sums += torch.stack([torch.dot(x, x), *parts]).double()
    if not bool(sums.isfinite().all()):
        for checkpoint in (a, b):
            at = checkpoint.first_not_finite(name)
            if at and allow_nonfinite:
                return None
            if at:
                raise CheckpointError(
                    f"{checkpoint.name}/{checkpoint.tensors[name].shard}: tensor {name} holds NaN or infinite weights, the "
                    f"first at {at}. Repair the checkpoint, or write it as it is with --allow-nonfinite"
                )
        if dtype != torch.float64:  # squares beyond the range of float32
            return _moments(a, b, name, allow_nonfinite=allow_nonfinite, dtype=torch.float64)
    distance, norm_a, norm_b, inner = sums.tolist()
    return distance, norm_a, norm_b, inner


def load_symmetry(symmetry: str | os.PathLike[str] | ModelSymmetry, model: MoEModel, *, inverse: bool = False) -> ModelSymmetry:
    """A saved or given symmetry (or its inverse), checked to act on `model`.

    Raises:
        SymmetryError: not a symmetry, of another family, or of other shapes.
    """
    value = symmetry if isinstance(symmetry, ModelSymmetry) else ModelSymmetry.load(symmetry)
    value = value.inverse() if inverse else value
    model.check_symmetry(value)
    return value


def download(*models: MoEModel, given: ModelSymmetry | None = None) -> None:
    """Brings the weights, once everything has been checked from headers.

    Warns where a `given` symmetry was recorded for other weights than those of the last model, which it acts on.
    """
    bring(*(model.checkpoint for model in models))
    model = models[-1]
    recorded = given.metadata.get("b_fingerprint") if given else None
    if recorded is not None and recorded != model.checkpoint.fingerprint():
        warnings.warn(
            f"{model.checkpoint.name}: the symmetry was recorded for another checkpoint (fingerprint {recorded[:12]})",
            stacklevel=3,
        )


@together
def align(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    exact: bool = False,
    symmetry_only: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    resume: bool = True,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Alignment:
    """Finds the symmetry that takes B close to A and writes B in those coordinates: the same function, nearby weights.

    Several processes (torchrun) share the layers; process 0 writes.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        output: a new or empty folder. It gets a complete checkpoint in B's layout and, under alignment/,
            symmetry.safetensors and alignment.json; with `symmetry_only` just these two.
        order: expert order by `gate`, `expert`, or the `best` of both.
        units: `plain` or `scaled` hidden units.
        exact: match wide experts by all their costs in full too, and both orders; without, sketches with a proof come first.
        push_to_hub: OWNER/NAME to publish the result under.
        resume: continue from the layers that an earlier call with the same inputs and options had matched, and the shards
            that it had written, when it was stopped (see workplace.py); they are kept beside the output until that is whole.
        overwrite: `output` may be what this package wrote before; it is replaced when the new one is whole.
        allow_nonfinite: write weights of B that are NaN or infinite, instead of raising, where matching does not need them.

    Raises:
        InputError: the inputs do not fit, before anything is written; or weights are NaN or infinite.
        WriteError: the system refuses to write.
    """
    check_methods(order, units)
    check_publishable(push_to_hub)
    if symmetry_only and push_to_hub:
        raise InputError("symmetry-only leaves no checkpoint to publish; leave out one of the two")
    mates = team()
    with ExitStack() as stack:
        model_a, model_b = open_models(a, b, stack, output=output, overwrite=overwrite, ignore_extra_layers=True)
        workplace = begin(output, a, b, stack=stack, resume=resume, overwrite=overwrite)
        download(model_a, model_b)
        method: dict[str, Any] = {"order": order, "units": units, "exact": exact}
        facts = {"what": "align", "symmetry_only": symmetry_only, "allow_nonfinite": allow_nonfinite}
        facts |= matching_facts(model_a, model_b, **method)
        with writing(workplace, facts, inputs=[model_b.checkpoint], allow_nonfinite=allow_nonfinite) as writer:
            elements = Awaited(model_b.layers)
            stream = rewritten(model_b, elements)
            with written_meanwhile(None if symmetry_only else writer, stream, elements) as tell:
                alignment = align_models(
                    model_a, model_b, **method, allow_nonfinite=allow_nonfinite, progress=workplace, tell=tell
                )
            if writer and not symmetry_only:
                writer.write_checkpoint_files(model_b.checkpoint)
            if not symmetry_only:
                alignment = alignment.with_output(mates.from_main(writer.fingerprint() if writer else ""))
            if writer:
                folder = "" if symmetry_only else "alignment/"
                if not symmetry_only:
                    writer.write_text("README.md", align_card(model_a, model_b, alignment))
                alignment.symmetry.save(writer.path(f"{folder}symmetry.safetensors"))
                writer.write_text(f"{folder}alignment.json", alignment.to_json())
    if push_to_hub and mates.is_main:
        publish(output, push_to_hub, private=private)
    return alignment


@together
def apply(
    symmetry: str | os.PathLike[str] | ModelSymmetry,
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inverse: bool = False,
    resume: bool = True,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Path:
    """Writes checkpoint `b` in the coordinates of a saved symmetry, or with `inverse` undoes it.

    Without scales this is lossless in every dtype, and the inverse restores the bytes.

    Args:
        resume, overwrite, allow_nonfinite: as for `align`.

    Raises:
        SymmetryError: the symmetry is of another family or of other shapes.
        InputError: whatever else does not fit, before anything is written.
        WriteError: the system refuses to write.
    """
    faults = Faults()
    with ExitStack() as stack:
        opened = _opened(b, stack, faults)
        if team().is_main:
            with faults.gather():
                check_output(output, [opened.folder] if opened else [], overwrite=overwrite)
        read = _recognised(opened, faults) if opened else None
        given = _given(symmetry, faults)
        faults.check()
        assert read is not None and given is not None
        model, value = read, load_symmetry(given, read, inverse=inverse)
        workplace = begin(output, b, stack=stack, resume=resume, overwrite=overwrite)
        download(model, given=value)
        facts: dict[str, Any] = {"what": "apply", "allow_nonfinite": allow_nonfinite}
        facts |= {"b": model.checkpoint.fingerprint(), "symmetry": digest(value)}
        with writing(workplace, facts, inputs=[model.checkpoint], allow_nonfinite=allow_nonfinite) as writer:
            if writer:
                writer.write_tensors(rewritten(model, value.layers))
                writer.write_checkpoint_files(model.checkpoint)
                value.save(writer.path("alignment/symmetry.safetensors"))
                writer.write_text("README.md", apply_card(model, value, inverse=inverse))
    return Path(output)


def align_card(a: MoEModel, b: MoEModel, alignment: Alignment) -> str:
    return model_card(
        title=f"{b.checkpoint.display_name}, aligned to {a.checkpoint.display_name}",
        summary="The same function as B, with experts and hidden units in the places where A has theirs, so that the two can "
        "be averaged weight by weight.",
        inputs={"A": a.checkpoint, "B": b.checkpoint},
        base=[b.checkpoint],
        relation="finetune",
        command=f"hf-moe-lmc align A B -o OUT --order {alignment.order} --units {alignment.units}",
        alignment=alignment.totals(),
    )


def apply_card(model: MoEModel, symmetry: ModelSymmetry, *, inverse: bool) -> str:
    return model_card(
        title=f"{model.checkpoint.display_name}, in other coordinates",
        summary=f"The same function as B, with its experts and hidden units moved by a {'reversed ' if inverse else ''}saved "
        "symmetry (alignment/symmetry.safetensors).",
        inputs={"B": model.checkpoint},
        base=[model.checkpoint],
        relation="finetune",
        command=f"hf-moe-lmc apply SYMMETRY B -o OUT{' --inverse' if inverse else ''}",
        alignment=None,
    )
