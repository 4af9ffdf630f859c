"""The interpolation path between two models, theta_t = (1 - t) A + t B', for the writer and the evaluator alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_moe_lmc.alignment import Alignment, align_models, begin, download, load_symmetry, open_models, writing
from hf_moe_lmc.card import model_card
from hf_moe_lmc.distribution import team, together
from hf_moe_lmc.errors import CheckpointError, InputError, MismatchError
from hf_moe_lmc.hub import check_publishable, publish
from hf_moe_lmc.layer import LayerSource
from hf_moe_lmc.matching import OrderMethod
from hf_moe_lmc.model import ModelStream, MoEModel
from hf_moe_lmc.quantisation import WAY_OUT
from hf_moe_lmc.symmetry import ModelSymmetry
from hf_moe_lmc.units import UnitMethod

AT_ONCE = 4 << 20  # elements of one step of `interpolate_into`


def interpolate(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b in float32 (float64 stays), not cast back; exactly a at t = 0 and b at t = 1.

    Where a and b are equal the result equals them at every t. Integers have to be equal.

    Raises:
        MismatchError: integers that differ.
    """
    if not a.dtype.is_floating_point:
        if not torch.equal(a, b.to(a.dtype)):
            raise MismatchError("integers that differ between A and B cannot be interpolated")
        return a
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if t == 0:
        return a.to(dtype)
    if t == 1:
        return b.to(dtype)
    return torch.lerp(a.to(dtype), b.to(dtype), t)


def interpolate_into(out: Tensor, a: Tensor, b: Tensor, t: float) -> None:
    """`interpolate` written to `out`, in its dtype and on its device, with AT_ONCE elements in float32 at a time."""
    if a.numel() <= AT_ONCE or a.ndim == 0:
        out.copy_(interpolate(a, b, t))
        return
    rows = AT_ONCE // (a.numel() // len(a))
    if rows:
        for parts in zip(out.split(rows), a.split(rows), b.split(rows), strict=True):
            parts[0].copy_(interpolate(*parts[1:], t))
    else:
        for parts in zip(out, a, b, strict=True):
            interpolate_into(*parts, t)


@dataclass(frozen=True)
class InterpolatedLayer:
    """A point on the line between two MoE blocks, those of layer `index`."""

    index: int
    a: LayerSource
    b: LayerSource
    t: float

    def read(self, role: str, expert: int | None = None) -> Tensor:
        try:
            return interpolate(self.a.read(role, expert), self.b.read(role, expert), self.t)
        except MismatchError as error:
            raise MismatchError(f"layer {self.index}: {role}: {error}") from error


def interpolated(a: MoEModel, b: MoEModel, symmetry: ModelSymmetry, t: float) -> ModelStream:
    """The checkpoint theta_t in A's layout, where B' is `b` in the coordinates that `symmetry` gives it."""
    acted = b.acted(symmetry)
    layers: dict[int, LayerSource] = {
        index: InterpolatedLayer(index, layer, acted[index], t) for index, layer in a.layers.items() if index in acted
    }

    def outside(name: str) -> Iterator[tuple[int, Tensor]]:
        for first, values in a.checkpoint.chunks(name):
            try:
                yield first, interpolate(values, b.checkpoint.read(name, first, len(values)), t)
            except MismatchError as error:
                raise MismatchError(f"{name}: {error}") from error

    return ModelStream(a, layers, outside)


def refuse_quantised(*models: MoEModel) -> None:
    """Raises CheckpointError where weights are quantised: points between two models would need scales of their own."""
    for model in models:
        if model.quantisation:
            raise CheckpointError(
                f"{model.checkpoint.name}: config.json declares quantised weights ({model.quantisation.method}), which cannot "
                f"be interpolated; align and apply can move whole experts. {WAY_OUT}"
            )


def check_t(t: float) -> None:
    """Raises InputError unless 0 <= t <= 1."""
    if not 0 <= t <= 1:
        raise InputError(f"t = {t}: expected a number from 0 (A) to 1 (B)")


@together
def merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    t: float = 0.5,
    *,
    align: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    order: OrderMethod = "best",
    units: UnitMethod = "scaled",
    exact: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    resume: bool = True,
) -> Alignment | None:
    """Writes the checkpoint theta_t = (1 - t) A + t B' with a model card, in A's layout, dtypes and side files.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]).
        output: a new or empty folder.
        align: match B to A first; otherwise B is taken as it is.
        symmetry: a saved or given symmetry instead of matching.
        order, units, exact: as in `align`.
        push_to_hub: OWNER/NAME to publish the result under.
        resume: continue from the layers that an earlier call had matched when it was stopped (see `align`).

    Returns:
        The alignment that was computed, or None where there was nothing to compute.

    Raises:
        InputError: the inputs do not fit, before anything is written.
    """
    check_t(t)
    check_publishable(push_to_hub)
    if symmetry is not None and not align:
        raise InputError("a symmetry was given and alignment was turned off; choose one")
    mates = team()
    with ExitStack() as stack:
        progress = begin(output, stack, resume=resume)
        model_a, model_b = open_models(a, b, stack)
        refuse_quantised(model_a, model_b)
        given = load_symmetry(symmetry, model_b) if symmetry is not None else None
        with writing(output, model_a, model_b) as writer:
            download(model_a, model_b, given=given)
            alignment = None
            if align and given is None:
                alignment = align_models(model_a, model_b, order=order, units=units, exact=exact, progress=progress)
            used = alignment.symmetry if alignment else given or model_b.identity()
            if writer:
                writer.write_tensors(interpolated(model_a, model_b, used, t))
                writer.write_checkpoint_files(model_a.checkpoint)
                if alignment or given:
                    used.save(writer.path("alignment/symmetry.safetensors"))
                if alignment:
                    writer.write_text("alignment/alignment.json", alignment.to_json())
                writer.write_text("README.md", merge_card(model_a, model_b, t, alignment, given))
    if push_to_hub and mates.is_main:
        publish(output, push_to_hub, private=private)
    return alignment


def merge_card(a: MoEModel, b: MoEModel, t: float, alignment: Alignment | None, given: ModelSymmetry | None) -> str:
    how = "aligned to A by weight matching" if alignment else "aligned to A by a saved symmetry" if given else "not aligned"
    options = "" if alignment else " --symmetry SYMMETRY" if given else " --no-align"
    if alignment:
        options = f" --order {alignment.order} --units {alignment.units}"
    return model_card(
        title=f"A merge of {a.checkpoint.display_name} and {b.checkpoint.display_name}",
        summary=f"The point t = {t:g} of the straight line (1 - t) A + t B' between two Mixture-of-Experts models, "
        f"where B' is B, {how}.",
        inputs={"A": a.checkpoint, "B": b.checkpoint},
        base=[a.checkpoint, b.checkpoint],
        relation="merge",
        command=f"hf-moe-lmc merge A B -o OUT -t {t:g}{options}",
        alignment=alignment.totals() if alignment else None,
    )
