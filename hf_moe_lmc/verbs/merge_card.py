"""The model card of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.token_ids import TokenIds
from hf_moe_lmc.publishing.card import OUT, CardContent, Destination, model_card
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.verbs.merge_points import MergePoints
from hf_moe_lmc.writing.formats import format_option
from hf_moe_lmc.writing.interpolation import exact

if TYPE_CHECKING:
    from hf_moe_lmc.matching.alignment import Alignment
    from hf_moe_lmc.symmetry.group import ModelSymmetry
    from hf_moe_lmc.verbs.repairing import Repaired


SYMMETRY = "SYMMETRY"  # in a command: a symmetry that no file holds


@dataclass(frozen=True, kw_only=True)
class WrittenMerge:
    """A merge that was written, as its card tells of it: B was aligned by an alignment, a saved symmetry, or nothing.

    Attributes:
        ids: rows of the embeddings.
        points: in which form it was written, and whose tokenizer it has.
        symmetry_name: the saved symmetry's file or folder, without the path to it.
        measured: a barrier between A and B, on whose path the merge lies.
        repaired: what was done to leave the straight line; None: nothing was asked for.
        widened: how much the model has grown by the experts of both, as a sentence; None: it has not.
    """

    a: Checkpoint
    b: Checkpoint
    t: float
    ids: TokenIds
    points: MergePoints
    destination: Destination
    alignment: Alignment | None = None
    symmetry: ModelSymmetry | None = None
    symmetry_name: str = SYMMETRY
    measured: Measured | None = None
    repaired: Repaired | None = None
    widened: str | None = None

    @property
    def summary(self) -> str:
        """What it is, in sentences."""
        kind, t = ("Mixture-of-Experts models" if self.alignment or self.symmetry else "models"), exact(self.t)
        point = f"The point t = {t} of the straight line (1 - t) A + t B' between two {kind}."
        if self.widened:
            point = f"A merge of two {kind} at t = {t}, {self.widened}. All else is (1 - t) A + t B', and routers are "
            point += "multiplied to give logits as large as those of A and B'."
        elif self.repaired and self.repaired.accepted:
            point = f"A repaired merge of two {kind} at t = {t}: its weights have left the straight line (1 - t) A + t B'."
        how = "B as it is."
        if self.alignment:
            how = "B with its experts and hidden units put where A has theirs. It computes the same function as B."
        elif self.symmetry:
            how = "B in the coordinates of a saved symmetry. It computes the same function as B."
        return f"{point} B' is {how}"

    @property
    def command(self) -> list[str]:
        """The words behind `hf-moe-lmc` that made it."""
        options = ["--no-align"]
        if self.alignment:
            options = ["--order", self.alignment.order, "--units", self.alignment.units]
        elif self.symmetry:
            options = ["--symmetry", self.symmetry_name]
        options += ["--tokenizer", "b"] if self.points.tokenizer == "b" else []
        options += format_option(self.points.format, "a")
        options += [*(self.repaired.options if self.repaired else []), *(["--widen"] if self.widened else [])]
        return ["merge", "A", "B", "-o", OUT, "-t", exact(self.t), *options]


def merge_card(merge: WrittenMerge) -> str:
    """The model card of a merge."""
    alignment, repaired = merge.alignment, merge.repaired
    return model_card(
        CardContent(
            title=f"Merge of {{A}} and {{B}} at t = {exact(merge.t)}",
            summary=merge.summary,
            inputs={"A": merge.a, "B": merge.b},
            base="AB",
            relation="merge",
            command=merge.command,
            template=merge.a,
            destination=merge.destination,
            alignment=alignment.sentences() if alignment else (),
            matched=alignment is not None,
            vocabulary=None if merge.ids.alike else merge.ids.account(),
            measured=merge.measured,
            repair=f"{repaired.sentence}. `repair.json` has all that was tried." if repaired else None,
        )
    )
