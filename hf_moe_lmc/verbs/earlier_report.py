"""The report of an earlier `barrier`, whose figures and plot go into the card of a merge."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_moe_lmc.checkpoints.checkpoint import Checkpoint
from hf_moe_lmc.checkpoints.untrusted import read_json_object
from hf_moe_lmc.errors import InputError, shown
from hf_moe_lmc.publishing.finished import REPORT
from hf_moe_lmc.publishing.measured import Measured
from hf_moe_lmc.runtime.notices import warn
from hf_moe_lmc.verbs.merge_points import within
from hf_moe_lmc.writing.output import FolderWriter

if TYPE_CHECKING:
    from hf_moe_lmc.symmetry.group import ModelSymmetry

PICTURE = "barrier.png"
SYMMETRY = "symmetry.safetensors"
NEEDED: dict[tuple[str, ...], type | tuple[type, ...]] = {  # what a card takes from report.json
    ("a", "fingerprint"): str,
    ("a", "source"): str,
    ("b", "fingerprint"): str,
    ("b", "source"): str,
    ("disagreement",): (str, type(None)),
    ("evaluation", "context"): int,
    ("evaluation", "dtype"): str,
    ("evaluation", "text", "kind"): str,
    ("evaluation", "tokens_scored"): int,
    ("paths", "aligned", "barrier_t"): (int, float),
    ("paths", "aligned", "nll"): list,
    ("paths", "aligned", "perplexity"): list,
    ("paths", "aligned", "t"): list,
    ("statistics", "level"): (int, float),
    ("verdict", "sentences"): list,
}


@dataclass(frozen=True)
class EarlierReport:
    """What `barrier` wrote.

    Attributes:
        folder: as the user named it.
        content: of report.json.
    """

    folder: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> EarlierReport:
        """Raises InputError where a folder does not hold what `barrier` writes."""
        root = Path(folder).expanduser()
        for file in (REPORT, PICTURE, SYMMETRY):
            if not (root / file).is_file():
                raise InputError(f"{folder}: holds no {file}; name a folder that barrier wrote")
        content = read_json_object(root / REPORT, f"{folder}/{REPORT}")
        for keys, kind in NEEDED.items():
            value: Any = content
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{folder}/{REPORT}: {'.'.join(keys)} is missing; measure again with this release")
        return cls(root, content)

    def check_early(self, a: Checkpoint, b: Checkpoint) -> None:
        """As `check`, as soon as that is possible: before anything is fetched, only where both are here."""
        if a.is_downloaded and b.is_downloaded:
            self.check(a, b)

    def check(self, a: Checkpoint, b: Checkpoint) -> None:
        """Raises InputError unless the report is of these two; they have been downloaded.

        Two checkpoints are one where their fingerprints are equal, whatever they are called.
        """
        measured = [self.content[side] for side in "ab"]
        found = [one.fingerprint() for one in (a, b)]
        if [one["fingerprint"] for one in measured] == found:
            return
        swapped = [one["fingerprint"] for one in reversed(measured)] == found
        said = " and ".join(f"{shown(one['source'])} ({shown(one['fingerprint'])[:12]})" for one in measured)
        here = " and ".join(f"{one.name} ({digest[:12]})" for one, digest in zip((a, b), found, strict=True))
        raise InputError(
            f"{self.folder}: its report is of A and B = {said}, and this merge is of {here} (fingerprints in brackets); "
            + ("exchange A and B, or measure again" if swapped else "measure these two with barrier, or name another report")
        )

    def facts(self) -> dict[str, str]:
        """Tells the picture and the report from others."""
        files = [(self.folder / file).read_bytes() for file in (REPORT, PICTURE)]
        return {"report": hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in files)).hexdigest()}

    def put(self, writer: FolderWriter, folder: str, t: float, symmetry: ModelSymmetry | None) -> Measured:
        """Copies the picture into a folder of the output, and gives what the card says.

        Args:
            symmetry: that B was taken by; None: it is as it is.
        """
        writer.copy(self.folder / PICTURE, within(folder, PICTURE))
        return Measured(
            report=self.content,
            verdict=[shown(sentence, 1000) for sentence in self.content["verdict"]["sentences"]],
            t=t if self.is_on_path(symmetry) else None,
            path="naive" if symmetry is None else "aligned",
            plot=PICTURE,
        )

    def is_on_path(self, symmetry: ModelSymmetry | None) -> bool:
        """Whether a merge by this symmetry is a point of a path that was measured."""
        if symmetry is None:
            return "naive" in self.content["paths"]
        from hf_moe_lmc.symmetry.group import ModelSymmetry, digest

        return digest(ModelSymmetry.load(self.folder / SYMMETRY)) == digest(symmetry)

    def warn_of_another_path(self, symmetry: ModelSymmetry | None) -> None:
        """Warns where the card cannot say the losses of the merge itself."""
        if not self.is_on_path(symmetry):
            warn(
                f"{self.folder}: B was aligned in another way there, so that the merge is no point of the path that was "
                "measured; the card shows the report without a loss of the merge"
            )
