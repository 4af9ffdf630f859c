"""The verb `apply`: a checkpoint in the coordinates of a saved symmetry."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hf_moe_lmc.errors import Faults
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.publishing.card import model_card
from hf_moe_lmc.runtime.processes import team, together
from hf_moe_lmc.symmetry.group import ModelSymmetry, digest
from hf_moe_lmc.verbs.inputs import _given, _opened, _recognised, download, load_symmetry
from hf_moe_lmc.writing.output import begin, writing
from hf_moe_lmc.writing.streams import rewritten
from hf_moe_lmc.writing.workplace import check_output


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
