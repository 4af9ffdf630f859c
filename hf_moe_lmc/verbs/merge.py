"""The verb `merge`: one point of the interpolation path, written as a checkpoint.

Without alignment nothing has to be known of the model: two checkpoints that hold the same tensors are interpolated as they
are, and transformers is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, bring
from hf_moe_lmc.checkpoints.pair import check_plain_pair
from hf_moe_lmc.errors import Faults, InputError
from hf_moe_lmc.matching.options import WeightMatching
from hf_moe_lmc.publishing.card import model_card
from hf_moe_lmc.publishing.push import check_publishable, publish
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import team, together
from hf_moe_lmc.writing.interpolation import check_t
from hf_moe_lmc.writing.output import TensorStream, begin, writing
from hf_moe_lmc.writing.pipeline import Awaited, written_meanwhile
from hf_moe_lmc.writing.spans import PlainStream
from hf_moe_lmc.writing.workplace import check_output

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.matching.options import OrderMethod, UnitMethod
    from hf_moe_lmc.moe.model import MoEModel
    from hf_moe_lmc.symmetry.group import ModelSymmetry


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
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> Alignment | None:
    """Writes the checkpoint theta_t = (1 - t) A + t B' with a model card, in A's layout, dtypes and side files.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]).
        output: a new or empty folder.
        align: match B to A first; otherwise B is taken as it is. Two checkpoints with the same tensors are then
            interpolated without a look at what they are, so dense ones, too.
        symmetry: a saved or given symmetry instead of matching.
        order, units, exact: as in `align`.
        push_to_hub: OWNER/NAME to publish the result under.
        resume: continue from the layers that an earlier call had matched, and the shards that it had written, when it was
            stopped (see workplace.py).
        overwrite: `output` may be what this package wrote before; it is replaced when the new one is whole.
        allow_nonfinite: write weights that are NaN or infinite, instead of raising.

    Returns:
        The alignment that was computed, or None where there was nothing to compute.

    Raises:
        InputError: the inputs do not fit, before anything is written; or weights are NaN or infinite.
        WriteError: the system refuses to write.
    """
    check_t(t)
    check_publishable(push_to_hub)
    if symmetry is not None and not align:
        raise InputError("a symmetry was given and alignment was turned off; choose one")
    with ExitStack() as stack:
        opened = open_plain(a, b, stack, output=output, overwrite=overwrite) if not align else None
        models = None if opened else _open_models(a, b, stack, output=output, symmetry=symmetry, overwrite=overwrite)
        workplace = begin(output, a, b, stack=stack, resume=resume, overwrite=overwrite)
        if opened:
            found = _plain(*opened, t)
        else:
            assert models is not None
            found = _modelled(*models, t, align, symmetry, WeightMatching(order=order, units=units, exact=exact))
        facts = {"what": "merge", "t": t, "allow_nonfinite": allow_nonfinite, **found.facts}
        with writing(workplace, facts, inputs=[found.a, found.b], allow_nonfinite=allow_nonfinite) as writer:
            alignment = None
            if found.search:
                elements, search = found.search
                with written_meanwhile(writer, found.stream, elements) as tell:
                    alignment = search(allow_nonfinite=allow_nonfinite, progress=workplace, tell=tell)
            elif writer:
                writer.write_tensors(found.stream)
            used = alignment.symmetry if alignment else found.given
            if writer:
                writer.write_checkpoint_files(found.a)
                if used:
                    used.save(writer.path("alignment/symmetry.safetensors"))
                if alignment:
                    writer.write_text("alignment/alignment.json", alignment.to_json())
                writer.write_text("README.md", merge_card(found, alignment, t))
    if push_to_hub and team().is_main:
        publish(output, push_to_hub, private=private)
    return alignment


@dataclass(frozen=True)
class _Merge:
    """What is to be written, and from what.

    Attributes:
        facts: what its shards depend on besides t.
        given: a symmetry that B was aligned with before.
        search: the group elements that `stream` waits for, and `align_models` for the two; None: there is nothing to find.
    """

    a: Checkpoint
    b: Checkpoint
    stream: TensorStream
    facts: dict[str, Any]
    given: ModelSymmetry | None = None
    search: tuple[Awaited, Callable[..., Alignment]] | None = None


def _plain(a: Checkpoint, b: Checkpoint, t: float) -> _Merge:
    """Two checkpoints with the same tensors as they are."""
    bring(a, b)
    return _Merge(a, b, PlainStream(a, b, t), {"a": a.fingerprint(), "b": b.fingerprint()})


def open_plain(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    stack: ExitStack,
    *,
    output: str | os.PathLike[str],
    overwrite: bool = False,
) -> tuple[Checkpoint, Checkpoint] | None:
    """Two checkpoints with the same tensors, checked from their headers; None if they hold other ones, or quantised ones.

    Raises:
        InputError: whatever is wrong with either, between them, or with the output; all of it in one list.
    """
    faults, opened = Faults(), list[Checkpoint]()
    for model in (a, b):
        with faults.gather():
            opened.append(stack.enter_context(Checkpoint.open(model)))
    pair = (opened[0], opened[1]) if len(opened) == 2 else None
    if pair and (pair[0].tensors.keys() != pair[1].tensors.keys() or any(one.quantization for one in pair)):
        return None
    if team().is_main:
        with faults.gather():
            check_output(output, [one.folder for one in opened], overwrite=overwrite)
    found = []
    if pair:
        with faults.gather():
            found = check_plain_pair(*pair)
    faults.check()
    for warning in found:
        warn(warning)
    return pair


def _open_models(
    a: str | os.PathLike[str], b: str | os.PathLike[str], stack: ExitStack, **options: Any
) -> tuple[MoEModel, MoEModel]:
    from hf_moe_lmc.verbs.inputs import open_models
    from hf_moe_lmc.writing.streams import refuse_quantised

    return open_models(a, b, stack, each=refuse_quantised, **options)


def _modelled(
    model_a: MoEModel,
    model_b: MoEModel,
    t: float,
    align: bool,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None,
    method: WeightMatching,
) -> _Merge:
    """Two models, the second one to be aligned by a `method`, or aligned before, or in another layout."""
    from hf_moe_lmc.matching.alignment import align_models, matching_facts
    from hf_moe_lmc.symmetry.group import digest
    from hf_moe_lmc.verbs.inputs import download, load_symmetry
    from hf_moe_lmc.writing.streams import interpolated

    given = load_symmetry(symmetry, model_b) if symmetry is not None else None
    download(model_a, model_b, given=given)
    of_a, of_b = model_a.checkpoint, model_b.checkpoint
    if align and given is None:
        elements = Awaited(model_b.layers)
        stream = interpolated(model_a, model_b, elements, t, rounded=True)
        facts = matching_facts(model_a, model_b, method)
        return _Merge(of_a, of_b, stream, facts, search=(elements, partial(align_models, model_a, model_b, method)))
    used = given or model_b.identity()
    stream = interpolated(model_a, model_b, used.layers, t, rounded=True)
    facts = {"a": of_a.fingerprint(), "b": of_b.fingerprint(), "symmetry": digest(used)}
    return _Merge(of_a, of_b, stream, facts, given)


def merge_card(found: _Merge, alignment: Alignment | None, t: float) -> str:
    aligned, given = alignment is not None, found.given is not None
    how = "aligned to A by weight matching" if aligned else "aligned to A by a saved symmetry" if given else "not aligned"
    options = " --symmetry SYMMETRY" if given else " --no-align"
    if alignment:
        options = f" --order {alignment.order} --units {alignment.units}"
    return model_card(
        title=f"A merge of {found.a.display_name} and {found.b.display_name}",
        summary=f"The point t = {t:g} of the straight line (1 - t) A + t B' between two "
        f"{'Mixture-of-Experts ' if aligned or given else ''}models, where B' is B, {how}.",
        inputs={"A": found.a, "B": found.b},
        base=[found.a, found.b],
        relation="merge",
        command=f"hf-moe-lmc merge A B -o OUT -t {t:g}{options}",
        alignment=alignment.totals() if alignment else None,
    )
