"""A small Hugging Face Hub on 127.0.0.1: tests talk to it over real HTTP, through the real client.

    with LoopbackHub({"hf_write": Account("alice"), "hf_read": Account("alice", role="read")}) as hub:
        subprocess.run(command, env=hub.environment(tmp_path / "hf_home", token="hf_write"), check=True)
        assert "model_index.json" in hub.files("alice/dog")

It keeps public repositories of type model in memory, each with one branch, `main`, and answers what huggingface_hub
2.4.0 asks about them. It has no Xet, no multipart uploads and no range requests. Status and error codes follow the
client's source; they were never compared with the real Hub.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = {".bin", ".pt", ".safetensors"}
CUT, STALL, PORTAL, OTHER = -1, -2, -3, -4
BAD_TOKEN = "Invalid credentials in Authorization header"  # the client knows a bad token by this text


class Account(NamedTuple):
    """The owner of a token. A `read` token may not write to any repository."""

    name: str
    role: Literal["read", "write"] = "write"


ACCOUNTS = {"hf_alice": Account("alice"), "hf_reader": Account("alice", role="read"), "hf_bob": Account("bob")}


class StoredFile(NamedTuple):
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """The id by which the client leaves out files that have not changed."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


class Repo:
    """One history, oldest commit first. Each commit keeps all of its files, so that old revisions resolve."""

    def __init__(self) -> None:
        self.head = ""
        self.commits: dict[str, dict[str, StoredFile]] = {}
        self.add_commit({})

    def add_commit(self, files: dict[str, StoredFile]) -> None:
        listing = sorted((path, file.oid) for path, file in files.items())
        self.head = hashlib.sha1(repr((self.head, listing)).encode()).hexdigest()
        self.commits[self.head] = files

    def resolve(self, revision: str) -> str:
        """Return the commit id of `revision`: `main` or a commit id."""
        sha = self.head if revision == "main" else revision
        if sha not in self.commits:
            raise HubError(404, "Revision not found", code="RevisionNotFound")
        return sha


class Request(NamedTuple):
    """A request. `token` is `None` if there was no Authorization header."""

    method: str
    path: str
    query: dict[str, list[str]]
    token: str | None
    body: bytes


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def json_reply(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())


class HubError(Exception):
    """An answer that is not a success. The client picks its exception class by `code`, else by the status."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        named = {"X-Error-Message": message, "X-Error-Code": code, **(headers or {})}
        self.reply = json_reply({"error": message}, status, named)


class LoopbackHub:
    """The server, a context manager.

    Attributes:
        url: The endpoint, `http://127.0.0.1:PORT`.
        accounts: The owner of each token; any other token is refused.
        repos: The repositories by id, `owner/name`.
        lfs_objects: The content of LFS files by sha256; all repositories share it.
        requests: Every request so far, oldest first, with those that were refused.
        fail: Endpoints that fail: the status by the name of the endpoint's function below, `{"commit": 500}`; or a list
            for the requests to come, `{"commit": [500, 500]}`. In place of a status, `CUT` breaks the connection (of
            `lfs_put` halfway), `STALL` never answers, `PORTAL` answers 200 with a page of HTML, as the network of a
            hotel does, and `OTHER` answers with JSON that is not the Hub's.
        retry_after: Seconds that a 429 asks the client to wait.
    """

    def __init__(self, accounts: dict[str, Account]):
        self.accounts = accounts
        self.repos: dict[str, Repo] = {}
        self.lfs_objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.fail: dict[str, int | list[int]] = {}
        self.retry_after = "7"
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop without a word. The next connection is refused."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """Return the content of the files on `main` by path."""
        repo = self.repos[repo_id]
        return {path: file.content for path, file in repo.commits[repo.head].items()}

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the whole environment of a subprocess that is to use this Hub, for `subprocess.run(..., env=...)`.

        Args:
            home: Folder of the client's cache and token file.
            token: Its HF_TOKEN; `None` makes the subprocess anonymous.
        """
        prefixes = ("HF_", "HUGGING", "TRANSFORMERS_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # with Xet an upload never falls back to LFS
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def answer(self, request: Request) -> Reply:
        """Record the request and hand it to its endpoint. A HEAD is a GET whose body is not sent."""
        method = request.method.replace("HEAD", "GET")
        with self._lock:
            self.requests.append(request)
            try:
                for route_method, pattern, endpoint in ROUTES:
                    if method == route_method and (match := pattern.fullmatch(request.path)):
                        if failure := self._failure(endpoint.__name__):
                            return failure
                        groups = {name: value and unquote(value) for name, value in match.groupdict().items()}
                        return endpoint(self, request, **groups)
                raise HubError(404, f"The loopback Hub has no {request.method} {request.path}")
            except HubError as error:
                return error.reply

    def _failure(self, endpoint: str) -> Reply | None:
        """Return the reply that `fail` wants from an endpoint, if any."""
        status = self.fail.get(endpoint)
        if isinstance(status, list):
            status = status.pop(0) if status else None
        if not status:
            return None
        if status == PORTAL:
            return Reply(200, {"Content-Type": "text/html"}, b"<html>Welcome! Accept our terms.</html>")
        if status == OTHER:
            return json_reply({"message": "Nothing here is the Hub's"})
        message = BAD_TOKEN if status == 401 else "Refused on purpose by the test"
        return HubError(status, message, headers={"Retry-After": self.retry_after} if status == 429 else None).reply

    def account(self, request: Request) -> Account:
        """Return who is asking."""
        if request.token not in self.accounts:
            raise HubError(401, BAD_TOKEN if request.token else "Log in first")
        return self.accounts[request.token]

    def readable(self, request: Request, repo_id: str) -> Repo:
        account = self.account(request) if request.token else None
        if repo_id not in self.repos:
            # Over https the client takes a 401 about a repository for "not found"; over http it needs the code.
            raise HubError(404 if account else 401, "Repository not found", code="RepoNotFound")
        return self.repos[repo_id]

    def writable(self, request: Request, repo_id: str) -> Repo:
        repo = self.readable(request, repo_id)
        require_write(self.account(request), repo_id.split("/")[0])
        return repo


def require_write(account: Account, namespace: str) -> None:
    if account.role != "write" or account.name != namespace:
        raise HubError(403, f"A {account.role} token of {account.name} may not write to {namespace}")


# The endpoints. A function's name is its key in `LoopbackHub.fail`.


def create(hub: LoopbackHub, request: Request) -> Reply:
    account, asked = hub.account(request), json.loads(request.body)
    namespace = asked["organization"] or account.name
    require_write(account, namespace)
    repo_id = f"{namespace}/{asked['name']}"
    url = f"{hub.url}/{repo_id}"
    if repo_id in hub.repos:
        # This is no HubError, since create_repo(exist_ok=True) reads the url.
        return json_reply({"error": "You already created this model repo", "url": url}, status=409)
    hub.repos[repo_id] = Repo()
    return json_reply({"url": url})


def validate_yaml(hub: LoopbackHub, request: Request) -> Reply:
    return json_reply({"errors": [], "warnings": []})


def auth_check(hub: LoopbackHub, request: Request, repo_id: str, write: str | None) -> Reply:
    check = hub.writable if write else hub.readable
    check(request, repo_id)
    return json_reply({})


def info(hub: LoopbackHub, request: Request, repo_id: str, revision: str | None) -> Reply:
    repo = hub.readable(request, repo_id)
    sha = repo.resolve(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
    return json_reply({"id": repo_id, "sha": sha, "siblings": siblings})


def tree(hub: LoopbackHub, request: Request, repo_id: str, revision: str, folder: str | None) -> Reply:
    repo = hub.readable(request, repo_id)
    files = repo.commits[repo.resolve(revision)]
    prefix = f"{folder}/" if folder else ""
    paths = [path for path in sorted(files) if path.startswith(prefix)]
    if folder and not paths:
        raise HubError(404, "Entry not found", code="EntryNotFound")
    entries = [
        {"type": "file", "path": path, "size": len(files[path].content), "oid": files[path].oid} for path in paths
    ]
    return json_reply(entries)


def resolve(hub: LoopbackHub, request: Request, repo_id: str, revision: str, path: str) -> Reply:
    repo = hub.readable(request, repo_id)
    sha = repo.resolve(revision)
    if path not in repo.commits[sha]:
        raise HubError(404, "Entry not found", code="EntryNotFound", headers={"X-Repo-Commit": sha})
    file = repo.commits[sha][path]
    return Reply(200, {"X-Repo-Commit": sha, "ETag": f'"{file.oid}"'}, file.content)


def preupload(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    """Say which way each file goes, and what is there now: the client leaves an unchanged file out of the commit."""
    repo = hub.writable(request, repo_id)
    current = repo.commits[repo.resolve(revision)]
    plans = []
    for path in (asked["path"] for asked in json.loads(request.body)["files"]):
        mode = "lfs" if PurePosixPath(path).suffix in LFS_SUFFIXES else "regular"
        oid = current[path].oid if path in current else None
        plans.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json_reply({"files": plans})


def lfs_batch(hub: LoopbackHub, request: Request, repo_id: str) -> Reply:
    """Say where to send each object. One without `actions` is here already."""
    hub.writable(request, repo_id)
    objects = []
    for item in json.loads(request.body)["objects"]:
        upload = {"actions": {"upload": {"href": f"{hub.url}/lfs-objects/{item['oid']}"}}}
        objects.append(item if item["oid"] in hub.lfs_objects else item | upload)
    return json_reply({"transfer": "basic", "objects": objects})


def lfs_put(hub: LoopbackHub, request: Request, oid: str) -> Reply:
    """Take an object. The client sends no token, since the real Hub signs the address."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"Got {len(request.body)} bytes whose sha256 is not {oid}")
    hub.lfs_objects[oid] = request.body
    return json_reply({})


def commit(hub: LoopbackHub, request: Request, repo_id: str, revision: str) -> Reply:
    repo = hub.writable(request, repo_id)
    files = dict(repo.commits[repo.resolve(revision)])
    for line in request.body.splitlines():
        match json.loads(line):
            case {"key": "header", "value": header}:
                assert "parentCommit" not in header
            case {"key": "file", "value": {"path": path, "content": content}}:
                files[path] = StoredFile(base64.b64decode(content), is_lfs=False)
            case {"key": "lfsFile", "value": {"path": path, "oid": oid}}:
                files[path] = StoredFile(hub.lfs_objects[oid], is_lfs=True)
            case {"key": "deletedFile", "value": {"path": path}}:
                del files[path]
            case operation:
                raise HubError(400, f"The loopback Hub cannot {operation['key']}")
    repo.add_commit(files)
    return json_reply({"commitUrl": f"{hub.url}/{repo_id}/commit/{repo.head}", "commitOid": repo.head})


_ID = r"(?P<repo_id>[^/]+/[^/]+)"
_API = rf"/api/models/{_ID}"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = [
    ("POST", re.compile(r"/api/repos/create"), create),
    ("POST", re.compile(r"/api/validate-yaml"), validate_yaml),
    ("GET", re.compile(rf"{_API}/auth-check(?P<write>/write)?"), auth_check),
    ("GET", re.compile(rf"{_API}(?:/revision/{_REVISION})?"), info),
    ("GET", re.compile(rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?"), tree),
    ("GET", re.compile(rf"/{_ID}/resolve/{_REVISION}/(?P<path>.+)"), resolve),
    ("POST", re.compile(rf"{_API}/preupload/{_REVISION}"), preupload),
    ("POST", re.compile(rf"/{_ID}\.git/info/lfs/objects/batch"), lfs_batch),
    ("PUT", re.compile(r"/lfs-objects/(?P<oid>[0-9a-f]{64})"), lfs_put),
    ("POST", re.compile(rf"{_API}/commit/{_REVISION}"), commit),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; Nagle may hold the second back for 40 ms

    def __init__(self, hub: LoopbackHub, *args: Any):
        self.hub = hub
        super().__init__(*args)  # answers the request

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        cut = self.command == "PUT" and self.hub.fail.get("lfs_put") in (CUT, [CUT])
        body = self.rfile.read(length // 2 if cut else length)  # also of a request that will be refused
        authorization = self.headers.get("Authorization")
        token = None if authorization is None else authorization.removeprefix("Bearer ")
        reply = self.hub.answer(Request(self.command, url.path, parse_qs(url.query), token, body))
        if reply.status == STALL:
            self.hub.stopped.wait()
        if reply.status in (CUT, STALL):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(reply.status)
        # A connection that a client keeps alive would outlive stop().
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body)), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: `LoopbackHub.requests` is the log."""
