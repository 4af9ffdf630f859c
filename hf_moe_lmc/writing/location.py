"""Where an output may be written, and the folder in which it grows.

    .OUT.progress/  beside OUT
    OUT/.progress/  where nothing can be made beside OUT: a mount point, a parent without permission

What these folders hold:

    lock              held while a call works on OUT; a process that ends, however it does, lets go of it
    KIND-KEY/         results that belong to equal inputs and options: KEY is the hash of these
    output-KEY/       the output itself, file by file; at the end it becomes OUT by one rename
    replaced/         what stood at OUT before, while --overwrite puts the new output in its place
    publication.json  what is about to become OUT, so that a publication that was stopped can be undone
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from hf_moe_lmc.errors import OutputError
from hf_moe_lmc.writing.interpolation import exact

INSIDE = ".progress"
LOCK = "lock"
OUTPUT = "output"  # the kind of result that becomes the output
REPLACED = "replaced"
PLAN = "publication.json"  # names the files of an output from the moment that they begin to go to OUT
POINT = re.compile(r"t(0|1|0\.\d+|\d(\.\d+)?e-\d+)")  # the folder of one of several points
DEMO = "demo.json"  # the record of a demo
MARKERS = ("config.json", "report.json", "symmetry.safetensors", DEMO)  # one of them is in whatever this package writes


def working_folder(root: Path) -> Path:
    """The folder in which the output `root` grows: beside it, or inside where a rename could not put it in place."""
    beside, inside = root.parent / f".{root.name}.progress", root / INSIDE
    if inside.is_dir():  # a call that was stopped had to choose it
        return inside
    if root.exists() and (os.path.ismount(root) or not os.access(root.parent, os.W_OK)):
        return inside
    return beside


def check_location(root: Path, inputs: Sequence[Path], shown: Path, *, overwrite: bool) -> None:
    """Raises OutputError for an output inside an input or the Hub's cache, through links or not, and for a file."""
    if root.exists() and not root.is_dir():
        raise OutputError(f"{shown}: expected a new or empty folder for the output, found a file")
    cache = Path(HF_HUB_CACHE).expanduser().resolve()
    if cache == root or cache in root.parents:
        raise OutputError(f"{shown}: lies inside the cache of the Hub; choose an output elsewhere")
    for folder in (path.resolve() for path in inputs):
        if folder == root or folder in root.parents:
            raise OutputError(f"{shown}: lies inside the input {folder}; choose an output elsewhere")
        if overwrite and root in folder.parents:
            raise OutputError(f"{shown}: holds the input {folder}, so it cannot be overwritten; choose an output elsewhere")


def check_empty(root: Path, shown: Path, *, overwrite: bool) -> None:
    """Raises OutputError for a folder that holds something, or with `overwrite` something that is not ours."""
    names = entries(root) if root.is_dir() else []
    if names and not overwrite:
        raise OutputError(
            f"{shown}: the output folder is not empty (it holds {names[0]}); name a new one, empty it, or replace what "
            "this package wrote there before with --overwrite"
        )
    if names and not any(name in names for name in MARKERS) and not all(_is_point(root / name) for name in names):
        raise OutputError(
            f"{shown}: not overwritten: it holds {names[0]}, but none of {', '.join(MARKERS)}, so this package did not "
            "write it; name a new folder"
        )


def point_folder(t: float) -> str:
    """The folder in which one of several points of a path is written.

    Example:
        >>> [point_folder(t) for t in (0.0, 0.3, 1 / 3, 1.0)]
        ['t0', 't0.3', 't0.3333333333333333', 't1']
    """
    return f"t{exact(t)}"


def _is_point(folder: Path) -> bool:
    """Whether a folder holds one of several points: a checkpoint, under the name that such a folder has."""
    return bool(POINT.fullmatch(folder.name)) and (folder / MARKERS[0]).is_file()


def entries(root: Path) -> list[str]:
    """Names of what an output folder holds, but for what grows inside it."""
    return sorted(path.name for path in root.iterdir() if path.name != INSIDE)
