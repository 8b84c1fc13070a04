"""A small Hugging Face Hub on loopback, for tests with the real client and without a network.

    with HubServer() as hub:
        hub.add_user("me", "hf_me")
        hub.run('''
            from huggingface_hub import create_repo, upload_folder
            create_repo("me/birds", private=True)
            upload_folder(repo_id="me/birds", folder_path=folder, allow_patterns=["*.json", "*.safetensors"])
        ''', token="hf_me", folder=folder)
        assert "adapter_config.json" in hub.repo("me/birds").files()

The client reads most of its settings when it is imported. So it runs in a process of its own, as here, or else a
process takes a Hub before it imports the client, and keeps it:

    hub = HubServer()
    hub.take_process()
    with hub.client(token="hf_me"):
        model.push_to_hub("me/birds")
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from hub_http import Server, User
from hub_repo import Repo
from hub_routes import hub_route, storage_route

TESTS = Path(__file__).parent
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
RUNNER = """
import json, sys, traceback
task, report = json.load(sys.stdin), {}
scope = {"__name__": "__snippet__", **task["variables"]}
try:
    exec(compile(task["code"], "<snippet>", "exec"), scope)
    report["result"] = scope.get("result")
except BaseException as error:
    traceback.print_exc()
    report = {"names": [cls.__name__ for cls in type(error).__mro__], "message": str(error)}
with open(sys.argv[1], "w") as file:
    json.dump(report, file, default=str)
"""


class ClientError(Exception):
    """What a snippet raised: ``names`` are those of its class and of the classes above, ``message`` is its text."""

    def __init__(self, names: list[str], message: str) -> None:
        super().__init__(f"{names[0]}: {message}")
        self.names, self.message = names, message


class HubServer:
    """A Hub with its large-file storage, as two servers on ports of their own.

    Attributes:
        url: the Hub's address.
        repos: repositories by their place in addresses: ``"me/birds"``, ``"datasets/me/photos"``.
        requests: (method, path without query, still quoted) of all requests so far, in the order of their arrival;
            paths in the storage begin with ``/lfs``.
        problems: requests that this Hub could not answer. Leaving the ``with`` block raises when there are any.
        card_errors: what to refuse the metadata of every model card with.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        # Clients before 2.0 tell the storage from the Hub by its host, whatever the port.
        self._servers = [Server(self, hub_route, "127.0.0.1"), Server(self, storage_route, "localhost")]
        self.url, self.lfs_url = self._servers[0].url, f"{self._servers[1].url}/lfs"
        self._folder = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        self.reset()
        for server in self._servers:
            threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()

    def reset(self) -> None:
        """Forgets users, repositories and requests."""
        self.users: dict[str, User] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.problems: list[str] = []
        self.card_errors: list[str] = []
        self._breaks = {"GET": 0, "PUT": 0}
        self._kept, self._part = 0.5, ""

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._folder.cleanup()
        if exception[0] is None:
            self.check()

    def check(self) -> None:
        """Raises AssertionError when something was asked that this Hub does not know, or that it failed at."""
        assert not self.problems, "the test's Hub could not answer:\n" + "\n".join(self.problems)

    # What tests set up and look at

    def add_user(self, name: str, token: str, role: str = "write") -> None:
        """A user who owns the repositories ``name/…``; a token's role is read or write."""
        self.users[token] = User(name, role)

    def add_repo(self, id: str, files: Mapping[str, bytes] | Path | None = None, private: bool = False) -> Repo:
        """A model repository that is there already, with some contents by path, or with the files of a folder."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repo = self.repos[id] = Repo("models", id, private)
        if files:
            repo.put(files)
        return repo

    def repo(self, id: str) -> Repo:
        return self.repos[id]

    def set_gated(self, id: str, *granted: str) -> None:
        """Lets nobody but the owner and the users named here download files, from now on."""
        self.repos[id].gated, self.repos[id].granted = True, set(granted)

    def break_downloads(self, count: int, kept: float = 0.5, part: str = "") -> None:
        """Breaks off the next downloads of paths with ``part`` in them, after a share of what each would send."""
        self._breaks["GET"], self._kept, self._part = count, kept, part

    def break_uploads(self, count: int) -> None:
        """Breaks off the next uploads of large files, half way."""
        self._breaks["PUT"] = count

    def count(self, method: str, part: str = "") -> int:
        """How many requests came with a method and with this in their path."""
        return sum(seen == method and part in path for seen, path in self.requests)

    # The client

    def environment(self, token: str | None = None, cache: Path | str | None = None) -> dict[str, str]:
        """``os.environ`` for a client of this Hub: one that asks nobody else, with an empty cache if none is given."""
        home = tempfile.mkdtemp(dir=self._folder.name)
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(FOREIGN)}
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": home,
            "HF_HUB_CACHE": str(cache or Path(home, "hub")),
            "HF_HUB_DISABLE_XET": "1",  # where hf_xet is installed, large files would go another way
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return {**kept, **ours, **({"HF_TOKEN": token} if token else {})}

    def take_process(self) -> None:
        """Makes this process a client of this Hub for good, which it can do before it imports the client."""
        assert "huggingface_hub" not in sys.modules, "the client is imported already, and has read its settings"
        environment = self.environment()
        os.environ.clear()
        os.environ.update(environment)

    @contextmanager
    def client(
        self, token: str | None = None, cache: Path | str | None = None, offline: bool = False
    ) -> Iterator[None]:
        """Sets the user's token, the cache (by default a new one) and offline, in a process that this Hub took."""
        from huggingface_hub import constants

        assert self.url == constants.ENDPOINT, f"expected a client of {self.url}, got one of {constants.ENDPOINT}"
        cache = str(cache or tempfile.mkdtemp(dir=self._folder.name))
        with mock.patch.multiple(constants, HF_HUB_CACHE=cache, HF_HUB_OFFLINE=offline), mock.patch.dict(os.environ):
            os.environ.pop("HF_TOKEN", None)
            os.environ.update({"HF_TOKEN": token} if token else {})
            yield

    def run(
        self,
        code: str | Callable[..., Any],
        *,
        token: str | None = None,
        cache: Path | str | None = None,
        offline: bool = False,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        **variables: Any,
    ) -> Any:
        """Runs a snippet in a new process, and gives what it calls ``result``, after a way through JSON.

        Args:
            code: the snippet, or a function that is called and that uses nothing from around it.
            token: the user's; none is nobody's.
            cache: the folder of the client's cache, a new one by default.
            offline: as with ``HF_HUB_OFFLINE``.
            env: more variables of the environment.
            variables: names that the snippet finds, or the function's arguments; a path becomes a string.

        Raises:
            ClientError: what the snippet raised.
        """
        if not isinstance(code, str):
            call = f"result = {code.__name__}({', '.join(f'{name}={name}' for name in variables)})"
            code = f"from __future__ import annotations\n{textwrap.dedent(inspect.getsource(code))}\n{call}"
        environment = {**self.environment(token, cache), "HF_HUB_OFFLINE": str(int(offline)), **(env or {})}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        report = Path(tempfile.mkdtemp(dir=self._folder.name), "report.json")
        task = json.dumps({"code": textwrap.dedent(code), "variables": variables}, default=str)
        command = [sys.executable, "-c", RUNNER, str(report)]
        ran = subprocess.run(command, input=task, env=environment, capture_output=True, text=True, timeout=timeout)
        print(ran.stdout + ran.stderr, end="")  # pytest shows it when the test fails
        told = json.loads(report.read_text()) if report.exists() else {"names": ["Died"], "message": ran.stderr}
        if "names" in told:
            raise ClientError(**told)
        return told["result"]

    # What the servers' threads call

    def cut(self, path: str, size: int) -> int | None:
        """After how many bytes of a download to break off, if at all."""
        return int(size * self._kept) if self._part in path and self.breaks("GET") else None

    def breaks(self, method: str) -> bool:
        """Whether this is one of the transfers that the test wants to be broken."""
        broken = self._breaks[method] > 0
        self._breaks[method] -= broken
        return broken
