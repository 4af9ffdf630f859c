"""The verb `merge`: points of the interpolation path, each written as a checkpoint, all in one pass over the inputs.

Without alignment nothing has to be known of the model: two checkpoints that hold the same tensors are interpolated as they
are, and transformers is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, download_checkpoints
from hf_moe_lmc.checkpoints.token_ids import TokenIds
from hf_moe_lmc.errors import InputError, refuse_idle
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.publishing.card import Destination
from hf_moe_lmc.verbs.inputs import Inputs, Pair
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.merge_card import merge_card
from hf_moe_lmc.verbs.merge_points import MergePoints, T, chosen, standing_in, within
from hf_moe_lmc.verbs.options import OutputOptions, file_name, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.writing.output import FolderWriter, open_writer
from hf_moe_lmc.writing.spans import PlainStream
from hf_moe_lmc.writing.workspace import Workspace

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.symmetry.group import ModelSymmetry


@verb
def merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    t: T = 0.5,
    *,
    align: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    tokenizer: Literal["a", "b"] = "a",
    order: OrderMethod | None = None,
    units: UnitMethod | None = None,
    exact: bool | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    resume: bool | None = None,
    overwrite: bool | None = None,
    allow_nonfinite: bool | None = None,
) -> Request[Alignment | None]:
    """Writes the checkpoint theta_t = (1 - t) A + t B' with a model card, in A's layout, dtypes and side files.

    For several t each checkpoint stands in a folder of its own, such as `output/t0.3`. A and B are read once for all of them.

    `merge.plan` takes the same arguments and returns the Plan: a dry run.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]).
        output: a new or empty folder.
        t: 0 is A, 1 is B; a number, or several.
        align: match B to A first; otherwise B is taken as it is. Two checkpoints with the same tensors are then
            interpolated without a look at what they are, so dense ones, too.
        symmetry: a saved or given symmetry instead of matching.
        tokenizer: whose tokenizer, chat template, generation configuration and special ids the output has, together.
        order, units, exact, push_to_hub, private, license, resume, overwrite, allow_nonfinite: as for `align`.

    Returns:
        The alignment that was computed, or None where there was nothing to compute.

    Raises:
        InputError: the inputs do not fit, before anything is written; or weights are NaN or infinite.
        WriteError: the system refuses to write.

    Example:
        >>> lmc.merge("model-a", "model-b", "merged", t=0.3)  # doctest: +SKIP
    """
    given = locals()
    method, options = filled(WeightMatching, given), filled(OutputOptions, given)
    points = MergePoints(chosen(t), tokenizer, options.allow_nonfinite)
    if len(points.t) > 1 and options.push_to_hub:
        raise InputError(
            f"--push-to-hub publishes one checkpoint, and {len(points.t)} t were given; publish its folders with push"
        )
    if symmetry is not None and not align:
        raise InputError("a symmetry was given and alignment was turned off; choose one")
    if symmetry is not None or not align:
        refuse_idle({"order": order, "units": units, "exact": exact or None}, "nothing is matched")
    if tokenizer not in ("a", "b"):
        raise InputError(f"tokenizer {tokenizer!r}: expected a or b")
    destination = options.destination(output)

    def prepare(inputs: Inputs) -> Job[Alignment | None]:
        plain = None if align else inputs.plain_pair(a, b)
        if plain:
            return _PlainMerge(*plain, points, destination)
        from hf_moe_lmc.writing.streams import refuse_quantized

        pair = inputs.pair(a, b, symmetry=symmetry, each=refuse_quantized)
        matched = method if align and pair.symmetry is None else None
        return _Merge(pair, points, matched, destination, file_name(symmetry))

    return Request(verb="merge", output=output, inputs=(a, b), options=options, prepare=prepare)


plan_merge = merge.plan


@dataclass(frozen=True)
class _PlainMerge(Job["Alignment | None"]):
    """Two checkpoints with the same tensors, as they are."""

    a: Checkpoint
    b: Checkpoint
    ids: TokenIds
    points: MergePoints
    destination: Destination

    @property
    def work(self) -> Work:
        return Work(inputs=[self.a, self.b], template=self.a, folders=self.points.folders, facts=self.facts)

    def facts(self) -> Mapping[str, Any]:
        return self.points.facts(self.a, self.b) | {"a": self.a.resume_key(), "b": self.b.resume_key()}

    def run(self, workspace: Workspace | None) -> None:
        download_checkpoints(self.a, self.b)
        inputs, points = [self.a, self.b], self.points
        with open_writer(workspace, self.facts(), inputs=inputs, allow_nonfinite=points.allow_nonfinite) as writer:
            if writer:
                writer.write_tensors(PlainStream(self.a, self.b, points.t), folders=points.folders)
                for folder, t in points.placed():
                    writer.write_checkpoint_files(self.a, self.b if points.tokenizer == "b" else None, folder=folder)
                    place = standing_in(folder, self.destination)
                    card = merge_card(self.a, self.b, t, self.ids, place, tokenizer=points.tokenizer)
                    writer.write_text(within(folder, "README.md"), card)


@dataclass(frozen=True)
class _Merge(Job["Alignment | None"]):
    """Two models.

    Attributes:
        method: how B is matched to A; None: it is not, or was before.
        file: where a given symmetry is from, for the card.
    """

    pair: Pair
    points: MergePoints
    method: WeightMatching | None
    destination: Destination
    file: str

    @property
    def inputs(self) -> list[Checkpoint]:
        return [self.pair.a.checkpoint, self.pair.b.checkpoint]

    @property
    def work(self) -> Work:
        return Work(
            inputs=self.inputs,
            template=self.pair.a.checkpoint,
            folders=self.points.folders,
            models=[self.pair.a, self.pair.b],
            matched=self.method is not None,
            facts=self.facts,
        )

    @property
    def used(self) -> ModelSymmetry:
        """What B is taken by where nothing is matched."""
        return self.pair.symmetry or self.pair.b.identity()

    def facts(self) -> Mapping[str, Any]:
        from hf_moe_lmc.matching.alignment import matching_facts
        from hf_moe_lmc.symmetry.group import digest

        a, b = self.inputs
        if self.method:
            return self.points.facts(a, b) | matching_facts(self.pair.a, self.pair.b, self.method)
        return self.points.facts(a, b) | {"a": a.resume_key(), "b": b.resume_key(), "symmetry": digest(self.used)}

    def run(self, workspace: Workspace | None) -> Alignment | None:
        from hf_moe_lmc.verbs.inputs import download

        a, b = self.inputs
        download(self.pair.a, self.pair.b, given=self.pair.symmetry)
        with open_writer(workspace, self.facts(), inputs=[a, b], allow_nonfinite=self.points.allow_nonfinite) as writer:
            alignment = self._write_tensors(writer, workspace)
            if alignment and not self.pair.ids.alike:
                alignment = replace(alignment, vocabulary=self.pair.ids.account())
            for folder, t in self.points.placed() if writer else ():
                assert writer is not None
                self._write_files(writer, folder, t, alignment)
        return alignment

    def _write_files(self, writer: FolderWriter, folder: str, t: float, alignment: Alignment | None) -> None:
        """What a checkpoint has besides its weights."""
        a, b = self.inputs
        given, tokenizer = self.pair.symmetry, self.points.tokenizer
        writer.write_checkpoint_files(a, b if tokenizer == "b" else None, folder=folder)
        if used := alignment.symmetry if alignment else given:
            used.save(writer.path(within(folder, "alignment/symmetry.safetensors")))
        if alignment:
            writer.write_text(within(folder, "alignment/alignment.json"), alignment.to_json())
        card = merge_card(
            a,
            b,
            t,
            self.pair.ids,
            standing_in(folder, self.destination),
            tokenizer=tokenizer,
            alignment=alignment,
            symmetry=given,
            symmetry_name=self.file,
        )
        writer.write_text(within(folder, "README.md"), card)

    def _write_tensors(self, writer: FolderWriter | None, workspace: Workspace | None) -> Alignment | None:
        from hf_moe_lmc.matching.alignment import align_models
        from hf_moe_lmc.writing.pipeline import pending, written_meanwhile
        from hf_moe_lmc.writing.streams import interpolated

        a, b, points = self.pair.a, self.pair.b, self.points
        if self.method:
            elements = pending(b.layers)
            stream = interpolated(a, b, elements, points.t, rounded=True)
            with written_meanwhile(writer, stream, elements, folders=points.folders) as deliver:
                return align_models(
                    a, b, self.method, allow_nonfinite=points.allow_nonfinite, workspace=workspace, deliver=deliver
                )
        if writer:
            writer.write_tensors(interpolated(a, b, self.used.layers, points.t, rounded=True), folders=points.folders)
        return None
