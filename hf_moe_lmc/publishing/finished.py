"""What can be published: a folder that holds a whole checkpoint, report or symmetry."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from hf_moe_lmc.checkpoints.contents import INDEX, SINGLE
from hf_moe_lmc.checkpoints.source import Folder, looks_local
from hf_moe_lmc.checkpoints.untrusted import read_json_object
from hf_moe_lmc.errors import InputError, listing, shown
from hf_moe_lmc.publishing.weights import CONFIG, EXPLICIT, NUMBERED, is_weights

CARD = "README.md"
REPORT = "report.json"
REPORT_TEXT = "report.md"
SYMMETRIES = ("symmetry.safetensors", "alignment/symmetry.safetensors")
Kind = Literal["checkpoint", "report", "symmetry"]
_HEADING = re.compile(r"^# +(.*\S)", re.MULTILINE)


@dataclass(frozen=True)
class Finished:
    """A folder to publish.

    Attributes:
        files: relative to `root`; hidden ones are left out.
    """

    root: Path
    kind: Kind
    files: tuple[str, ...]

    def path(self, file: str) -> Path:
        return self.root / file

    def title(self) -> str:
        """What it is, for a commit message."""
        if self.kind == "report":
            report = read_json_object(self.path(REPORT), str(self.path(REPORT)), constants=True)
            a, b = (_short(str(report.get(side, {}).get("source", side.upper()))) for side in "ab")
            return f"Perplexity barrier between {a} and {b}"
        if self.kind == "symmetry":
            from hf_moe_lmc.symmetry.group import ModelSymmetry  # needs torch

            file = next(file for file in SYMMETRIES if file in self.files)
            found = ModelSymmetry.load(self.path(file)).metadata
            return f"Symmetry that aligns {found['b_source']} to {found['a_source']}" if "b_source" in found else "Symmetry"
        heading = _HEADING.search(self.path(CARD).read_text(encoding="utf-8", errors="replace"))
        return shown(heading[1]) if heading else f"Checkpoint {self.root.resolve().name}"


def finished(folder: str | os.PathLike[str]) -> Finished:
    """Looks at a folder that is to be published.

    Raises:
        InputError: it is none, or unfinished; naming what is missing or too much.
    """
    root = Path(folder)
    progress = _progress(root)
    if not root.is_dir():
        state = f" yet: {progress} holds what a stopped call had done, and the same call continues" if progress else ""
        raise InputError(f"{root}: no such folder to publish{state}")
    if progress:
        raise InputError(
            f"{root}: unfinished: {progress} holds an output that is still being written, or whose call was stopped; "
            "finish that call, or remove that folder, before publishing"
        )
    found = Folder(root).files()
    if any(file.startswith(".partial/") for file in found):
        raise InputError(f"{root}: unfinished (it holds .partial); make it anew before publishing")
    files = [file for file in found if not file.startswith(".")]
    kind = _kind(root, files)
    if kind == "checkpoint":
        _check_checkpoint(root, files)
    return Finished(root, kind, tuple(files))


def _short(source: str) -> str:
    """A model as a report names it, without the path to a local folder."""
    return shown(Path(source).name if looks_local(source) else source)


def _progress(root: Path) -> Path | None:
    """Where an output of this name is unfinished; None: nowhere. Of one that is there, no file is left in its workspace."""
    whole = root.resolve()
    for folder in (whole.parent / f".{whole.name}.progress", whole / ".progress"):
        begun = list(folder.glob("output-*"))
        if begun and (not root.is_dir() or any(path.is_file() for one in begun for path in one.rglob("*"))):
            return folder
    return None


def _kind(root: Path, files: list[str]) -> Kind:
    kind = _kind_of(files)
    if kind is None:
        raise InputError(
            f"{root}: nothing to publish: expected a checkpoint ({CONFIG} and weights), a report ({REPORT}) or a symmetry "
            f"({SYMMETRIES[0]}), found none of them{_inner(root, files)}"
        )
    return kind


def _kind_of(files: Collection[str]) -> Kind | None:
    """What a folder of these files holds; None: nothing to publish."""
    if CONFIG in files or any(map(is_weights, files)):
        return "checkpoint"
    if REPORT in files:
        return "report"
    return "symmetry" if any(file in files for file in SYMMETRIES) else None


def _inner(root: Path, files: Sequence[str]) -> str:
    """The folders within that can be published, such as the points of one merge, each with its command; empty without any."""
    folders = sorted({str(parent) for file in files for parent in PurePosixPath(file).parents[:-1]})
    found: list[str] = []
    for folder in folders:
        if any(folder.startswith(f"{outer}/") for outer in found):
            continue  # a part of an output
        if not _kind_of([file.removeprefix(f"{folder}/") for file in files if file.startswith(f"{folder}/")]):
            continue
        try:
            finished(root / folder)
        except InputError:  # it cannot be published as it is
            continue
        found.append(folder)
    if not found:
        return ""
    calls = [f"hf-moe-lmc push {shlex.quote(str(root / folder))} OWNER/NAME" for folder in found]
    return f" in the folder itself. Publish what it holds, each in a repository of its own:\n{listing(calls)}"


def _check_checkpoint(root: Path, files: list[str]) -> None:
    for needed, what in ((CARD, "the card"), (CONFIG, "the configuration")):
        if needed not in files:
            raise InputError(f"{root}: {needed} ({what}) is missing; publish a folder that align or merge finished")
    shards = {file for file in files if NUMBERED.fullmatch(file)}
    if INDEX in files:
        weight_map = read_json_object(root / INDEX, f"{root}/{INDEX}").get("weight_map")
        listed = {str(file) for file in weight_map.values()} if isinstance(weight_map, dict) else set()
        if missing := sorted(listed - set(files)):
            raise InputError(f"{root}: missing {', '.join(missing)}, which {INDEX} names; make it anew before publishing")
        if SINGLE in files and SINGLE not in listed:
            raise InputError(
                f"{root}: holds {SINGLE} beside {INDEX} and its shards: transformers takes the single file; "
                "remove the one that is old"
            )
    elif shards and SINGLE not in files:
        raise InputError(f"{root}: {len(shards)} shards but no {INDEX} that lists them; make it anew before publishing")
    elif SINGLE not in files:
        raise InputError(f"{root}: no weights (expected {SINGLE} or {INDEX}); publish a folder that align or merge finished")
    else:
        listed = {SINGLE}
    if strays := sorted(shards - listed):
        raise InputError(f"{root}: holds {', '.join(strays)}, which belong to other weights; remove them before publishing")
    explicit = read_json_object(root / CONFIG, f"{root}/{CONFIG}", constants=True).get(EXPLICIT)
    if explicit not in (None, INDEX if INDEX in files else SINGLE):
        raise InputError(
            f"{root}: {CONFIG} has transformers take its weights from {explicit} ({EXPLICIT}); remove that key first"
        )
    from hf_moe_lmc.checkpoints.checkpoint import Checkpoint  # needs torch, which most refusals come before

    with Checkpoint.open(root):  # every header is whole
        pass
