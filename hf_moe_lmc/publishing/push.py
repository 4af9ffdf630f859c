"""The way to the Hub: a finished folder in one commit, onto a repository that was looked at before."""

from __future__ import annotations

import os

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_moe_lmc.checkpoints.source import hub_errors, one_line
from hf_moe_lmc.errors import HubError, InputError
from hf_moe_lmc.publishing.card import card_without_weights
from hf_moe_lmc.publishing.finished import CARD, REPORT_TEXT, Finished, finished
from hf_moe_lmc.publishing.target import Target, check_paths, check_remains, refuse_weights, replaces_card

CHANGED_MEANWHILE = (409, 412)


def check_repo_id(repo_id: str | None) -> None:
    """Raises InputError, before any work, for a REPO_ID that the Hub would not take; None is fine."""
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise InputError(f"{repo_id}: not a Hub id to publish under ({one_line(error)})") from error


def check_target(repo_id: str, output: str | os.PathLike[str], *, weights: bool) -> None:
    """Looks, before other work, at the repository that its output is to be published in.

    Args:
        weights: the output is a checkpoint, so that weights there are in its way.

    Raises:
        InputError: they are.
        HubError: the Hub cannot be asked, nobody is logged in, or whoever is may not write there.
    """
    if get_token() is None:
        raise HubError(f"{repo_id}: nothing can be published without a token of the Hub; log in first (hf auth login)")
    api = HfApi()
    with hub_errors(repo_id, writing=True):
        whole = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        try:
            target = Target.look(api, whole, None, make_branch=False)
        except RepositoryNotFoundError:  # it is going to be made
            return
        api.auth_check(whole, write=True)
        held = target.weights() if weights else []
    if held:
        refuse_weights(
            target,
            held,
            "name another repository, or leave out --push-to-hub and publish the output afterwards with: "
            f"hf-moe-lmc push {output} {repo_id} --overwrite",
        )


def push_result(output: str | os.PathLike[str], repo_id: str, *, private: bool | None) -> None:
    """`push` at the end of other work: a failure says that the work itself is done."""
    again = f"hf-moe-lmc push {output} {repo_id}{' --private' if private else ''}"
    try:
        push(output, repo_id, private=private)
    except HubError as error:
        raise HubError(f"{error}\n{output} is finished; publish it with: {again}") from error
    except InputError as error:  # somebody put something there meanwhile
        raise InputError(f"{error}\n{output} is finished; publish it with: {again}") from error


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    overwrite_card: bool = False,
    token: str | None = None,
) -> str:
    """Publishes a finished folder, with its card, in one commit, so that no half of it is ever visible.

    The repository is looked at first. Weights there are replaced only with `overwrite`, and a card of somebody else only with
    `overwrite_card`. Adapters, GGUF files and whatever else is no part of a transformers checkpoint stay.

    Args:
        folder: what `align`, `apply`, `merge` or `barrier` wrote. A report or a symmetry gets a card where there is none.
        repo_id: OWNER/NAME; created where it does not exist.
        revision: branch to commit to; created from the main branch where it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        overwrite: weights that are there go in the same commit: those which this checkpoint replaces, and those which
            `from_pretrained` could take instead of them.
        overwrite_card: README.md is replaced, whoever wrote it.

    Returns:
        The address of the commit or pull request.

    Raises:
        InputError: the folder is unfinished or has no card, or the repository holds weights.
        HubError: the Hub cannot be reached, or refused; or the branch changed meanwhile.

    Example:
        >>> import hf_moe_lmc as lmc
        >>> lmc.merge("model-a", "model-b", "merged", align=False)
        >>> lmc.push("merged", "me/merged", private=True)
        'https://huggingface.co/me/merged/commit/...'
    """
    check_repo_id(repo_id)
    whole = finished(folder)
    api = HfApi(token=token)
    with hub_errors(repo_id, writing=True):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        target = Target.look(api, created.repo_id, revision, make_branch=not create_pr)
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        operations += _deletions(target, whole, overwrite=overwrite)
        operations += _additions(target, whole, overwrite_card=overwrite_card)
        if target.is_new:
            api.create_branch(target.repo_id, branch=target.branch, revision=target.commit, exist_ok=True)
        try:
            commit = api.create_commit(
                target.repo_id,
                operations,
                commit_message=commit_message or f"Upload a {whole.kind} made by hf_moe_lmc",
                revision=revision,
                create_pr=create_pr,
                parent_commit=target.commit,
            )
        except HfHubHTTPError as error:
            if error.response.status_code in CHANGED_MEANWHILE:
                raise HubError(
                    f"{target.name}: somebody changed it since it was looked at (commit {target.commit[:12]}), so that nothing "
                    f"was published ({one_line(error)}); look at it, and push again"
                ) from error
            raise
    return commit.pr_url or commit.commit_url


def _deletions(target: Target, folder: Finished, *, overwrite: bool) -> list[CommitOperationDelete]:
    """What goes when a folder comes; InputError where that was not asked for.

    A branch that is made now takes nothing from anybody: what it begins with stays where it comes from.
    """
    if folder.kind != "checkpoint":
        check_paths(folder)
        return []
    held = target.weights()
    if held and not overwrite and not target.is_new and not target.holds(folder, held):
        refuse_weights(target, held, "replace them with --overwrite, or name another repository or --revision")
    check_remains(target, folder)
    return [CommitOperationDelete(path_in_repo=file, is_folder=False) for file in held if file not in folder.files]


def _additions(target: Target, folder: Finished, *, overwrite_card: bool) -> list[CommitOperationAdd]:
    files = [file for file in folder.files if file != CARD]
    additions = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder.path(file))) for file in files]
    if replaces_card(target, folder, overwrite=overwrite_card):
        additions.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=_card(folder)))
    return additions


def _card(folder: Finished) -> str | bytes:
    """The path or the content of README.md; a report is its own card."""
    if CARD in folder.files or folder.kind == "checkpoint":
        return str(folder.path(CARD))
    text = folder.path(REPORT_TEXT).read_text(encoding="utf-8") if REPORT_TEXT in folder.files else None
    return card_without_weights(folder.kind, text).encode()
