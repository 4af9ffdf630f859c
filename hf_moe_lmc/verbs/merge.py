"""The verb `merge`: one point of the interpolation path, written as a checkpoint.

Without alignment nothing has to be known of the model: two checkpoints that hold the same tensors are interpolated as they
are, and transformers is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future
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
from hf_moe_lmc.verbs.options import OutputOptions, file_name, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.writing.formats import OutputFormat, check_format, model_merge, plain_merge, write_rounding
from hf_moe_lmc.writing.interpolation import check_t
from hf_moe_lmc.writing.output import FolderWriter, TensorStream, open_writer
from hf_moe_lmc.writing.workspace import Workspace

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.moe.action import Elements
    from hf_moe_lmc.symmetry.group import LayerSymmetry, ModelSymmetry


@verb
def merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    t: float = 0.5,
    *,
    align: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    tokenizer: Literal["a", "b"] = "a",
    format: OutputFormat = "a",
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

    `merge.plan` takes the same arguments and returns the Plan: a dry run.

    Args:
        a, b: local folders or Hub ids (OWNER/NAME[@REVISION]).
        output: a new or empty folder.
        t: 0 is A, 1 is B.
        align: match B to A first; otherwise B is taken as it is. Two checkpoints with the same tensors are then
            interpolated without a look at what they are, so dense ones, too.
        symmetry: a saved or given symmetry instead of matching.
        tokenizer: whose tokenizer, chat template, generation configuration and special ids the output has, together.
        format: how the output stores its weights: as A does, as B does, or with what A has quantized in bfloat16.
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
    check_t(t)
    if symmetry is not None and not align:
        raise InputError("a symmetry was given and alignment was turned off; choose one")
    if symmetry is not None or not align:
        refuse_idle({"order": order, "units": units, "exact": exact or None}, "nothing is matched")
    if tokenizer not in ("a", "b"):
        raise InputError(f"tokenizer {tokenizer!r}: expected a or b")
    check_format(format)
    point = _Point(t, tokenizer, format, options.allow_nonfinite)
    destination = options.destination(output)

    def prepare(inputs: Inputs) -> Job[Alignment | None]:
        plain = None if align else inputs.plain_pair(a, b)
        if plain:
            return _PlainMerge(*plain, point, destination)
        pair = inputs.pair(a, b, symmetry=symmetry)
        matched = method if align and pair.symmetry is None else None
        return _Merge(pair, point, matched, destination, file_name(symmetry))

    return Request(verb="merge", output=output, inputs=(a, b), options=options, prepare=prepare)


plan_merge = merge.plan


@dataclass(frozen=True)
class _Point:
    """Which point is written, and how.

    Attributes:
        tokenizer: the side whose tokenizer the output has.
        format: how it stores its weights.
    """

    t: float
    tokenizer: str
    format: OutputFormat
    allow_nonfinite: bool

    def facts(self, a: Checkpoint, b: Checkpoint) -> dict[str, Any]:
        """What the shards depend on besides the two checkpoints."""
        layouts = {f"layout_{side}": one.layout_digest() for side, one in (("a", a), ("b", b)) if one.layout_digest()}
        form = {} if self.format == "a" else {"format": self.format}
        return {"what": "merge", "t": self.t, "allow_nonfinite": self.allow_nonfinite, **form, **layouts}


@dataclass(frozen=True)
class _PlainMerge(Job["Alignment | None"]):
    """Two checkpoints with the same tensors, as they are."""

    a: Checkpoint
    b: Checkpoint
    ids: TokenIds
    point: _Point
    destination: Destination

    @property
    def work(self) -> Work:
        return Work(inputs=[self.a, self.b], template=self.stream.template, facts=self.facts)

    @property
    def stream(self) -> TensorStream:
        return plain_merge(self.a, self.b, self.point.t, self.point.format)

    def facts(self) -> Mapping[str, Any]:
        return self.point.facts(self.a, self.b) | {"a": self.a.resume_key(), "b": self.b.resume_key()}

    def run(self, workspace: Workspace | None) -> None:
        download_checkpoints(self.a, self.b)
        inputs = [self.a, self.b]
        with open_writer(workspace, self.facts(), inputs=inputs, allow_nonfinite=self.point.allow_nonfinite) as writer:
            if writer:
                stream = self.stream
                writer.write_tensors(stream)
                writer.write_checkpoint_files(stream.template, self.b if self.point.tokenizer == "b" else None)
                write_rounding(writer, stream)
                writer.write_text(
                    "README.md",
                    merge_card(
                        *(self.a, self.b, self.point.t, self.ids, self.destination),
                        tokenizer=self.point.tokenizer,
                        form=self.point.format,
                    ),
                )


@dataclass(frozen=True)
class _Merge(Job["Alignment | None"]):
    """Two models.

    Attributes:
        method: how B is matched to A; None: it is not, or was before.
        file: where a given symmetry is from, for the card.
    """

    pair: Pair
    point: _Point
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
            template=self.stream(self.used.layers).template,
            models=[self.pair.a, self.pair.b],
            matched=self.method is not None,
            facts=self.facts,
        )

    def stream(self, elements: Elements) -> TensorStream:
        return model_merge(self.pair.a, self.pair.b, elements, self.point.t, self.point.format)

    @property
    def used(self) -> ModelSymmetry:
        """What B is taken by where nothing is matched."""
        return self.pair.symmetry or self.pair.b.identity()

    def facts(self) -> Mapping[str, Any]:
        from hf_moe_lmc.matching.alignment import matching_facts
        from hf_moe_lmc.symmetry.group import digest

        a, b = self.inputs
        if self.method:
            return self.point.facts(a, b) | matching_facts(self.pair.a, self.pair.b, self.method)
        return self.point.facts(a, b) | {"a": a.resume_key(), "b": b.resume_key(), "symmetry": digest(self.used)}

    def run(self, workspace: Workspace | None) -> Alignment | None:
        from hf_moe_lmc.verbs.inputs import download
        from hf_moe_lmc.writing.pipeline import pending

        a, b = self.inputs
        download(self.pair.a, self.pair.b, given=self.pair.symmetry)
        with open_writer(workspace, self.facts(), inputs=[a, b], allow_nonfinite=self.point.allow_nonfinite) as writer:
            awaited = pending(self.pair.b.layers) if self.method else {}
            stream = self.stream(awaited or self.used.layers)
            alignment = self._write_tensors(writer, workspace, stream, awaited)
            if alignment and not self.pair.ids.alike:
                alignment = replace(alignment, vocabulary=self.pair.ids.account())
            used = alignment.symmetry if alignment else self.pair.symmetry
            if writer:
                writer.write_checkpoint_files(stream.template, b if self.point.tokenizer == "b" else None)
                write_rounding(writer, stream)
                if used:
                    used.save(writer.path("alignment/symmetry.safetensors"))
                if alignment:
                    writer.write_text("alignment/alignment.json", alignment.to_json())
                card = merge_card(
                    a,
                    b,
                    self.point.t,
                    self.pair.ids,
                    self.destination,
                    tokenizer=self.point.tokenizer,
                    form=self.point.format,
                    alignment=alignment,
                    symmetry=self.pair.symmetry,
                    symmetry_name=self.file,
                )
                writer.write_text("README.md", card)
        return alignment

    def _write_tensors(
        self,
        writer: FolderWriter | None,
        workspace: Workspace | None,
        stream: TensorStream,
        awaited: Mapping[int, Future[LayerSymmetry]],
    ) -> Alignment | None:
        from hf_moe_lmc.matching.alignment import align_models
        from hf_moe_lmc.writing.pipeline import written_meanwhile

        a, b = self.pair.a, self.pair.b
        if self.method:
            with written_meanwhile(writer, stream, awaited) as deliver:
                return align_models(
                    a, b, self.method, allow_nonfinite=self.point.allow_nonfinite, workspace=workspace, deliver=deliver
                )
        if writer:
            writer.write_tensors(stream)
        return None
