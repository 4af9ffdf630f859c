"""The verb `apply`: a checkpoint in the coordinates of a saved symmetry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.publishing.card import model_card
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.verbs.inputs import Inputs, download
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.options import OutputOptions, filled
from hf_moe_lmc.verbs.planning import Work
from hf_moe_lmc.writing.output import open_writer
from hf_moe_lmc.writing.streams import rewritten
from hf_moe_lmc.writing.workspace import Workspace


@verb
def apply(
    symmetry: str | os.PathLike[str] | ModelSymmetry,
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inverse: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    resume: bool | None = None,
    overwrite: bool | None = None,
    allow_nonfinite: bool | None = None,
) -> Request[Path]:
    """Writes checkpoint `b` in the coordinates of a saved symmetry, or with `inverse` undoes it.

    Without scales this is lossless in every dtype, and the inverse restores the bytes. `apply.plan` takes the same arguments
    and returns the Plan: a dry run.

    Args:
        symmetry: a file, a folder that holds one, or the value.
        b: a local folder or Hub id (OWNER/NAME[@REVISION]).
        output: a new or empty folder.
        inverse: undo it.
        push_to_hub, private, resume, overwrite, allow_nonfinite: as for `align`.

    Returns:
        The output.

    Raises:
        SymmetryError: the symmetry is of another family or of other shapes.
        InputError: whatever else does not fit, before anything is written.
        WriteError: the system refuses to write.

    Example:
        >>> lmc.apply("aligned", "model-b", "again")  # doctest: +SKIP
        PosixPath('again')
    """
    options = filled(OutputOptions, locals())

    def prepare(inputs: Inputs) -> Job[Path]:
        model, given = inputs.single(b, symmetry, inverse=inverse)
        return _Application(Path(output), model, given, inverse, options.allow_nonfinite)

    return Request(verb="apply", output=output, inputs=(b,), options=options, prepare=prepare)


plan_apply = apply.plan


@dataclass(frozen=True)
class _Application(Job[Path]):
    output: Path
    model: MoEModel
    symmetry: ModelSymmetry
    inverse: bool
    allow_nonfinite: bool

    @property
    def work(self) -> Work:
        checkpoint = self.model.checkpoint
        return Work(inputs=[checkpoint], template=checkpoint, models=[self.model], facts=self.facts)

    def facts(self) -> Mapping[str, Any]:
        of_inputs = {"b": self.model.checkpoint.resume_key(), "symmetry": digest(self.symmetry)}
        return {"what": "apply", "allow_nonfinite": self.allow_nonfinite, **of_inputs}

    def run(self, workspace: Workspace | None) -> Path:
        checkpoint = self.model.checkpoint
        download(self.model, given=self.symmetry)
        with open_writer(workspace, self.facts(), inputs=[checkpoint], allow_nonfinite=self.allow_nonfinite) as writer:
            if writer:
                writer.write_tensors(rewritten(self.model, self.symmetry.layers))
                writer.write_checkpoint_files(checkpoint)
                self.symmetry.save(writer.path("alignment/symmetry.safetensors"))
                writer.write_text("README.md", apply_card(self.model, inverse=self.inverse))
        return self.output


def apply_card(model: MoEModel, *, inverse: bool) -> str:
    """The model card of a checkpoint in other coordinates."""
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
