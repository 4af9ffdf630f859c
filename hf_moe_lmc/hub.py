"""Where a checkpoint comes from (a local folder, or a Hub repository at one commit), and where one is published."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from hf_moe_lmc.errors import CheckpointError, HubError, InputError

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w][\w.-]*)?")


@dataclass(frozen=True)
class Folder:
    """A checkpoint in a local folder."""

    root: Path

    @property
    def name(self) -> str:
        return str(self.root)

    @property
    def commit(self) -> None:
        return None

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())

    def path(self, file: str) -> Path:
        return self.root / file

    def fetch(self, files: Sequence[str]) -> None:
        return None


@dataclass(frozen=True)
class Repository:
    """A checkpoint in a Hub repository, pinned to a commit when it was resolved."""

    repo_id: str
    commit: str
    listed: tuple[str, ...]
    cached: bool = False  # offline: everything there is, is in the cache

    @property
    def name(self) -> str:
        return self.repo_id

    def files(self) -> list[str]:
        return list(self.listed)

    def path(self, file: str) -> Path:
        with _hub_errors(self.repo_id):
            return Path(hf_hub_download(self.repo_id, file, revision=self.commit))

    def fetch(self, files: Sequence[str]) -> None:
        if self.cached:
            return
        with _hub_errors(self.repo_id):
            snapshot_download(self.repo_id, revision=self.commit, allow_patterns=list(files))

    def header(self, file: str) -> dict[str, Any]:
        """The safetensors header of a remote shard, read with range requests."""
        with _hub_errors(self.repo_id):
            try:
                parsed = HfApi().parse_safetensors_file_metadata(self.repo_id, file, revision=self.commit)
            except (SafetensorsParsingError, AttributeError, TypeError, RecursionError) as error:  # or JSON of another shape
                raise CheckpointError(
                    f"{self.repo_id}/{file}: not a whole safetensors file, its header cannot be read ({_one_line(error)})"
                ) from error
        header: dict[str, Any] = {
            name: {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            for name, info in parsed.tensors.items()
        }
        if parsed.metadata:
            header["__metadata__"] = parsed.metadata
        return header


def resolve(model: str | os.PathLike[str]) -> Folder | Repository:
    """Finds MODEL: an existing local folder, or a Hub id with an optional @REVISION.

    Something that looks like a path (it starts with `.`, `/` or `~`, holds a backslash, no slash or more than one, ends
    in a slash, or its first part is a folder here) is never asked for on the Hub; `hf://OWNER/NAME` always is.

    Raises:
        CheckpointError: the path does not exist, is no folder, or the id, revision or permission is wrong.
        HubError: the Hub cannot be reached.
    """
    text = os.fspath(model)
    path = _expanded(text)
    explicit = text.startswith("hf://")
    if not explicit and path.is_dir():
        return Folder(path)
    if not explicit and path.exists():
        raise CheckpointError(f"{text}: expected the folder of a checkpoint, found a file; give its folder")
    if isinstance(model, os.PathLike) or (not explicit and looks_local(text)):
        raise CheckpointError(
            f"{text}: no such folder (it looks like a local path, so the Hub was not asked; write hf://OWNER/NAME for a Hub id)"
        )
    repo_id, at, revision = text.removeprefix("hf://").partition("@")
    if not REPO_ID.fullmatch(repo_id) or (at and not revision):
        raise CheckpointError(f"{text}: neither a local folder nor a Hub id of the form OWNER/NAME[@REVISION]")
    with _hub_errors(f"{text} (no such folder here)"):
        if is_offline_mode():
            snapshot = Path(hf_hub_download(repo_id, "config.json", revision=revision or None, local_files_only=True)).parent
            return Repository(repo_id, snapshot.name, tuple(Folder(snapshot).files()), cached=True)
        info = HfApi().model_info(repo_id, revision=revision or None)
    if info.sha is None:
        raise HubError(f"{text}: the Hub did not say which commit this is")
    return Repository(repo_id, info.sha, tuple(sorted(sibling.rfilename for sibling in info.siblings or ())))


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise CheckpointError(f"{text}: no such folder ({error})") from error


def looks_local(text: str) -> bool:
    """Whether a name is a path rather than a Hub id, OWNER/NAME[@REVISION]."""
    repo_id = text.partition("@")[0]
    return (
        text.startswith((".", "/", "~"))
        or "\\" in text
        or text.endswith("/")
        or repo_id.count("/") != 1
        or Path(repo_id.partition("/")[0]).is_dir()
    )


@contextmanager
def _hub_errors(what: str, writing: bool = False) -> Iterator[None]:
    """Turns the exceptions of huggingface_hub into ours, each one line with the next step."""
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(f"{what}: access is gated; accept its terms on the Hub and log in (hf auth login)") from error
    except RepositoryNotFoundError as error:
        if writing:
            raise HubError(f"{what}: no such repository, or no permission to write to it; log in (hf auth login)") from error
        raise CheckpointError(f"{what}: no such repository on the Hub either (or it is private: hf auth login)") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{what}: the repository has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what}: the Hub cannot be reached and the file is not in the cache ({_one_line(error)})") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{what}: the repository lacks a file ({_one_line(error)})") from error
    except HFValidationError as error:
        raise CheckpointError(f"{what}: not a valid Hub id ({_one_line(error)})") from error
    except HfHubHTTPError as error:
        login = "; log in with a token that may do this (hf auth login)" if error.response.status_code in (401, 403) else ""
        raise HubError(f"{what}: the Hub answered {_one_line(error)}{login}") from error
    except (httpx2.HTTPError, OfflineModeIsEnabled) as error:
        raise HubError(f"{what}: the Hub cannot be reached ({_one_line(error)})") from error
    except (ValueError, RuntimeError) as error:  # what the client makes of a card, an upload or an answer gone wrong
        if isinstance(error.__cause__, BadRequestError):
            raise InputError(f"{what}: the Hub refuses the card: {_one_line(error)}") from error
        cause = f" ({_one_line(error.__cause__)})" if error.__cause__ else ""
        raise HubError(f"{what}: {_one_line(error)}{cause}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def check_publishable(repo_id: str | None) -> None:
    """Raises InputError, before any work, for a REPO_ID that the Hub would not take; None is fine."""
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise InputError(f"{repo_id}: not a Hub id to publish under ({_one_line(error)})") from error


def publish(output: str | os.PathLike[str], repo_id: str, *, private: bool | None) -> None:
    """`push` at the end of other work: a failure says that the work itself is done."""
    try:
        push(output, repo_id, private=private)
    except HubError as error:
        raise HubError(f"{error}\n{output} is finished; publish it with: hf-moe-lmc push {output} {repo_id}") from error


def _finished_files(root: Path) -> list[str]:
    """The files of a finished checkpoint folder; InputError where something is missing."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder to publish")
    found = Folder(root).files()
    if any(file.startswith(".partial/") for file in found):
        raise InputError(f"{root}: unfinished (it holds .partial); make it anew before publishing")
    files = [file for file in found if not file.startswith(".")]
    for needed, what in (("README.md", "the card"), ("config.json", "the configuration")):
        if needed not in files:
            raise InputError(f"{root}: {needed} ({what}) is missing; publish a folder that align or merge finished")
    shards = {file for file in files if file.endswith(".safetensors") and "/" not in file}
    index = root / "model.safetensors.index.json"
    listed = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else shards
    if not shards or listed - shards:
        raise InputError(f"{root}: {'no weights' if not shards else 'missing ' + ', '.join(sorted(listed - shards))}")
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
        InputError: the folder is unfinished, or has no card.
        HubError: the Hub cannot be reached, or refused.
    """
    check_publishable(repo_id)
    root = Path(folder)
    files = _finished_files(root)
    api = HfApi(token=token)
    with _hub_errors(repo_id, writing=True):
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
