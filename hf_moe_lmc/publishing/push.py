"""Publishing: a finished folder goes to the Hub in one commit."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_moe_lmc.checkpoints.contents import read_contents
from hf_moe_lmc.checkpoints.source import Folder, hub_errors, one_line
from hf_moe_lmc.errors import Faults, HubError, InputError
from hf_moe_lmc.writing.location import unfinished_output


def check_publishable(repo_id: str | None) -> None:
    """Raises InputError, before any work, for a REPO_ID that the Hub would not take; None is fine."""
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise InputError(f"{repo_id}: not a Hub id to publish under ({one_line(error)})") from error


def publish(output: str | os.PathLike[str], repo_id: str, *, private: bool | None) -> None:
    """`push` at the end of other work. The message of a failure says that the work itself is done."""
    try:
        push(output, repo_id, private=private)
    except HubError as error:
        raise HubError(f"{error}\n{output} is finished; publish it with: hf-moe-lmc push {output} {repo_id}") from error


def _finished_files(root: Path) -> list[str]:
    """The files of a finished checkpoint folder; raises InputError where something is missing or damaged."""
    if folder := unfinished_output(root):
        raise InputError(
            f"{root}: unfinished: the call that writes it still runs or was stopped ({folder} holds what is done of it); "
            f"let it finish, or repeat it, before publishing. To publish {root} as it is, remove {folder} first"
        )
    if not root.is_dir():
        raise InputError(f"{root}: no such folder to publish")
    source = Folder(root)
    files = [file for file in source.files() if not file.startswith(".")]
    faults = Faults()
    if "README.md" not in files:
        faults.add(InputError(f"{root}: README.md (the card) is missing; publish a folder that align or merge finished"))
    with faults.gather():
        read_contents(source)
    faults.check()
    return files


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publishes a finished folder, with its card, in one commit, so that no half of it is ever visible.

    Args:
        folder: what `align` or `merge` wrote.
        repo_id: OWNER/NAME; created where it does not exist.
        revision: branch to commit to; created where it does not exist.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The address of the commit or pull request.

    Raises:
        InputError: the folder is unfinished (a call still writes it, or was stopped), damaged, or has no card.
        HubError: the Hub cannot be reached, or refused.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> lmc.merge("model-a", "model-b", "merged", align=False)
        >>> lmc.push("merged", "me/merged", private=True)
        'https://huggingface.co/me/merged/commit/...'
    """
    check_publishable(repo_id)
    root = Path(folder)
    files = _finished_files(root)
    api = HfApi(token=token)
    with hub_errors(repo_id, writing=True):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(created.repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            created.repo_id,
            [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(root / file)) for file in files],
            commit_message=commit_message or "Upload a checkpoint aligned by hf_moe_lmc",
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url
