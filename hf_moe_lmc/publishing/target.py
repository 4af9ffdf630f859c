"""A repository as it is before anything is published there, and what a commit would do to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from hf_moe_lmc.checkpoints.side_files import speaks
from hf_moe_lmc.checkpoints.untrusted import parse_json, read_json_object
from hf_moe_lmc.errors import HubError, InputError, shown
from hf_moe_lmc.publishing.card import PROJECT
from hf_moe_lmc.publishing.finished import CARD, REPORT, Finished
from hf_moe_lmc.publishing.parents import metadata_of
from hf_moe_lmc.publishing.weights import other_layouts, weight_files
from hf_moe_lmc.runtime.notices import note, warn

ADAPTER = "adapter_config.json"
NAMED = 20  # files that a message names, the rest is counted
WITHOUT_WEIGHTS = ("report", "symmetry")  # tags of cards of this package that are no checkpoint's


@dataclass(frozen=True)
class Target:
    """A branch at one commit.

    Attributes:
        is_new: there is no such branch yet; it is made from this commit of the main one.
    """

    api: HfApi
    repo_id: str
    branch: str
    commit: str
    files: frozenset[str]
    is_new: bool

    @classmethod
    def look(cls, api: HfApi, repo_id: str, branch: str | None, *, make_branch: bool) -> Target:
        """Asks the Hub for a branch, by default `main`; raises what its client raises."""
        is_new = False
        try:
            info = api.model_info(repo_id, revision=branch)
        except RevisionNotFoundError:
            if not make_branch:
                raise
            is_new, info = True, api.model_info(repo_id)
        if info.sha is None:
            raise HubError(f"{repo_id}: the Hub did not say which commit this is")
        files = frozenset(sibling.rfilename for sibling in info.siblings or ())
        return cls(api, repo_id, branch or "main", info.sha, files, is_new)

    @property
    def name(self) -> str:
        return self.repo_id if self.branch == "main" else f"{self.repo_id}@{self.branch}"

    def weights(self) -> list[str]:
        """What `from_pretrained` takes for weights there."""
        return weight_files(self.files, self._json)

    def path(self, file: str) -> Path:
        return Path(self.api.hf_hub_download(self.repo_id, file, revision=self.commit))

    def _json(self, file: str) -> dict[str, Any]:
        """What a small file there says; a damaged one says nothing, and is replaced or deleted in any case."""
        try:
            value = parse_json(self.path(file).read_bytes(), constants=True)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}

    @cached_property
    def tree(self) -> Mapping[str, RepoFile]:
        """What the Hub lists of each file: size and hash."""
        entries = self.api.list_repo_tree(self.repo_id, recursive=True, revision=self.commit)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def refuse_weights(target: Target, held: Sequence[str], way_out: str) -> None:
    """Raises InputError that lists weights which a push would replace or leave beside other ones."""
    raise InputError(
        f"{target.name}: holds weights ({named(held)}), which this push would replace or which would stand beside the new "
        f"ones; {way_out}"
    )


def check_remains(target: Target, folder: Finished) -> None:
    """Warns of what stays in the repository and could be taken for a part of the new checkpoint."""
    kept = target.files - set(folder.files)
    if ADAPTER in kept:
        warn(
            f"{target.name}: holds an adapter, which stays: where peft is installed, from_pretrained loads the base model that "
            f"{ADAPTER} names instead of these weights; remove it, or name another repository"
        )
    if layouts := other_layouts(kept):
        warn(f"{target.name}: keeps {named(layouts)}, which may hold other weights than those that were pushed")
    if speaking := sorted(file for file in kept if speaks(file)):
        warn(f"{target.name}: keeps {named(speaking)}, which transformers reads and this checkpoint does not have")


def check_paths(folder: Finished) -> None:
    """Warns of paths of this machine in a report, in which older releases named local models as they were given."""
    if REPORT not in folder.files:
        return
    report = read_json_object(folder.path(REPORT), str(folder.path(REPORT)), constants=True)
    models = [model for model in (report.get("a"), report.get("b")) if isinstance(model, dict) and "commit" not in model]
    paths = [str(model.get("source")) for model in models if os.sep in str(model.get("source"))]
    if paths:
        warn(f"{folder.path(REPORT)}: names folders of this machine ({named(paths)}), which are published with it")


def replaces_card(target: Target, folder: Finished, card: bytes, *, overwrite: bool) -> bool:
    """Whether the card of a folder goes in; one of somebody else stays, and the user is told."""
    checkpoint = folder.kind == "checkpoint"
    if CARD not in target.files or overwrite or (target.is_new and checkpoint):
        return True
    there = target.path(CARD)
    if there.read_bytes() == card:
        return True
    tags = tags_of(metadata_of(there.read_bytes()))
    if PROJECT not in tags:
        warn(f"{target.name}: its {CARD} is not from {PROJECT}, so that it stays; replace it with --overwrite-card")
        return False
    if not checkpoint and not any(tag in tags for tag in WITHOUT_WEIGHTS):
        warn(f"{target.name}: its {CARD} is the card of a checkpoint, so that it stays; replace it with --overwrite-card")
        return False
    return True


def named(files: Sequence[str]) -> str:
    """Names for a message, on one line."""
    rest = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
    return ", ".join(map(shown, files[:NAMED])) + rest


def check_licence(target: Target, folder: Finished, card: bytes) -> None:
    """Says where the card of a checkpoint of this package names no licence, without which nobody may use it."""
    metadata = metadata_of(card)
    if folder.kind == "checkpoint" and PROJECT in tags_of(metadata) and not metadata.get("license"):
        note(
            f"{target.name}: its card names no licence, without which nobody may use the model; add `license` to the first "
            f"lines of {folder.path(CARD)} and push again"
        )


def tags_of(metadata: Mapping[str, Any]) -> list[str]:
    """The tags of a card."""
    tags = metadata.get("tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else []
