"""A Hugging Face Hub server on loopback, for tests that run the real ``huggingface_hub`` client without a network.

    hub = HubServer()
    hub.take_process()  # before huggingface_hub is imported
    hub.add_user("me", "hf_me")
    with hub.client(token="hf_me"):
        model.push_to_hub("me/birds")
    assert "adapter_config.json" in hub.repo("me/birds").files()

Only the endpoints that the tests request are implemented (`_Handler.route`), for model repositories. Any other request
makes `HubServer.check` fail.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import unquote, urlsplit

from helpers.hub_repo import LFS_SUFFIX, HubError, Repo

BACKBONE = "google/vit"  # the repository of the backbone of many tests
EXTERNAL_SETTINGS = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class User(NamedTuple):
    name: str  # "" without a token
    role: str  # of the token: "read" or "write"


class HubServer:
    """A Hub server that runs until the process ends.

    Attributes:
        url: the endpoint, for ``HF_ENDPOINT``.
        users: by token. repos: by id. lfs: contents of uploaded LFS files, by SHA-256.
        requests: method and path of each request, in order of arrival.
        problems: requests that are not implemented or made the server fail.
    """

    def __init__(self) -> None:
        self.lock = Lock()
        self.folder = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self.reset()
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Deletes all users, repositories and records of requests."""
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.break_downloads(0)
        self.break_uploads(0)

    def check(self) -> None:
        """Raises AssertionError if a request was not implemented or made the server fail."""
        assert not self.problems, "The Hub server could not answer:\n" + "\n".join(self.problems)

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        """Adds a user, who owns the repositories ``name/...``, or another token of that user."""
        self.users[token] = User(name, role)

    def add_repo(self, id: str, files: Mapping[str, bytes] | Path | None = None, private: bool = False) -> Repo:
        """Adds a repository with files, given as contents by path or as a folder."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*.*")}
        repo = self.repos[id] = Repo(id, private)
        if files:
            repo.put(files)
        return repo

    def repo(self, id: str) -> Repo:
        return self.repos[id]

    def set_gated(self, id: str) -> None:
        """From now on only the owner can download the repository's files."""
        self.repos[id].gated = True

    def break_downloads(self, count: int) -> None:
        """Closes the connection after half of the file in each of the next downloads."""
        self.downloads_to_break = count

    def break_uploads(self, count: int) -> None:
        """Discards the file and closes the connection in each of the next uploads of LFS files."""
        self.uploads_to_break = count

    def count(self, method: str, part: str = "") -> int:
        """The number of requests with this method and with ``part`` in their path."""
        return sum(seen == method and part in path for seen, path in self.requests)

    def environment(self, token: str | None = None, cache: Path | str | None = None) -> dict[str, str]:
        """The environment of a client that connects only to this server; its cache is empty by default."""
        home = tempfile.mkdtemp(dir=self.folder.name)
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(EXTERNAL_SETTINGS)}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_CACHE": str(cache or Path(home, "hub")),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_XET": "1",  # or else the client uploads LFS files by another protocol if it has hf_xet
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        return kept | settings

    def take_process(self) -> None:
        """Makes this process a client of this server only."""
        assert "huggingface_hub" not in sys.modules, "huggingface_hub is imported already, and has read its settings"
        environment = self.environment()
        os.environ.clear()
        os.environ.update(environment)

    @contextmanager
    def client(
        self, token: str | None = None, cache: Path | str | None = None, offline: bool = False
    ) -> Iterator[None]:
        """Sets the token, the cache (empty by default) and offline mode in a process after `take_process`."""
        from huggingface_hub import constants

        assert self.url == constants.ENDPOINT, f"expected a client of {self.url}, got one of {constants.ENDPOINT}"
        cache = str(cache or tempfile.mkdtemp(dir=self.folder.name))
        environment = mock.patch.dict(os.environ, HF_TOKEN=token or "")
        with environment, mock.patch.multiple(constants, HF_HUB_CACHE=cache, HF_HUB_OFFLINE=offline):
            yield


class _Response(NamedTuple):
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = {}


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or else the body waits until the client has acknowledged the headers

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            response = self.respond()
        if response is None:
            self.close_connection = True
            return
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing: `HubServer.requests` records the requests."""

    def respond(self) -> _Response | None:
        """The response, or None to close the connection without one."""
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, url.path))
        try:
            answer = self.route([unquote(part) for part in url.path.split("/")[1:]], url.query)
        except HubError as error:
            headers = {"X-Error-Message": str(error), "X-Error-Code": error.code}
            return _Response(json.dumps({"error": str(error)}).encode(), error.status, headers)
        except Exception:
            self.hub.problems.append(f"{self.command} {self.path}: {traceback.format_exc()}")
            return _Response(b"", 501)  # a status that the client does not retry
        return answer if answer is None or isinstance(answer, _Response) else _Response(json.dumps(answer).encode())

    def route(self, path: list[str], query: str) -> object:
        """Calls the endpoint's method, which returns a response, the JSON of one, or None."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = self.hub.users.get(token, User("", "read"))
        self.creates_pr = "create_pr=1" in query
        match self.command, *path:
            case "POST", "api", "repos", "create":
                return self.create_repo(json.loads(self.body))
            case "POST", "api", "validate-yaml":
                return {"errors": []}
            case "GET", "api", "models", owner, name:
                return self.repo_info(self.find_repo(owner, name), "main")
            case "GET", "api", "models", owner, name, "revision", revision:
                return self.repo_info(self.find_repo(owner, name), revision)
            case "GET", "api", "models", owner, name, "tree", revision if "recursive=true" in query:
                return self.list_tree(self.find_repo(owner, name), revision)
            case "POST", "api", "models", owner, name, "branch", branch:
                return self.create_branch(self.find_repo(owner, name), branch)
            case "POST", "api", "models", owner, name, "preupload", revision:
                return self.preupload(self.find_repo(owner, name), revision, json.loads(self.body)["files"])
            case "POST", _, _, "info", "lfs", "objects", "batch":
                return self.lfs_batch(json.loads(self.body)["objects"])
            case "PUT", "lfs", sha:
                return self.upload_lfs(sha, self.body)
            case "POST", "api", "models", owner, name, "commit", revision:
                return self.commit(self.find_repo(owner, name), revision, map(json.loads, self.body.splitlines()))
            case "HEAD" | "GET", owner, name, "resolve", revision, *file:
                return self.download(self.find_repo(owner, name), revision, "/".join(file))
        raise NotImplementedError("this endpoint is not implemented")

    def find_repo(self, owner: str, name: str) -> Repo:
        """The repository; for everyone but its owner, a private one does not exist."""
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or (repo.private and self.user.name != owner):
            raise HubError(404 if self.user.name else 401, "Repository not found", "RepoNotFound")
        return repo

    def require_write(self, owner: str) -> None:
        """Raises HubError unless the user may write to the owner's repositories; any user may create a pull request."""
        if not self.user.name:
            raise HubError(401, "Invalid username or password.")
        if self.user != (owner, "write") and not self.creates_pr:
            raise HubError(403, f"You don't have the rights to write to the namespace {owner}")

    def create_repo(self, wanted: dict[str, Any]) -> object:
        owner = wanted.get("organization") or self.user.name
        self.require_write(owner)
        id = f"{owner}/{wanted['name']}"
        answer = {"url": f"{self.hub.url}/{id}"}
        if id in self.hub.repos:
            return _Response(json.dumps(answer).encode(), 409)
        # Clients 2.x send "visibility", clients 1.x "private".
        self.hub.add_repo(id, private=wanted.get("visibility") == "private" or wanted.get("private", False))
        return answer

    def repo_info(self, repo: Repo, revision: str) -> object:
        commit = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": repo.id, "sha": commit.oid, "private": repo.private, "tags": [], "siblings": siblings}

    def list_tree(self, repo: Repo, revision: str) -> object:
        files = repo.resolve(revision).files.items()
        return [{"type": "file", "path": path, "size": len(blob.content), "oid": blob.etag} for path, blob in files]

    def create_branch(self, repo: Repo, branch: str) -> object:
        self.require_write(repo.owner)
        repo.add_ref(f"refs/heads/{branch}", json.loads(self.body).get("startingPoint", "main"))
        return {}

    def preupload(self, repo: Repo, revision: str, files: list[dict[str, Any]]) -> object:
        """How to upload each file, and the present one's hash: the client leaves out a file that has not changed."""
        self.require_write(repo.owner)
        present = repo.resolve(revision).files
        answers = []
        for path in (file["path"] for file in files):
            mode = "lfs" if path.endswith(LFS_SUFFIX) else "regular"
            oid = present[path].etag if path in present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, objects: list[dict[str, Any]]) -> object:
        """Where to upload each LFS file; the client does not upload one that is here already."""
        for item in objects:
            if item["oid"] not in self.hub.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}

    def upload_lfs(self, sha: str, content: bytes) -> object:
        if self.hub.uploads_to_break > 0:
            self.hub.uploads_to_break -= 1
            return None
        if sha256(content).hexdigest() != sha:
            raise HubError(400, f"The content uploaded as {sha} has another hash")
        self.hub.lfs[sha] = content
        return {}

    def commit(self, repo: Repo, revision: str, items: Iterable[dict[str, Any]]) -> object:
        self.require_write(repo.owner)
        files: dict[str, bytes] = {}
        title, pull_request = "", {}
        for item in items:
            match item:
                case {"key": "header", "value": {"summary": str(title), **options}} if "parentCommit" not in options:
                    pass
                case {"key": "file", "value": {"path": path, "content": content}}:
                    files[path] = base64.b64decode(content)
                case {"key": "lfsFile", "value": {"path": path, "oid": sha}} if sha in self.hub.lfs:
                    files[path] = self.hub.lfs[sha]
                case {"key": "lfsFile", "value": {"path": path}}:
                    raise HubError(400, f"The LFS file {path} was not uploaded")
                case _:
                    raise NotImplementedError(f"a commit with {item}")
        url = f"{self.hub.url}/{repo.id}"
        if self.creates_pr:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            repo.add_ref(f"refs/pr/{number}", revision)
            revision, pull_request = f"refs/pr/{number}", {"pullRequestUrl": f"{url}/discussions/{number}"}
        oid = repo.put(files, title, revision).oid
        return {**pull_request, "commitOid": oid, "commitUrl": f"{url}/commit/{oid}"}

    def download(self, repo: Repo, revision: str, path: str) -> object:
        if repo.gated and self.user.name != repo.owner:
            raise HubError(403 if self.user.name else 401, f"Access to model {repo.id} is restricted.", "GatedRepo")
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return _Response(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
        body = commit.files[path].content
        headers["ETag"] = f'"{commit.files[path].etag}"'
        if self.command == "GET" and self.hub.downloads_to_break > 0:
            self.hub.downloads_to_break -= 1
            headers |= {"Content-Length": str(len(body)), "Connection": "close"}
            body = body[: len(body) // 2]
        return _Response(body, headers=headers)
