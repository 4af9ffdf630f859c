"""The verb `merge`: one point of the interpolation path, written as a checkpoint.

Without alignment nothing has to be known of the model: two checkpoints that hold the same tensors are interpolated as they
are, and transformers is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, bring
from hf_moe_lmc.errors import InputError, refuse_idle
from hf_moe_lmc.matching.options import OrderMethod, UnitMethod, WeightMatching
from hf_moe_lmc.publishing.card import model_card
from hf_moe_lmc.verbs.inputs import Inputs
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.options import OutputOptions, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.writing.interpolation import check_t
from hf_moe_lmc.writing.output import FolderWriter, writing
from hf_moe_lmc.writing.spans import PlainStream
from hf_moe_lmc.writing.workplace import Workplace

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.moe.model import MoEModel
    from hf_moe_lmc.symmetry.group import ModelSymmetry


@verb
def merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    t: float = 0.5,
    *,
    align: bool = True,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    order: OrderMethod | None = None,
    units: UnitMethod | None = None,
    exact: bool | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
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
        order, units, exact, push_to_hub, private, resume, overwrite, allow_nonfinite: as for `align`.

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

    def prepare(inputs: Inputs) -> Job[Alignment | None]:
        pair = None if align else inputs.plain_pair(a, b)
        if pair:
            return _PlainMerge(*pair, t, options.allow_nonfinite)
        from hf_moe_lmc.writing.streams import refuse_quantized

        model_a, model_b, found = inputs.pair(a, b, symmetry=symmetry, each=refuse_quantized)
        return _Merge(model_a, model_b, t, method if align and found is None else None, found, options.allow_nonfinite)

    return Request(verb="merge", output=output, inputs=(a, b), options=options, prepare=prepare)


plan_merge = merge.plan


@dataclass(frozen=True)
class _PlainMerge(Job["Alignment | None"]):
    """Two checkpoints with the same tensors, as they are."""

    a: Checkpoint
    b: Checkpoint
    t: float
    allow_nonfinite: bool

    @property
    def work(self) -> Work:
        return Work(inputs=[self.a, self.b], template=self.a, facts=self.facts)

    def facts(self) -> Mapping[str, Any]:
        of_inputs = {"a": self.a.fingerprint(), "b": self.b.fingerprint()}
        return {"what": "merge", "t": self.t, "allow_nonfinite": self.allow_nonfinite, **of_inputs}

    def run(self, workplace: Workplace | None) -> None:
        bring(self.a, self.b)
        with writing(workplace, self.facts(), inputs=[self.a, self.b], allow_nonfinite=self.allow_nonfinite) as writer:
            if writer:
                writer.write_tensors(PlainStream(self.a, self.b, self.t))
                writer.write_checkpoint_files(self.a)
                writer.write_text("README.md", merge_card(self.a, self.b, self.t))


@dataclass(frozen=True)
class _Merge(Job["Alignment | None"]):
    """Two models.

    Attributes:
        method: how B is matched to A; None: it is not.
        symmetry: what B was aligned with before; None: nothing, or it is still to be found.
    """

    a: MoEModel
    b: MoEModel
    t: float
    method: WeightMatching | None
    symmetry: ModelSymmetry | None
    allow_nonfinite: bool

    @property
    def inputs(self) -> list[Checkpoint]:
        return [self.a.checkpoint, self.b.checkpoint]

    @property
    def work(self) -> Work:
        return Work(
            inputs=self.inputs,
            template=self.a.checkpoint,
            models=[self.a, self.b],
            matched=self.method is not None,
            facts=self.facts,
        )

    def facts(self) -> Mapping[str, Any]:
        from hf_moe_lmc.matching.alignment import matching_facts
        from hf_moe_lmc.symmetry.group import digest

        options = {"what": "merge", "t": self.t, "allow_nonfinite": self.allow_nonfinite}
        if self.method:
            return options | matching_facts(self.a, self.b, self.method)
        of_inputs = {side: checkpoint.fingerprint() for side, checkpoint in zip("ab", self.inputs, strict=True)}
        return options | of_inputs | {"symmetry": digest(self.symmetry or self.b.identity())}

    def run(self, workplace: Workplace | None) -> Alignment | None:
        from hf_moe_lmc.verbs.inputs import download

        download(self.a, self.b, given=self.symmetry)
        with writing(workplace, self.facts(), inputs=self.inputs, allow_nonfinite=self.allow_nonfinite) as writer:
            alignment = self._write_tensors(writer, workplace)
            used = alignment.symmetry if alignment else self.symmetry
            if writer:
                writer.write_checkpoint_files(self.a.checkpoint)
                if used:
                    used.save(writer.path("alignment/symmetry.safetensors"))
                if alignment:
                    writer.write_text("alignment/alignment.json", alignment.to_json())
                card = merge_card(self.a.checkpoint, self.b.checkpoint, self.t, alignment=alignment, symmetry=self.symmetry)
                writer.write_text("README.md", card)
        return alignment

    def _write_tensors(self, writer: FolderWriter | None, workplace: Workplace | None) -> Alignment | None:
        from hf_moe_lmc.matching.alignment import align_models
        from hf_moe_lmc.writing.pipeline import pending, written_meanwhile
        from hf_moe_lmc.writing.streams import interpolated

        if self.method:
            elements = pending(self.b.layers)
            stream = interpolated(self.a, self.b, elements, self.t, rounded=True)
            with written_meanwhile(writer, stream, elements) as deliver:
                return align_models(
                    self.a, self.b, self.method, allow_nonfinite=self.allow_nonfinite, workplace=workplace, deliver=deliver
                )
        if writer:
            used = self.symmetry or self.b.identity()
            writer.write_tensors(interpolated(self.a, self.b, used.layers, self.t, rounded=True))
        return None


def merge_card(
    a: Checkpoint,
    b: Checkpoint,
    t: float,
    *,
    alignment: Alignment | None = None,
    symmetry: ModelSymmetry | None = None,
) -> str:
    """The model card of a merge, with what B was aligned by: an alignment, a saved symmetry, or nothing."""
    how, options = "not aligned", " --no-align"
    if alignment:
        how, options = "aligned to A by weight matching", f" --order {alignment.order} --units {alignment.units}"
    elif symmetry:
        how, options = "aligned to A by a saved symmetry", " --symmetry SYMMETRY"
    return model_card(
        title=f"A merge of {a.display_name} and {b.display_name}",
        summary=f"The point t = {t:g} of the straight line (1 - t) A + t B' between two "
        f"{'Mixture-of-Experts ' if alignment or symmetry else ''}models, where B' is B, {how}.",
        inputs={"A": a, "B": b},
        base=[a, b],
        relation="merge",
        command=f"hf-moe-lmc merge A B -o OUT -t {t:g}{options}",
        alignment=alignment.totals() if alignment else None,
    )
