"""A Hub on the loopback interface: enough of its HTTP API for the real `huggingface_hub` client to pull and to push.

Everything lives in memory. A repository is a set of references (branches and pull requests), each a history of commits,
each commit a whole tree of files. Xet is not spoken: clients need `HF_HUB_DISABLE_XET=1` besides `HF_ENDPOINT`.

    with HubServer() as hub:
        hub.publish("owner/name", {"config.json": b"{}"})
        subprocess.run([...], env={..., "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"})
        assert hub.repositories["owner/name"].refs["main"][-1].files == {...}
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import yaml

USER = "tester"  # owner of repositories that are created without one
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}  # every new repository has these
LICENCES = ("apache-2.0", "mit", "other")  # some of those that the Hub knows
NOT_LOGGED_IN = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"


@dataclass(frozen=True)
class Request:
    """One line of the request log: `range` is the Range header, `sent` the bytes of the answer's body."""

    method: str
    path: str
    status: int
    range: str | None
    sent: int


@dataclass(frozen=True)
class Commit:
    """A whole tree of files."""

    oid: str
    message: str
    files: Mapping[str, bytes]


@dataclass
class Repository:
    """References to histories, oldest commit first: branches by their names, pull requests as `refs/pr/N`."""

    refs: dict[str, list[Commit]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, ref: str, files: Mapping[str, bytes], message: str, deleted: Collection[str] = ()) -> Commit:
        """Adds a commit that puts `files` over those of the one before, without the deleted ones."""
        history = self.refs.setdefault(ref, [])
        before = history[-1].files if history else {}
        tree = {**{path: content for path, content in before.items() if path not in deleted}, **files}
        digest = hashlib.sha1(f"{ref} {len(history)} {message}".encode())
        for path in sorted(tree):
            digest.update(f"\n{_oid(path, tree[path])} {path}".encode())
        history.append(Commit(digest.hexdigest(), message, tree))
        return history[-1]

    def find(self, revision: str) -> Commit | None:
        """The head of a reference, or any commit by its full hash."""
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((commit for history in self.refs.values() for commit in history if commit.oid == revision), None)


@dataclass
class Failure:
    """Answers `status` to the next `times` requests of `method` (all if empty) whose path matches the pattern `path`."""

    status: int
    times: int
    method: str
    path: str


@dataclass
class Cut:
    """Ends the connection of the next requests of `method` to `path` without an answer.

    Attributes:
        done: the request has been carried out before.
    """

    times: int
    method: str
    path: str
    done: bool


class Refused(Exception):
    """An answer that is an error; `code` is what the client tells errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class Answer:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class HubServer:
    """The server, and what tests look at.

    Attributes:
        repositories: by id.
        objects: contents of large files by SHA-256, uploaded but perhaps not committed.
        token: what writing and reading private repositories takes; None lets everybody do everything.
        log: every request, in the order of the answers.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.token: str | None = None
        self.log: list[Request] = []
        self._failures: list[Failure] = []
        self._cuts: list[Cut] = []
        self._interventions: list[tuple[str, Callable[[], object]]] = []
        self.lock = RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def publish(self, repo_id: str, files: Mapping[str, bytes], revision: str = "main", **kind: bool) -> Commit:
        """Commits `files` without a request, to a repository that is made where there is none."""
        with self.lock:
            if repo_id not in self.repositories:
                self.repositories[repo_id] = _new_repository(**kind)
            return self.repositories[repo_id].commit(revision, files, "published by a test")

    def fail(self, status: int = 503, times: int = 1, method: str = "", path: str = "") -> None:
        """Makes the next requests fail; see `Failure`."""
        with self.lock:
            self._failures.append(Failure(status, times, method, path))

    def cut(self, method: str, path: str, times: int = 1, *, done: bool = False) -> None:
        """Ends the connection of the next requests; see `Cut`."""
        with self.lock:
            self._cuts.append(Cut(times, method, path, done))

    def is_cut(self, method: str, target: str, *, done: bool) -> bool:
        """Whether a request ends here without an answer."""
        path = urlsplit(target).path
        for one in self._cuts:
            if one.times and one.method == method and one.done == done and re.search(one.path, path):
                one.times -= 1
                return True
        return False

    def meanwhile(self, path: str, action: Callable[[], object]) -> None:
        """Does something once, just before the next request whose path matches is answered: somebody else was faster."""
        with self.lock:
            self._interventions.append((path, action))

    def forget(self) -> None:
        """Back to the state after the start."""
        with self.lock:
            self.repositories.clear()
            self.objects.clear()
            self.log.clear()
            self._failures.clear()
            self._cuts.clear()
            self._interventions.clear()
            self.token = None

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One request; raises Refused."""
        path = urlsplit(target).path
        if failure := next(
            (one for one in self._failures if one.times and one.method in ("", method) and re.search(one.path, path)), None
        ):
            failure.times -= 1
            raise Refused(failure.status, "injected failure")
        for due in [one for one in self._interventions if re.search(one[0], path)]:
            self._interventions.remove(due)
            due[1]()
        for verb, pattern, action in ROUTES:
            if (match := pattern.fullmatch(path)) and verb == method:
                parts = {name: unquote(part) for name, part in match.groupdict().items() if part is not None}
                return action(self, _Call(target, headers, body), **parts)
        raise Refused(404, f"no route for {method} {path}")

    def identified(self, call: _Call) -> None:
        """Refuses who does not say who they are."""
        if not self._knows(call):
            raise Refused(401, NOT_LOGGED_IN)

    def readable(self, call: _Call, id: str) -> Repository:
        known, repository = self._knows(call), self.repositories.get(id)
        if repository is None or (repository.private and not known):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, call: _Call, id: str) -> Repository:
        if not self._knows(call):
            # Of an https:// address the client takes any such 401 for a missing repository; here it must be told.
            raise Refused(401, NOT_LOGGED_IN, "RepoNotFound")
        return self.readable(call, id)

    def revision(self, call: _Call, id: str, revision: str) -> Commit:
        commit = self.readable(call, id).find(revision)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _knows(self, call: _Call) -> bool:
        """Whether the request carries the token; as on the Hub, a wrong one is worse than none."""
        given = call.headers.get("Authorization")
        if self.token is None or given == f"Bearer {self.token}":
            return True
        if given is not None:
            raise Refused(401, BAD_TOKEN)
        return False


@dataclass(frozen=True)
class _Call:
    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def opens_pull_request(self) -> bool:
        return "create_pr=1" in urlsplit(self.target).query.split("&")


def _new_repository(**kind: bool) -> Repository:
    repository = Repository(**kind)
    repository.commit("main", ATTRIBUTES, "initial commit")
    return repository


def _json(value: object, status: int = 200) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})


def _is_large(path: str) -> bool:
    """Whether a file goes through LFS; on the Hub .gitattributes and the size decide."""
    return path.endswith(".safetensors")


def _oid(path: str, content: bytes) -> str:
    """What git (for a small file) or LFS calls the content; also its ETag."""
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _create_repository(hub: HubServer, call: _Call) -> Answer:
    hub.identified(call)
    wanted = call.json
    repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
    url = {"url": f"{hub.endpoint}/{repo_id}"}
    if repo_id in hub.repositories:
        return _json({"error": "You already created this model repo", **url}, 409)
    hub.repositories[repo_id] = _new_repository(private=wanted.get("visibility") == "private")
    return _json(url)


def _may_write(hub: HubServer, call: _Call, id: str) -> Answer:
    hub.writable(call, id)
    return _json({})


def _whoami(hub: HubServer, call: _Call) -> Answer:
    hub.identified(call)
    return _json({"type": "user", "name": USER, "orgs": []})


def _validate_yaml(hub: HubServer, call: _Call) -> Answer:
    card = re.match(r"---\n(.*?)\n---\n", call.json["content"], re.DOTALL)
    warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
    try:
        metadata = yaml.safe_load(card[1] if card else "") or {}
        if metadata.get("license") not in (None, *LICENCES):
            return _json({"errors": [{"message": '"license" must be one of [...]'}], "warnings": warnings}, 400)
    except yaml.YAMLError as error:
        return _json({"errors": [{"message": str(error)}], "warnings": warnings}, 400)
    return _json({"errors": [], "warnings": warnings})


def _model_info(hub: HubServer, call: _Call, id: str, revision: str = "main") -> Answer:
    commit = hub.revision(call, id, revision)
    repository = hub.repositories[id]
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    facts = {"private": repository.private, "gated": "auto" if repository.gated else False, "tags": []}
    return _json({"id": id, "modelId": id, "sha": commit.oid, "siblings": siblings, **facts})


def _tree(hub: HubServer, call: _Call, id: str, revision: str) -> Answer:
    entries = []
    for path, content in sorted(hub.revision(call, id, revision).files.items()):
        oid, size = _oid(path, content), len(content)
        large = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if _is_large(path) else {}
        entries.append({"type": "file", "path": path, "size": size, "oid": oid[:40], **large})
    return _json(entries)


def _resolve(hub: HubServer, call: _Call, id: str, revision: str, path: str) -> Answer:
    commit = hub.revision(call, id, revision)
    if hub.repositories[id].gated:
        raise Refused(403, f"Access to model {id} is restricted and you are not in the authorized list.", "GatedRepo")
    if path not in commit.files:
        raise Refused(404, "Entry not found", "EntryNotFound")
    content = commit.files[path]
    headers = {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if _is_large(path):
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", "")):
        first, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        if first >= end:
            raise Refused(416, "range not satisfiable")
        return Answer(content[first:end], 206, {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(content)}"})
    return Answer(content, 200, headers)


def _preupload(hub: HubServer, call: _Call, id: str, revision: str) -> Answer:
    hub.writable(call, id)
    held = hub.revision(call, id, revision).files
    answers = []
    ignored = call.json.get("gitIgnore", held.get(".gitignore", b"").decode()).splitlines()
    for file in call.json["files"]:
        path = file["path"]
        ignore = any(fnmatch(path, pattern) for pattern in ignored)
        oid = {"oid": _oid(path, held[path])} if path in held else {}
        answers.append({"path": path, "uploadMode": "lfs" if _is_large(path) else "regular", "shouldIgnore": ignore, **oid})
    return _json({"files": answers})


def _lfs_batch(hub: HubServer, call: _Call, id: str) -> Answer:
    hub.writable(call, id)
    objects = []
    for wanted in call.json["objects"]:
        url = f"{hub.endpoint}/lfs/{wanted['oid']}"
        steps = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
        objects.append({**wanted, **({} if wanted["oid"] in hub.objects else {"actions": steps})})
    return _json({"transfer": "basic", "objects": objects})


def _lfs_put(hub: HubServer, call: _Call, oid: str) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != oid:
        raise Refused(400, "the content does not have this hash")
    hub.objects[oid] = call.body
    return Answer(b"")


def _lfs_verify(hub: HubServer, call: _Call, oid: str) -> Answer:
    hub.identified(call)
    if len(hub.objects.get(oid, b"")) != call.json["size"]:
        raise Refused(404, "object is missing or of another size")
    return _json({})


def _commit(hub: HubServer, call: _Call, id: str, revision: str) -> Answer:
    repository = hub.writable(call, id)
    base = hub.revision(call, id, revision)
    files, message, deleted = {}, "", set()
    for line in call.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            message = value["summary"]
            if parent := value.get("parentCommit"):
                if call.opens_pull_request:  # it starts there, wherever the branch is by now
                    base = hub.revision(call, id, parent)
                elif base.oid != parent:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
        elif key == "deletedFile":
            if value["path"] not in base.files:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            deleted.add(value["path"])
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile" and value["oid"] in hub.objects:
            files[value["path"]] = hub.objects[value["oid"]]
        else:
            raise Refused(400, f"cannot commit {key} {value.get('path')}")
    answer = {"success": True, "hookOutput": ""}
    if call.opens_pull_request:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        revision = f"refs/pr/{number}"
        repository.refs[revision] = [base]
        answer["pullRequestUrl"] = f"{hub.endpoint}/{id}/discussions/{number}"
    commit = repository.commit(revision, files, message, deleted)
    return _json({**answer, "commitOid": commit.oid, "commitUrl": f"{hub.endpoint}/{id}/commit/{commit.oid}"})


def _branch(hub: HubServer, call: _Call, id: str, branch: str) -> Answer:
    repository = hub.writable(call, id)
    start = hub.revision(call, id, call.json.get("startingPoint", "main"))
    if branch in repository.refs:
        raise Refused(409, f"Reference already exists: {branch}")
    repository.refs[branch] = [start]
    return _json({})


_ID = "(?P<id>[^/]+(?:/[^/]+)?)"
_REVISION = "(?P<revision>[^/]+)"  # slashes in it come quoted
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = [
    (method, re.compile(pattern), action)
    for method, pattern, action in (
        ("GET", "/api/whoami-v2", _whoami),
        ("POST", "/api/repos/create", _create_repository),
        ("POST", "/api/validate-yaml", _validate_yaml),
        ("GET", f"/api/models/{_ID}/revision/{_REVISION}", _model_info),
        ("GET", f"/api/models/{_ID}/tree/{_REVISION}", _tree),
        ("GET", f"/api/models/{_ID}", _model_info),
        ("GET", f"/api/models/{_ID}/auth-check/write", _may_write),
        ("POST", f"/api/models/{_ID}/preupload/{_REVISION}", _preupload),
        ("POST", f"/api/models/{_ID}/commit/{_REVISION}", _commit),
        ("POST", f"/api/models/{_ID}/branch/(?P<branch>[^/]+)", _branch),
        ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _lfs_batch),
        ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _lfs_put),
        ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", _lfs_verify),
        ("HEAD", f"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
        ("GET", f"/{_ID}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
    )
]


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept: bodies are always read and lengths always sent
        disable_nagle_algorithm = True

        def respond(self) -> None:
            if hub.is_cut(self.command, self.path, done=False):  # in the middle of what is sent
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with hub.lock:
                try:
                    answer = hub.answer(self.command, self.path, self.headers, body)
                except Refused as refused:
                    headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
                    answer = _json({"error": str(refused)}, refused.status)
                    answer = Answer(answer.body, answer.status, {**answer.headers, **headers})
                sent = 0 if self.command == "HEAD" else len(answer.body)
                path = unquote(urlsplit(self.path).path)
                hub.log.append(Request(self.command, path, answer.status, self.headers.get("Range"), sent))
                if hub.is_cut(self.command, self.path, done=True):
                    self.close_connection = True
                    return
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if sent:
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def log_message(self, *_: object) -> None:
            """Says nothing: tests read `HubServer.log`."""

    return Handler
