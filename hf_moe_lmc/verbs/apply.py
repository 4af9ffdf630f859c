"""The verb `apply`: a checkpoint in the coordinates of a saved symmetry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.publishing.card import OUT, CardContent, Destination, model_card
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.verbs.inputs import Inputs, download
from hf_moe_lmc.verbs.job import Job, Request, verb
from hf_moe_lmc.verbs.options import OutputOptions, file_name, filled
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
from hf_moe_lmc.writing.output import open_writer
from hf_moe_lmc.writing.workspace import Workspace


@verb
def apply(
    symmetry: str | os.PathLike[str] | ModelSymmetry,
    b: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    inverse: bool = False,
    format: Literal["b", "bf16"] = "b",
    push_to_hub: str | None = None,
    private: bool | None = None,
    license: str | None = None,
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
        format: as for `align`: a quantized format carries the order of experts and signs.
        push_to_hub, private, license, resume, overwrite, allow_nonfinite: as for `align`.

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
    check_format(format, "b", "bf16")

    def prepare(inputs: Inputs) -> Job[Path]:
        model, given = inputs.single(b, symmetry, inverse=inverse)
        check_moves(model, format)
        destination = options.destination()
        file = file_name(symmetry)
        return _Application(Path(output), model, given, file, inverse, format, options.allow_nonfinite, destination)

    return Request(verb="apply", output=output, inputs=(b,), options=options, prepare=prepare)


plan_apply = apply.plan


@dataclass(frozen=True)
class _Application(Job[Path]):
    """A model and the symmetry that acts on it.

    Attributes:
        file: where the symmetry is from, for the card.
    """

    output: Path
    model: MoEModel
    symmetry: ModelSymmetry
    file: str
    inverse: bool
    format: OutputFormat
    allow_nonfinite: bool
    destination: Destination

    @property
    def work(self) -> Work:
        checkpoint = self.model.checkpoint
        template = model_moved(self.model, self.symmetry.layers, self.format).template
        return Work(inputs=[checkpoint], template=template, models=[self.model], facts=self.facts)

    def facts(self) -> Mapping[str, Any]:
        of_inputs = {"b": self.model.checkpoint.resume_key(), "symmetry": digest(self.symmetry)}
        return {"what": "apply", "allow_nonfinite": self.allow_nonfinite, **of_inputs, **format_facts(self.format, "b")}

    def run(self, workspace: Workspace | None) -> Path:
        checkpoint = self.model.checkpoint
        download(self.model, given=self.symmetry)
        with open_writer(workspace, self.facts(), inputs=[checkpoint], allow_nonfinite=self.allow_nonfinite) as writer:
            if writer:
                stream = model_moved(self.model, self.symmetry.layers, self.format)
                writer.write_tensors(stream)
                write_beside(writer, stream, more=left_in_place(self.model, self.symmetry, stream))
                self.symmetry.save(writer.path("alignment/symmetry.safetensors"))
                writer.write_text("README.md", self._card())
        return self.output

    def _card(self) -> str:
        """The model card of a checkpoint in other coordinates."""
        found = self.symmetry.metadata
        origin = f" It was found by matching {found['b_source']} to {found['a_source']}." if "b_source" in found else ""
        return model_card(
            CardContent(
                title="{B} in the coordinates of a saved symmetry",
                summary="The same function as B. Its experts and hidden units were moved by "
                f"{'the inverse of ' if self.inverse else ''}a saved symmetry (`alignment/symmetry.safetensors`).{origin}",
                inputs={"B": self.model.checkpoint},
                base="B",
                relation="finetune",
                command=["apply", self.file, "B", "-o", OUT, *self._options()],
                template=self.model.checkpoint,
                destination=self.destination,
            )
        )

    def _options(self) -> list[str]:
        return [*(["--inverse"] if self.inverse else []), *format_option(self.format, "b")]
