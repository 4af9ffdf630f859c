"""The way to the Hub: a finished folder in one commit, onto a repository that was looked at before."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from hf_moe_lmc.checkpoints.source import hub_errors, one_line
from hf_moe_lmc.errors import HubError, InputError
from hf_moe_lmc.publishing.change import Change, Contents
from hf_moe_lmc.publishing.finished import CARD, Finished, finished
from hf_moe_lmc.publishing.target import Target, refuse_weights
from hf_moe_lmc.publishing.upload import Commit, send
from hf_moe_lmc.runtime.notices import warn


@dataclass(frozen=True)
class Published:
    """What a push did.

    Attributes:
        repository: OWNER/NAME, with @BRANCH where it is not the main one.
        address: of the commit or pull request; of the commit that holds all of it already, where nothing was to be done.
        changed: something was published.

    Example:
        >>> str(Published("me/merged", "https://huggingface.co/me/merged/commit/0123", changed=True))
        'published: https://huggingface.co/me/merged/commit/0123'
    """

    repository: str
    address: str
    changed: bool

    def __str__(self) -> str:
        if self.changed:
            return f"published: {self.address}"
        return f"nothing to publish: {self.repository} holds all of it already ({self.address})"


def check_repo_id(repo_id: str | None) -> None:
    """Raises InputError, before any work, for a REPO_ID that the Hub would not take; None is fine."""
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise InputError(f"{repo_id}: not a Hub id to publish under ({one_line(error)})") from error


def check_target(repo_id: str, output: str | os.PathLike[str], *, weights: bool, license: str | None = None) -> None:
    """Looks, before other work, at the repository that its output is to be published in.

    Args:
        weights: the output is a checkpoint, so that weights there are in its way.
        license: what its card is going to name; the Hub knows which there are.

    Raises:
        InputError: they are, or the Hub does not know the licence.
        HubError: the Hub cannot be asked, nobody is logged in, or whoever is may not write there.
    """
    if get_token() is None:
        raise HubError(f"{repo_id}: nothing can be published without a token of the Hub; log in first (hf auth login)")
    api = HfApi()
    with hub_errors(repo_id, writing=True):
        if license is not None:
            _validate(f"---\nlicense: {license}\n---\n".encode(), f"--license {license}", api.endpoint)
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
) -> Published:
    """Publishes a finished folder, with its card, in one commit, so that no half of it is ever visible.

    The repository is looked at first. Weights there are replaced only with `overwrite`, and a card of somebody else only with
    `overwrite_card`. Adapters, GGUF files and whatever else is no part of a transformers checkpoint stay.

    Large files are uploaded first, and one commit makes all of them visible. A call that was stopped is repeated: what the Hub
    has is not uploaded again. Where the repository holds all of it already, no commit is made. In the card, the lines that load
    the model name the repository, in the folder as well.

    Args:
        folder: what `align`, `apply`, `merge` or `barrier` wrote. A report or a symmetry gets a card where there is none.
        repo_id: OWNER/NAME; created where it does not exist.
        revision: branch to commit to; created from the main branch where it does not exist.
        create_pr: open a pull request instead of committing to the branch.
        commit_message: by default what the folder holds, such as "Merge of org/a and org/b at t = 0.5".
        overwrite: weights that are there go in the same commit: those which this checkpoint replaces, and those which
            `from_pretrained` could take instead of them.
        overwrite_card: README.md is replaced, whoever wrote it.

    Returns:
        The address of the commit or pull request, and whether there was anything to publish.

    Raises:
        InputError: the folder is unfinished or has no card, or the repository holds weights.
        HubError: the Hub cannot be reached, or refused; or the branch changed meanwhile.

    Example:
        >>> lmc.push("merged", "me/merged", private=True).address  # doctest: +SKIP
        'https://huggingface.co/me/merged/commit/...'
    """
    check_repo_id(repo_id)
    whole = finished(folder)
    commit = Commit(commit_message or whole.title(), revision, create_pr)
    api = HfApi(token=token)
    with hub_errors(repo_id, writing=True):
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        target = Target.look(api, created.repo_id, revision, make_branch=not create_pr)
        contents = Contents.of(whole, target.repo_id)
        change = Change.of(target, contents, overwrite=overwrite, overwrite_card=overwrite_card)
        if change.is_empty and not target.is_new:
            address, changed = f"{api.endpoint}/{target.repo_id}/commit/{target.commit}", False
        else:
            if contents.card is not None and any(addition.path_in_repo == CARD for addition in change.additions):
                _validate(contents.card, whole.path(CARD), api.endpoint)  # before gigabytes go there
            address, changed = send(api, target, change, commit), True
    _keep_card(whole, contents.card)
    return Published(target.name, address, changed)


def _validate(card: bytes, where: str | Path, endpoint: str) -> None:
    """Raises InputError for a card that the Hub refuses.

    This is `ModelCard.validate`, which in releases 1 of huggingface_hub sends the card to the public Hub whatever the endpoint.
    """
    try:
        body = {"repoType": "model", "content": str(ModelCard(card.decode()))}
        answer = get_session().post(f"{endpoint}/api/validate-yaml", json=body, headers={"Accept": "text/plain"})
        if answer.status_code == 400:
            raise ValueError(answer.text)
        hf_raise_for_status(answer)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{where}: the Hub refuses the metadata of the card ({_reason(error)}); correct it") from error


def _reason(error: Exception) -> str:
    """What the Hub, or YAML, has against the metadata of a card."""
    try:
        faults = json.loads(str(error))["errors"]
        return "; ".join(one_line(Exception(fault["message"])) for fault in faults)
    except (ValueError, KeyError, TypeError):
        return one_line(error)


def _keep_card(folder: Finished, card: bytes | None) -> None:
    """Puts the card that was published, which names the repository, in the place of the folder's."""
    if CARD not in folder.files or card is None or folder.path(CARD).read_bytes() == card:
        return
    written = folder.root / f".{CARD}.new"
    try:
        written.write_bytes(card)
        written.replace(folder.path(CARD))
    except OSError as error:  # a folder that may only be read: what was published is whole all the same
        warn(f"{folder.path(CARD)}: not rewritten ({error.strerror}); the published card differs: it names the repository")
