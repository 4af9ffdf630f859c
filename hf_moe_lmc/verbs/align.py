"""The verb `align`: one checkpoint in the coordinates of another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hf_moe_lmc.errors import refuse_idle
from hf_moe_lmc.matching.alignment import Alignment, align_models, matching_facts
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.publishing.card import OUT, CardContent, Destination, model_card
from hf_moe_lmc.runtime.processes import process_group
from hf_moe_lmc.verbs.foretelling import foretell
from hf_moe_lmc.verbs.inputs import Inputs, download
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.options import OutputOptions, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.writing.formats import (
    OutputFormat,
    check_format,
    check_moves,
    format_facts,
    format_option,
    left_in_place,
    model_moved,
    write_beside,
)
from hf_moe_lmc.writing.output import FolderWriter, open_writer
from hf_moe_lmc.writing.pipeline import pending, written_meanwhile
from hf_moe_lmc.writing.workspace import Workspace


@verb
def align(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    order: OrderMethod | None = None,
    units: UnitMethod | None = None,
    exact: bool | None = None,
    format: Literal["b", "bf16"] = "b",
    symmetry_only: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    resume: bool | None = None,
    overwrite: bool | None = None,
    allow_nonfinite: bool | None = None,
) -> Request[Alignment]:
    """Finds the symmetry that takes B close to A and writes B in those coordinates: the same function, nearby weights.

    Several processes (torchrun) share the layers; process 0 writes. `align.plan` takes the same arguments and returns the
    Plan: a dry run.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]) of one architecture.
        output: a new or empty folder. It gets a complete checkpoint in B's layout and, under alignment/,
            symmetry.safetensors and alignment.json; with `symmetry_only` just these two.
        order: expert order by `gate`, `expert`, or the `best` of both (the default); see `WeightMatching`.
        units: hidden units `plain`, or `scaled` (the default), up to sign and scale.
        exact: match wide experts by all their costs in full too; without, sketches with a proof come first.
        format: how the output stores its weights: as B does, or with what B has quantized in bfloat16. A quantized format
            carries the order of experts and signs exactly; hidden units then stay where they are, and the symmetry has all.
        symmetry_only: write no checkpoint.
        push_to_hub: OWNER/NAME to publish the result under, where it holds no weights yet; see `push`.
        private: publish it as a private repository.
        license: identifier of the licence that the card names, such as apache-2.0; by default that of B's card.
        resume: continue from the layers and shards of an earlier call with the same inputs and options that was stopped (the
            default). Until the output is whole they are kept in `.OUT.progress` beside it.
        overwrite: `output` may be what this package wrote before; it is replaced when the new one is whole.
        allow_nonfinite: write weights of B that are NaN or infinite, instead of raising, where matching does not need them.

    Raises:
        InputError: the inputs do not fit, before anything is written; or weights are NaN or infinite.
        WriteError: the system refuses to write.

    Example:
        >>> alignment = lmc.align("model-a", "model-b", "aligned")  # doctest: +SKIP
        >>> alignment.totals()["experts_moved"]  # doctest: +SKIP
        14
    """
    given = locals()
    check_format(format, "b", "bf16")
    method, options = filled(WeightMatching, given), filled(OutputOptions, given)
    if symmetry_only:
        refuse_idle({"license": license}, "a symmetry gets no card")

    def prepare(inputs: Inputs) -> Job[Alignment]:
        pair = inputs.pair(a, b, inside_only=True)
        if not symmetry_only:
            check_moves(pair.b, format)
        destination = options.destination()
        return _Alignment(pair.a, pair.b, method, symmetry_only, format, options.allow_nonfinite, destination)

    return Request(
        verb="align",
        output=output,
        inputs=(a, b),
        options=options,
        prepare=prepare,
        writes_weights=not symmetry_only,
    )


plan_align = align.plan


@dataclass(frozen=True)
class _Alignment(Job[Alignment]):
    a: MoEModel
    b: MoEModel
    method: WeightMatching
    symmetry_only: bool
    format: OutputFormat
    allow_nonfinite: bool
    destination: Destination

    @property
    def work(self) -> Work:
        return Work(
            inputs=[self.a.checkpoint, self.b.checkpoint],
            template=None if self.symmetry_only else model_moved(self.b, self.b.identity().layers, self.format).template,
            models=[self.a, self.b],
            matched=True,
            facts=self.facts,
        )

    def facts(self) -> Mapping[str, Any]:
        options = {"what": "align", "symmetry_only": self.symmetry_only, "allow_nonfinite": self.allow_nonfinite}
        options |= format_facts(self.format, "b")
        return options | matching_facts(self.a, self.b, self.method)

    def run(self, workspace: Workspace | None) -> Alignment:
        foretell(self.a, self.b)
        download(self.a, self.b)
        inputs = [self.b.checkpoint]
        with open_writer(workspace, self.facts(), inputs=inputs, allow_nonfinite=self.allow_nonfinite) as writer:
            elements = pending(self.b.layers)
            stream = model_moved(self.b, elements, self.format)
            with written_meanwhile(None if self.symmetry_only else writer, stream, elements) as deliver:
                alignment = align_models(
                    self.a, self.b, self.method, allow_nonfinite=self.allow_nonfinite, workspace=workspace, deliver=deliver
                )
            if self.symmetry_only:
                if writer:
                    write_alignment(writer, alignment, "")
                return alignment
            if writer:
                write_beside(writer, stream, more=left_in_place(self.b, alignment.symmetry, stream))
            alignment = alignment.with_output(process_group().from_main(writer.fingerprint() if writer else ""))
            if writer:
                writer.write_text("README.md", align_card(self.a, self.b, alignment, self.destination, self.format))
                write_alignment(writer, alignment, "alignment/")
        return alignment


def write_alignment(writer: FolderWriter, alignment: Alignment, folder: str) -> None:
    """Writes the symmetry and the report of what was matched."""
    alignment.symmetry.save(writer.path(f"{folder}symmetry.safetensors"))
    writer.write_text(f"{folder}alignment.json", alignment.to_json())


def align_card(a: MoEModel, b: MoEModel, alignment: Alignment, destination: Destination, form: OutputFormat = "b") -> str:
    """The model card of an aligned checkpoint."""
    return model_card(
        CardContent(
            title="{B} aligned to {A}",
            summary="The same function as B. Its experts and hidden units have the places that they have in A, so that the "
            "weights of the two can be averaged.",
            inputs={"A": a.checkpoint, "B": b.checkpoint},
            base="B",
            relation="finetune",
            command=[
                *("align", "A", "B", "-o", OUT, "--order", alignment.order, "--units", alignment.units),
                *format_option(form, "b"),
            ],
            template=b.checkpoint,
            destination=destination,
            alignment=alignment.sentences(),
            matched=True,
        )
    )
