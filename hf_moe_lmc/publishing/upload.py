"""One commit on the Hub: large files go first, and become visible with all others at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from hf_moe_lmc.checkpoints.source import is_outage, one_line
from hf_moe_lmc.errors import HubError
from hf_moe_lmc.publishing.change import Change
from hf_moe_lmc.publishing.target import Target
from hf_moe_lmc.runtime.notices import note
from hf_moe_lmc.runtime.progress import size_of

CHANGED_MEANWHILE = (409, 412)
WAITS = (1.0, 4.0, 16.0)  # seconds before a request is made again that met an outage

R = TypeVar("R")


@dataclass(frozen=True)
class Commit:
    """What a push asks of the Hub.

    Attributes:
        revision: the branch; None: the main one.
        create_pr: a pull request instead of a commit on the branch.
    """

    message: str
    revision: str | None
    create_pr: bool


def send(api: HfApi, target: Target, change: Change, commit: Commit) -> str:
    """Uploads and commits. Returns the address of the commit or pull request.

    What was uploaded by a call that did not come to its commit is not uploaded again: the Hub has it.

    Raises:
        HubError: the branch changed meanwhile.
        HfHubHTTPError, HTTPError: what the client raises.
    """
    additions = list(change.additions)
    if additions:
        count = f"{len(additions)} file{'' if len(additions) == 1 else 's'}"
        note(f"{target.name}: uploading {count}, {size_of(change.nbytes)}; what the Hub has already is skipped")
        start = None if target.is_new else commit.revision  # large files belong to no branch
        _patiently(
            lambda: api.preupload_lfs_files(
                target.repo_id,
                additions,
                revision=start,
                create_pr=commit.create_pr,
                free_memory=False,
                gitignore_content="",  # one in the repository would leave weights out, without a word
            )
        )
    if target.is_new:
        _patiently(lambda: api.create_branch(target.repo_id, branch=target.branch, revision=target.commit, exist_ok=True))
    try:
        made = _commit(api, target, change, commit)
    except HfHubHTTPError as error:
        if error.response.status_code in CHANGED_MEANWHILE:
            raise HubError(
                f"{target.name}: somebody changed it since it was looked at (commit {target.commit[:12]}), so that nothing "
                f"was published ({one_line(error)}); look at it, and push again"
            ) from error
        raise
    return made.pr_url or made.commit_url


def _commit(api: HfApi, target: Target, change: Change, commit: Commit) -> CommitInfo:
    """The commit. After an outage it may have been made all the same: it is asked for again while the branch has not moved."""
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [*change.deletions, *change.additions]

    def ask() -> CommitInfo:
        return api.create_commit(
            target.repo_id,
            operations,
            commit_message=commit.message,
            revision=commit.revision,
            create_pr=commit.create_pr,
            parent_commit=target.commit,
        )

    if commit.create_pr:  # a second request would open a second one
        return ask()

    def check() -> None:
        if api.model_info(target.repo_id, revision=commit.revision).sha != target.commit:
            raise HubError(
                f"{target.name}: the Hub failed while it made the commit, and has a new one since, which may be this one; "
                "repeat the same call: it publishes what is missing, if anything is"
            )

    return _patiently(ask, check)


def _patiently(ask: Callable[[], R], check: Callable[[], None] = lambda: None) -> R:
    """What a request gives, which is made again after an outage of the Hub or the network unless `check` raises."""
    for wait in WAITS:
        try:
            return ask()
        except HTTPError as error:
            if not is_outage(error):
                raise
            note(f"{one_line(error)[:200]}; trying again in {wait:g} s")
            time.sleep(wait)
            check()
    return ask()
