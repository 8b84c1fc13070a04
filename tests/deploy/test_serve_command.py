"""``vpt-peft serve``: its options, its errors, and its process."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from helpers.served import Adapters, encode, make_adapters, picture

from vpt_peft.recipes import options
from vpt_peft.recipes.command import main, parse

for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
    pytest.importorskip(package)
httpx = pytest.importorskip("httpx")


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    return make_adapters(tmp_path)


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The last line of a command that must fail with exit code 2."""
    assert main(["serve", *map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_what_is_wrong_is_told_before_the_backbone_is_loaded(
    adapters: Adapters, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(options.TOKEN, raising=False)
    served = ["--model", "missing/model", "--adapters", adapters.folder]
    assert "neither an existing folder" in fails(capsys, "--model", "missing/model", "--adapters", tmp_path / "nothing")
    assert "cannot be read" in fails(capsys, *served, "--token-file", tmp_path / "nothing")
    assert "must be auto, cpu or an accelerator" in fails(capsys, *served, "--device", "meow")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"must be a free address here, got 127.0.0.1:{port}" in fails(capsys, *served, "--port", port)
    monkeypatch.setenv(options.TOKEN, "")
    assert "must not be empty" in fails(capsys, *served)


def test_a_backbone_that_cannot_be_loaded_is_told_in_one_line(
    adapters: Adapters, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "--model", adapters.folder, "--adapters", adapters.folder, "--port", 0, "--device", "cpu")
    assert message.startswith("vpt-peft serve: error: The backbone")


@pytest.mark.parametrize("package", ["fastapi", "prometheus_client", "python_multipart", "uvicorn"])
def test_a_missing_package_is_told_with_the_extra_that_has_it(
    package: str, adapters: Adapters, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ("vpt_peft.deploy.server", "vpt_peft.recipes.commands.serve")
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    message = fails(capsys, "--model", adapters.model, "--adapters", adapters.folder)
    assert message == f"vpt-peft serve: error: this command needs the package {package}: pip install 'vpt-peft[serve]'"


def test_tokens_are_no_option_since_all_users_of_a_machine_see_the_command_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse(["serve", "--model", "m", "--adapters", "a", "--token", "secret"])
    assert "unknown argument --token, did you mean --token-file?" in capsys.readouterr().err


# -- the process ------------------------------------------------------------------------------------------------------

Server = Callable[..., Any]


@pytest.fixture
def start(adapters: Adapters) -> Iterator[Server]:
    """Starts the server in a process, and returns it with a client."""
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: Any, **environment: str) -> tuple[subprocess.Popen[str], Any]:
        command = [sys.executable, "-m", "vpt_peft", "serve", "--model", adapters.model, "--adapters", adapters.folder]
        process = subprocess.Popen(
            [*map(str, command), "--port", "0", "--device", "cpu", *map(str, arguments)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        processes.append(process)
        assert process.stderr is not None
        address = None
        while address is None:
            line = process.stderr.readline()
            assert line, "the server has ended"
            address = re.search(r"2 tasks at (http://\S+),", line)
        client = httpx.Client(
            base_url=address[1], timeout=60, transport=httpx.HTTPTransport(retries=5), trust_env=False
        )
        return process, client

    yield run
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.heavy
def test_the_server_answers_until_it_is_stopped(start: Server, adapters: Adapters) -> None:
    process, client = start(VPT_PEFT_TOKEN="secret")
    image = {"file": ("image.png", encode(picture()))}
    assert client.get("/healthz").status_code == 200
    assert client.post("/v1/predict", data={"task": "birds"}, files=image).status_code == 401
    client.headers["Authorization"] = "Bearer secret"
    answer = client.post("/v1/predict", data={"task": "birds", "logits": "1"}, files=image).json()
    assert answer["logits"] == pytest.approx(adapters.logits("birds", picture()).tolist(), abs=1e-5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.heavy
def test_an_upload_without_end_is_answered_and_others_go_on(start: Server) -> None:
    _, client = start("--max-upload-mb", 1)

    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield bytes(2**16)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    try:
        answer = client.post("/v1/predict", content=endless(), headers=headers)
    except httpx.WriteError:  # the connection is closed while it is sent
        pass
    else:
        assert answer.status_code in (400, 413)
    image = {"file": ("image.png", encode(picture()))}
    assert client.post("/v1/predict", data={"task": "birds"}, files=image).status_code == 200


@pytest.mark.heavy
def test_a_stopped_server_answers_what_it_has_accepted(start: Server) -> None:
    process, client = start("--max-wait-ms", 1500)
    image = {"file": ("image.png", encode(picture()))}
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(client.post, "/v1/predict", data={"task": "birds"}, files=image) for _ in range(4)]
        while "\nvpt_peft_engine_accepted_total 4.0\n" not in client.get("/metrics").text:
            assert not all(call.done() for call in calls)
        process.send_signal(signal.SIGTERM)
        assert [call.result().status_code for call in calls] == [200] * 4
    assert process.wait(60) == 0
