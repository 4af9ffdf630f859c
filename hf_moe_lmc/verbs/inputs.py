"""Opening, recognising and comparing what the user gave."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint, bring
from hf_moe_lmc.checkpoints.pair import same_place
from hf_moe_lmc.checkpoints.vocabulary import check_tokenizers
from hf_moe_lmc.errors import Faults
from hf_moe_lmc.moe.model import MoEModel
from hf_moe_lmc.moe.pair import check_pair
from hf_moe_lmc.proof.recognition import recognise
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.runtime.processes import team
from hf_moe_lmc.symmetry.group import ModelSymmetry
from hf_moe_lmc.writing.workplace import check_output


def open_models(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    stack: ExitStack,
    *,
    output: str | os.PathLike[str] | None = None,
    symmetry: str | os.PathLike[str] | ModelSymmetry | None = None,
    each: Callable[[MoEModel], object] | None = None,
    ignore_extra_layers: bool = False,
    overwrite: bool = False,
) -> tuple[MoEModel, MoEModel]:
    """Opens, recognises and compares two checkpoints from headers alone, and looks at the output and at a saved symmetry.

    Args:
        each: a further check of either model.
        ignore_extra_layers: see `check_pair`.

    Raises:
        InputError: whatever is wrong with either, with the other two, or between A and B; all of it in one list.
    """
    faults = Faults()
    found: list[str] = []
    opened = [_opened(model, stack, faults) for model in (a, b)]
    checkpoints = [checkpoint for checkpoint in opened if checkpoint]
    if output is not None and team().is_main:
        with faults.gather():
            check_output(output, [checkpoint.folder for checkpoint in checkpoints], overwrite=overwrite)
    if symmetry is not None:
        _given(symmetry, faults)
    models = [_recognised(checkpoint, faults) for checkpoint in checkpoints]
    if len(checkpoints) == 2:
        with faults.gather():
            found += check_tokenizers(*checkpoints)
    recognised = [model for model in models if model]
    for model in recognised:
        with faults.gather():
            if each:
                each(model)
    if len(recognised) == 2:
        with faults.gather():
            found += check_pair(*recognised, ignore_extra_layers=ignore_extra_layers)
    faults.check()
    if same_place(*checkpoints):
        found.insert(0, f"A and B hold the same weights: both are {checkpoints[0].name}")
    for warning in found:
        warn(warning)
    model_a, model_b = recognised
    return model_a, model_b


def _opened(model: str | os.PathLike[str], stack: ExitStack, faults: Faults) -> Checkpoint | None:
    with faults.gather():
        return stack.enter_context(Checkpoint.open(model))
    return None


def _given(symmetry: str | os.PathLike[str] | ModelSymmetry, faults: Faults) -> ModelSymmetry | None:
    with faults.gather():
        return symmetry if isinstance(symmetry, ModelSymmetry) else ModelSymmetry.load(symmetry)
    return None


def _recognised(checkpoint: Checkpoint, faults: Faults) -> MoEModel | None:
    with faults.gather():
        return recognise(checkpoint)
    return None


def load_symmetry(symmetry: str | os.PathLike[str] | ModelSymmetry, model: MoEModel, *, inverse: bool = False) -> ModelSymmetry:
    """A saved or given symmetry (or its inverse), checked to act on `model`.

    Raises:
        SymmetryError: not a symmetry, of another family, or of other shapes.
    """
    value = symmetry if isinstance(symmetry, ModelSymmetry) else ModelSymmetry.load(symmetry)
    value = value.inverse() if inverse else value
    model.check_symmetry(value)
    return value


def download(*models: MoEModel, given: ModelSymmetry | None = None) -> None:
    """Brings the weights, once everything has been checked from headers.

    Warns where a `given` symmetry was recorded for other weights than those of the last model, which it acts on.
    """
    bring(*(model.checkpoint for model in models))
    model = models[-1]
    recorded = given.metadata.get("b_fingerprint") if given else None
    if recorded is not None and recorded != model.checkpoint.fingerprint():
        warn(f"{model.checkpoint.name}: the symmetry was recorded for another checkpoint (fingerprint {recorded[:12]})")
