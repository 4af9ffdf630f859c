"""Where a checkpoint comes from: a local folder, or a Hub repository at one commit."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from huggingface_hub import (
    HfApi,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from hf_moe_lmc.errors import CheckpointError, HubError, InputError
from hf_moe_lmc.runtime.notices import note

HTTP = importlib.import_module(HTTPError.__module__.partition(".")[0])  # the client's: httpx in its releases 1, httpx2 in 2
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
RETRIES = 3  # of a range whose connection broke in the midst; the client itself repeats requests that got no answer
_REPOSITORY_IN_URL = re.compile(r"/(?:api/models/)?([^/]+/[^/]+?)(?:/(?:resolve|revision|tree)/.*)?")


class Traffic:
    """What was fetched from the Hub for one repository: bytes, and requests for ranges."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.ranges = 0
        self._lock = Lock()

    def add(self, nbytes: int, ranges: int = 0) -> None:
        with self._lock:
            self.nbytes += nbytes
            self.ranges += ranges


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

    @property
    def remedy(self) -> str:
        """What to do about a file that is missing."""
        return "fetch it again"

    def absent(self, files: Sequence[str]) -> dict[str, int]:
        """Bytes of the files that a download would bring."""
        return {}

    def download(self, files: Sequence[str]) -> None:
        return None


@dataclass(frozen=True)
class Repository:
    """A checkpoint in a Hub repository, pinned to a commit when it was resolved.

    Attributes:
        listed: the files there; of a repository that is read from the cache, those that are in it.
        cached: the Hub is not asked: offline mode, it cannot be reached, or all that is read is in the cache.
        traffic: what has been fetched so far.
    """

    repo_id: str
    commit: str
    listed: tuple[str, ...]
    cached: bool = False
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @property
    def name(self) -> str:
        return self.repo_id

    def files(self) -> list[str]:
        return list(self.listed)

    @property
    def remedy(self) -> str:
        """What to do about a file that is missing."""
        if not self.cached:
            return "fetch it again"
        return "the Hub is not reached, so only its cache is read; repeat the call with a connection"

    def path(self, file: str) -> Path:
        before = self.blobs()
        with hub_errors(self.repo_id):
            found = Path(hf_hub_download(self.repo_id, file, revision=self.commit, local_files_only=self.cached))
        self.count([found], before)
        return found

    def blobs(self) -> set[str]:
        """Names of the contents in the cache, of this commit and of others."""
        folder = Path(HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=self.repo_id, repo_type="model") / "blobs"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def count(self, files: Iterable[Path], before: Collection[str]) -> None:
        """Counts the contents that were not in the cache before; each file there is a link to its content."""
        new = {path.resolve() for path in files}
        self.traffic.add(sum(path.stat().st_size for path in new if path.name not in before))

    def is_cached(self, file: str) -> bool:
        """Whether a file is in the cache."""
        return isinstance(try_to_load_from_cache(self.repo_id, file, revision=self.commit), str)

    def absent(self, files: Sequence[str]) -> dict[str, int]:
        """Bytes of the files that a download would bring: those that are not in the cache.

        Raises:
            HubError: the Hub cannot be reached.
        """
        wanted = {file for file in files if not self.is_cached(file)}
        if self.cached or not wanted:
            return {}
        with hub_errors(self.repo_id):
            tree = HfApi().list_repo_tree(self.repo_id, recursive=True, revision=self.commit)
            return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile) and entry.path in wanted}

    def download(self, files: Sequence[str]) -> None:
        if self.cached:
            return
        before = self.blobs()
        with hub_errors(self.repo_id):
            folder = snapshot_download(self.repo_id, revision=self.commit, allow_patterns=[_literally(file) for file in files])
        self.count([Path(folder) / file for file in files], before)

    def fetch(self, file: str, first: int, count: int) -> tuple[bytes, int]:
        """`count` bytes of a file from byte `first` on, fewer where it ends, by an HTTP range; and the size of the file.

        Raises:
            HubError: the Hub cannot be reached, or does not serve ranges.
        """
        url = hf_hub_url(self.repo_id, file, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={first}-{first + count - 1}"}
        with hub_errors(self.repo_id):
            for attempt in range(RETRIES + 1):
                try:
                    with http_stream_backoff("GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT) as response:
                        if response.status_code == 416 and first == 0:  # an empty file has no range
                            return b"", 0
                        hf_raise_for_status(response)
                        size = _whole_size(response.headers.get("Content-Range"))
                        if response.status_code != 206 or size is None:
                            raise HubError(f"{self.repo_id}/{file}: the server does not serve ranges; download the model")
                        data = response.read()
                except HTTP.TransportError:
                    if attempt == RETRIES:
                        raise
                    continue
                self.traffic.add(len(data), 1)
                if len(data) == min(count, size - first):
                    return data, size
        raise HubError(f"{self.repo_id}/{file}: {len(data)} bytes came instead of {count} from byte {first}; repeat the call")


def _whole_size(content_range: str | None) -> int | None:
    """The size of a file, as the answer to a request for a range has it: bytes 0-9/120."""
    size = (content_range or "").rpartition("/")[2]
    return int(size) if size.isdecimal() else None


def resolve(model: str | os.PathLike[str]) -> Folder | Repository:
    """Finds MODEL: an existing local folder, or a Hub id with an optional @REVISION.

    The Hub is not asked for a name that looks like a path: one that starts with `.`, `/` or `~`, holds a backslash, no slash
    or more than one, ends in a slash, or begins with a local folder. It is always asked for `hf://OWNER/NAME`.

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
    with hub_errors(f"{text} (no such folder here)"):
        if is_offline_mode():
            return _in_cache(repo_id, hf_hub_download(repo_id, "config.json", revision=revision or None, local_files_only=True))
        try:
            return _on_hub(text, repo_id, revision or "main")
        except HTTPError as error:
            config = try_to_load_from_cache(repo_id, "config.json", revision=revision or None)
            if not is_outage(error) or not isinstance(config, str):
                raise
            found = _in_cache(repo_id, config)
            note(f"{text}: the Hub cannot be reached ({one_line(error)}); read from its cache, commit {found.commit[:12]}")
            return found


def _on_hub(text: str, repo_id: str, revision: str) -> Repository:
    """A repository as the Hub has it now."""
    info = HfApi().model_info(repo_id, revision=revision)
    if info.sha is None:
        raise HubError(f"{text}: the Hub did not say which commit this is")
    files = tuple(sorted(sibling.rfilename for sibling in info.siblings or ()))
    found = Repository(repo_id, info.sha, files)
    if "config.json" in files and not COMMIT.fullmatch(revision):
        before = found.blobs()
        path = hf_hub_download(repo_id, "config.json", revision=revision)  # the cache now knows the branch: for calls offline
        found.count([Path(path)], before)
    return found


def _in_cache(repo_id: str, config: str) -> Repository:
    """What the cache holds of the commit whose configuration is there."""
    snapshot = Path(config).parent
    return Repository(repo_id, snapshot.name, tuple(Folder(snapshot).files()), cached=True)


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
def hub_errors(what: str, writing: bool = False) -> Iterator[None]:
    """Turns the exceptions of huggingface_hub into ours: one line, with the next step."""
    try:
        yield
    except GatedRepoError as error:
        found = _REPOSITORY_IN_URL.fullmatch(error.response.url.path)
        page = f"{ENDPOINT}/{found[1]}" if found else "its page on the Hub"
        raise CheckpointError(
            f"{what}: access is gated. The Hub says: {error.server_message or one_line(error)} Accept its terms on {page}, "
            "then log in with a token that may read it (hf auth login, or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        if writing:
            raise HubError(f"{what}: no such repository, or no permission to write to it; log in (hf auth login)") from error
        raise CheckpointError(f"{what}: no such repository on the Hub either (or it is private: hf auth login)") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{what}: the repository has no such revision") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what}: the Hub cannot be reached and the file is not in the cache ({one_line(error)})") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{what}: the repository lacks a file ({one_line(error)})") from error
    except HFValidationError as error:
        raise CheckpointError(f"{what}: not a valid Hub id ({one_line(error)})") from error
    except HfHubHTTPError as error:
        login = "; log in with a token that may do this (hf auth login)" if error.response.status_code in (401, 403) else ""
        raise HubError(f"{what}: the Hub answered {one_line(error)}{login}{_again(error, writing)}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise HubError(f"{what}: the Hub cannot be reached ({one_line(error)}){_again(error, writing)}") from error
    except (ValueError, RuntimeError) as error:  # what the client makes of a card, an upload or an answer gone wrong
        if isinstance(error.__cause__, BadRequestError):
            raise InputError(f"{what}: the Hub refuses the card: {one_line(error)}") from error
        cause = f" ({one_line(error.__cause__)})" if error.__cause__ else ""
        raise HubError(f"{what}: {one_line(error)}{cause}") from error


def _again(error: BaseException, writing: bool) -> str:
    """The next step after a failure that may pass."""
    if not is_outage(error):
        return ""
    return "; repeat the same call" + (": what was uploaded is not sent again" if writing else "")


def is_outage(error: BaseException) -> bool:
    """Whether a request failed for a reason that may pass: no connection, none in time, or an error of the server (5xx)."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, HTTP.TransportError) and not isinstance(error, HTTP.ProxyError)


def _literally(file: str) -> str:
    """A pattern that fits one file name alone."""
    return re.sub(r"([*?[])", r"[\1]", file)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
