"""The step that makes a finished folder the output, and what undoes it where a call was stopped half-way.

Beside OUT it is one rename. Inside OUT the files move one by one, the index last. What stood at OUT before is put aside first,
and stands there again if the new output does not arrive.
"""

from __future__ import annotations

import json
import posixpath
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_moe_lmc.writing.location import PLAN, REPLACED, entries
from hf_moe_lmc.writing.results import UNFINISHED, ResultFolder, sync, sync_folders


@dataclass(frozen=True)
class Publication:
    """Of an output from its working folder.

    Attributes:
        root: the output.
        folder: the working folder.
    """

    root: Path
    folder: Path

    @property
    def is_beside(self) -> bool:
        return self.folder.parent == self.root.parent

    def plan(self) -> dict[str, Any] | None:
        """What a call that came to publishing was about to do."""
        path = self.folder / PLAN
        plan: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
        return plan

    def finished(self) -> str | None:
        """The name of the folder that became the output, where all of it stands at `root`; None elsewhere."""
        plan = self.plan()
        return plan["from"] if plan and self._is_complete(plan) else None

    def publish(self, results: ResultFolder, *, last: str, overwrite: bool, durable: bool) -> None:
        """Makes `results` the output, the files named `last` at the end, whatever folder of it they are in.

        Args:
            overwrite: what stands at `root` is replaced.
        """
        files = sorted(results.files(), key=lambda file: (posixpath.basename(file) == last, file))
        plan = self.folder / PLAN
        unfinished = plan.with_name(plan.name + UNFINISHED)
        unfinished.write_text(json.dumps({"from": results.folder.name, "files": files}))
        if durable:
            sync_folders(results.folder)
            sync(unfinished)
        unfinished.replace(plan)
        if overwrite:
            self._put_aside()
        if self.is_beside:
            results.folder.rename(self.root)
        else:
            for file in files:
                (self.root / file).parent.mkdir(parents=True, exist_ok=True)
                results.path(file).rename(self.root / file)
        if durable:
            sync(self.root)
            sync(self.root.parent)

    def take_back(self) -> None:
        """Undoes a publication, or what there is of it."""
        plan = self.plan()
        assert plan is not None
        results = ResultFolder(self.folder / plan["from"])
        if self.is_beside:
            self.root.rename(results.folder)
        else:
            for file in plan["files"]:
                if (self.root / file).is_file() and not results.path(file).exists():
                    results.path(file).parent.mkdir(parents=True, exist_ok=True)
                    (self.root / file).rename(results.path(file))
            for path in sorted({(self.root / file).parent for file in plan["files"]}, reverse=True):
                if path != self.root:
                    with suppress(OSError):
                        path.rmdir()
        (self.folder / PLAN).unlink()

    def recover(self) -> None:
        """After a publication that was stopped half-way: what stood at OUT stands there again."""
        plan = self.plan()
        complete = plan is not None and self._is_complete(plan)
        if plan and not complete:
            if self.is_beside:  # nothing of it stands there: the rename was still to come, or somebody removed the output
                (self.folder / PLAN).unlink()
            else:
                self.take_back()
        replaced = self.folder / REPLACED
        if replaced.is_dir() and not complete:
            if self.is_beside:
                if not self.root.exists():
                    replaced.rename(self.root)
            else:
                for path in replaced.iterdir():
                    path.rename(self.root / path.name)
        if complete:
            shutil.rmtree(replaced, ignore_errors=True)

    def _put_aside(self) -> None:
        replaced = self.folder / REPLACED
        if not self.root.is_dir() or not entries(self.root):
            return
        if self.is_beside:
            self.root.rename(replaced)
            return
        replaced.mkdir(exist_ok=True)
        for name in entries(self.root):
            (self.root / name).rename(replaced / name)

    def _is_complete(self, plan: Mapping[str, Any]) -> bool:
        """Whether all of an output stands at `root`."""
        results = ResultFolder(self.folder / plan["from"])
        return not results.files() and all((self.root / file).is_file() for file in plan["files"])
