"""HTTP for the tests' Hub: requests, responses, which of its functions answers what, and the servers."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repo import HubError, Repo

if TYPE_CHECKING:
    from hub_server import HubServer


class User(NamedTuple):
    name: str
    role: str  # read or write


@dataclass
class Request:
    """What a client asks. ``path`` is still quoted, ``parts`` are the unquoted parts of it that the route names."""

    hub: HubServer
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def user(self) -> User | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme and token not in self.hub.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.users.get(token)

    @property
    def repo(self) -> Repo:
        """The repository, if the user may see it. Others learn no more of it than of one that does not exist."""
        kind, id = self.parts.get("kind", "models"), self.parts["id"]
        repo = self.hub.repos.get(id if kind == "models" else f"{kind}/{id}")
        if repo is None or (repo.private and (self.user is None or self.user.name != repo.owner)):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        return repo

    @property
    def revision(self) -> str:
        return self.parts.get("revision", "main")

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    def require_user(self) -> User:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def require_write(self, owner: str) -> User:
        user = self.require_user()
        if user.name != owner or user.role != "write":
            raise HubError(403, f"You don't have the rights to write to the namespace {owner}")
        return user


@dataclass
class Response:
    """``cut_at`` is the number of bytes of the body after which the connection breaks; None is never."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None

    @classmethod
    def of(cls, value: object, status: int = 200) -> Response:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    @classmethod
    def refusal(cls, error: HubError) -> Response:
        """What the client makes an exception of."""
        response = cls.of({"error": error.message, **error.fields}, error.status)
        response.headers |= {"X-Error-Message": error.message, **error.headers}
        if error.code:
            response.headers["X-Error-Code"] = error.code
        return response


class Routes:
    """Which function answers to which methods and paths."""

    def __init__(self) -> None:
        self._routes: list[tuple[list[str], re.Pattern[str], Callable[[Request], object]]] = []

    def __call__(self, methods: str, pattern: str) -> Callable[[Callable[[Request], object]], Callable]:
        def register(function: Callable[[Request], object]) -> Callable[[Request], object]:
            self._routes.append((methods.split(), re.compile(pattern), function))
            return function

        return register

    def answer(self, request: Request) -> Response:
        """The response, also where the Hub refuses. What the routes do not know or fail at is a problem: status 501."""
        problem = "there is no such route"
        try:
            _ = request.user  # a bad token is refused everywhere
            for methods, pattern, function in self._routes:
                if request.method in methods and (match := pattern.fullmatch(request.path)):
                    request.parts = {name: unquote(part) for name, part in match.groupdict().items() if part}
                    value = function(request)
                    return value if isinstance(value, Response) else Response.of(value)
        except HubError as error:
            return Response.refusal(error)
        except Exception:
            problem = traceback.format_exc()
        request.hub.problems.append(f"{request.method} {request.path}: {problem}")
        return Response.of({"error": problem}, 501)


class Server(ThreadingHTTPServer):
    """An origin of its own: a name of loopback, and any free port there."""

    daemon_threads = True

    def __init__(self, hub: HubServer, routes: Routes, host: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.routes = hub, routes
        self.url = f"http://{host}:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may go away, and some are killed
            self.hub.problems.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together
    disable_nagle_algorithm = True

    def _respond(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        length = int(self.headers.get("Content-Length", 0))
        with hub.lock:
            hub.requests.append((self.command, url.path))
            broken = self.command == "PUT" and hub.breaks("PUT")
        body = self.rfile.read(length // 2 if broken else length)
        if broken:
            self.close_connection = True
            return
        with hub.lock:
            request = Request(hub, self.command, url.path, parse_qs(url.query), self.headers, body)
            response = self.server.routes.answer(request)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: response.cut_at])
        self.close_connection |= response.cut_at is not None

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the hub keeps the requests."""
