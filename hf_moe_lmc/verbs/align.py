"""The verb `align`: one checkpoint in the coordinates of another."""

from __future__ import annotations

import os
from contextlib import ExitStack

from hf_moe_lmc.errors import InputError
from hf_moe_lmc.matching.alignment import Alignment, align_models, matching_facts
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.publishing.card import model_card
from hf_moe_lmc.publishing.push import check_publishable, publish
from hf_moe_lmc.runtime.processes import team, together
from hf_moe_lmc.verbs.inputs import download, open_models
from hf_moe_lmc.writing.output import begin, writing
from hf_moe_lmc.writing.pipeline import pending, written_meanwhile
from hf_moe_lmc.writing.streams import rewritten


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
    method = WeightMatching(order=order, units=units, exact=exact)
    check_publishable(push_to_hub)
    if symmetry_only and push_to_hub:
        raise InputError("symmetry-only leaves no checkpoint to publish; leave out one of the two")
    mates = team()
    with ExitStack() as stack:
        model_a, model_b = open_models(a, b, stack, output=output, overwrite=overwrite, ignore_extra_layers=True)
        workplace = begin(output, a, b, stack=stack, resume=resume, overwrite=overwrite)
        download(model_a, model_b)
        facts = {"what": "align", "symmetry_only": symmetry_only, "allow_nonfinite": allow_nonfinite}
        facts |= matching_facts(model_a, model_b, method)
        with writing(workplace, facts, inputs=[model_b.checkpoint], allow_nonfinite=allow_nonfinite) as writer:
            elements = pending(model_b.layers)
            stream = rewritten(model_b, elements)
            with written_meanwhile(None if symmetry_only else writer, stream, elements) as deliver:
                alignment = align_models(
                    model_a, model_b, method, allow_nonfinite=allow_nonfinite, workplace=workplace, deliver=deliver
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
