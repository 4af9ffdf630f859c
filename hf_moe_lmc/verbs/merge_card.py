"""The model card of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.token_ids import TokenIds
from hf_moe_lmc.publishing.card import OUT, Destination, model_card
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.writing.formats import format_option
from hf_moe_lmc.writing.interpolation import exact

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.symmetry.group import ModelSymmetry


def merge_card(
    a: Checkpoint,
    b: Checkpoint,
    t: float,
    ids: TokenIds,
    destination: Destination,
    *,
    tokenizer: str = "a",
    form: str = "a",
    alignment: Alignment | None = None,
    symmetry: ModelSymmetry | None = None,
    symmetry_name: str = "SYMMETRY",
    measured: Measured | None = None,
    repair: tuple[str, Sequence[str]] | None = None,
    repaired: bool = False,
    widened: str | None = None,
) -> str:
    """The model card of a merge, with what B was aligned by: an alignment, a saved symmetry, or nothing.

    Args:
        tokenizer: the side whose tokenizer the output has.
        form: how it stores its weights: `a`, `b` or `bf16`.
        symmetry_name: the saved symmetry's file or folder, without the path to it.
        widened: how much the model has grown by the experts of both, as a sentence.
        measured: a barrier between A and B, on whose path the merge lies.
        repair: what was done to leave the straight line, and the words of the command line that ask for it.
        repaired: the repair was accepted.
    """
    how, options = "B as it is.", ["--no-align"]
    if alignment:
        how = "B with its experts and hidden units put where A has theirs. It computes the same function as B."
        options = ["--order", alignment.order, "--units", alignment.units]
    elif symmetry:
        how = "B in the coordinates of a saved symmetry. It computes the same function as B."
        options = ["--symmetry", symmetry_name]
    options += ["--tokenizer", "b"] if tokenizer == "b" else []
    options += format_option(form, "a")
    options += [*(repair[1] if repair else []), *(["--widen"] if widened else [])]
    kind = "Mixture-of-Experts models" if alignment or symmetry else "models"
    point = f"The point t = {exact(t)} of the straight line (1 - t) A + t B' between two {kind}."
    if widened:
        point = f"A merge of two {kind} at t = {exact(t)}, {widened}. All else is (1 - t) A + t B', and routers are "
        point += "multiplied to give logits as large as those of A and B'."
    elif repair and repaired:
        point = f"A repaired merge of two {kind} at t = {exact(t)}: its weights have left the straight line (1 - t) A + t B'."
    return model_card(
        title=f"Merge of {{A}} and {{B}} at t = {exact(t)}",
        summary=f"{point} B' is {how}",
        inputs={"A": a, "B": b},
        base="AB",
        relation="merge",
        command=["merge", "A", "B", "-o", OUT, "-t", exact(t), *options],
        template=a,
        destination=destination,
        alignment=alignment.sentences() if alignment else (),
        matched=alignment is not None,
        vocabulary=None if ids.alike else ids.account(),
        measured=measured,
        repair=f"{repair[0]}. `repair.json` has all that was tried." if repair else None,
    )
