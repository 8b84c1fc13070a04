"""The server answers as the adapters do alone, refuses what could harm it, and tells nobody more than it should."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import HubServer
from helpers.served import Adapters, encode, make_adapters, picture
from PIL import Image

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("python_multipart")
httpx = pytest.importorskip("httpx")

from starlette.testclient import TestClient  # noqa: E402

from vpt_peft import ConfigError  # noqa: E402
from vpt_peft.deploy.engine import Engine, QueueFullError  # noqa: E402
from vpt_peft.deploy.server import ServerSettings, create_app, find_adapters, read_tokens  # noqa: E402
from vpt_peft.deploy.server.images import PixelBudget  # noqa: E402
from vpt_peft.images.files import to_rgb  # noqa: E402

Serve = Callable[..., Any]
PREDICT = "/v1/predict"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return make_adapters(tmp_path_factory.mktemp("made"))


@pytest.fixture
def adapters(made: Adapters, tmp_path: Path) -> Adapters:
    """Adapters that a test may change."""
    shutil.copytree(made.folder, tmp_path / "adapters")
    return Adapters(made.model, tmp_path / "adapters")


def make_engine(made: Adapters) -> Engine:
    return Engine(str(made.model), max_wait_ms=0, mixing=True)


@pytest.fixture(scope="module")
def shared_engine(made: Adapters) -> Iterator[Engine]:
    with make_engine(made) as engine:
        yield engine


@pytest.fixture
def engine(made: Adapters, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The engine of all tests, or one for a test that needs its own."""
    if "own_engine" in request.fixturenames:
        with make_engine(made) as engine:
            yield engine
    else:
        yield request.getfixturevalue("shared_engine")


@pytest.fixture
def own_engine() -> None:
    """Gives a test an engine of its own."""


@pytest.fixture
def serve(adapters: Adapters, engine: Engine) -> Iterator[Serve]:
    """Serves the adapters with these settings, and returns a client."""
    with ExitStack() as stack:

        def start(**settings: Any) -> Any:
            app = create_app(engine, find_adapters([str(adapters.folder)]), ServerSettings(**settings))
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield start


def send(client: Any, image: bytes, task: str = "birds", **options: Any) -> Any:
    """Sends an image in a form."""
    return client.post(PREDICT, data={"task": task, **options}, files={"file": ("image.png", image)})


def refused(answer: Any, status: int, code: str) -> str:
    """The message of an answer that must be an error of the known form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"code", "message"} and error["code"] == code
    assert error["message"].endswith((".", "TOKEN")) and "Traceback" not in answer.text
    return str(error["message"])


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["birds", "cars"])
def test_a_form_and_json_are_answered_as_by_the_adapter_alone(task: str, serve: Serve, adapters: Adapters) -> None:
    client, image = serve(), encode(picture())
    expected = adapters.logits(task, picture())
    in_json = {"task": task, "logits": True, "image": base64.b64encode(image).decode()}
    for answer in (send(client, image, task, logits="true"), client.post(PREDICT, json=in_json)):
        assert answer.status_code == 200, answer.text
        values = answer.json()
        assert values["task"] == task
        torch.testing.assert_close(torch.tensor(values["logits"]), expected, atol=1e-5, rtol=0)
        names = {"birds": ["duck", "heron", "swan"], "cars": ["bus", "van"]}[task]
        order = expected.argsort(descending=True).tolist()
        assert [label["label"] for label in values["labels"]] == [names[index] for index in order]
        scores = [label["score"] for label in values["labels"]]
        assert scores == pytest.approx(expected.softmax(-1)[order].tolist(), abs=1e-5)


def test_top_k_cuts_the_labels_and_logits_are_left_out_unless_asked_for(serve: Serve) -> None:
    client, image = serve(), encode(picture())
    whole, best = send(client, image).json(), send(client, image, top_k=1).json()
    assert best["labels"] == whole["labels"][:1] and len(whole["labels"]) == 3
    assert best["logits"] is None


def test_tasks_are_listed_with_the_labels_that_they_have_now(serve: Serve, adapters: Adapters) -> None:
    client = serve()
    tasks = [{"name": "birds", "labels": ["duck", "heron", "swan"]}, {"name": "cars", "labels": ["bus", "van"]}]
    assert client.get("/v1/tasks").json() == {"tasks": tasks}
    adapters.save("cars", ["tram"], seed=2)
    (adapters.folder / "birds" / "adapter_config.json").write_text("{")
    assert client.get("/v1/tasks").json() == {
        "tasks": [{"name": "birds", "labels": None}, {"name": "cars", "labels": ["tram"]}]
    }


def test_an_adapter_that_is_replaced_on_disk_answers_from_then_on(serve: Serve, adapters: Adapters) -> None:
    client, image = serve(), encode(picture())
    before = send(client, image).json()["labels"]
    adapters.save("birds", ["crow", "jay"], seed=5)
    after = send(client, image, logits=True).json()
    torch.testing.assert_close(torch.tensor(after["logits"]), adapters.logits("birds", picture()), atol=1e-5, rtol=0)
    assert {label["label"] for label in after["labels"]} == {"crow", "jay"} and after["labels"] != before


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK"])
def test_images_of_other_modes_are_converted_to_rgb(mode: str, serve: Serve, adapters: Adapters) -> None:
    file = encode(picture(mode), "TIFF" if mode == "CMYK" else "PNG")
    with Image.open(io.BytesIO(file)) as opened:
        assert opened.mode == mode
        expected = adapters.logits("birds", opened)
    answer = send(serve(), file, logits=True)
    torch.testing.assert_close(torch.tensor(answer.json()["logits"]), expected, atol=1e-5, rtol=0)


def test_images_are_turned_upright(serve: Serve, adapters: Adapters) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    file = encode(picture(), "PNG", exif=exif)
    upright = picture().transpose(Image.Transpose.ROTATE_270)
    answer = send(serve(), file, logits=True)
    expected = adapters.logits("birds", upright)
    torch.testing.assert_close(torch.tensor(answer.json()["logits"]), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, adapters.logits("birds", picture()), atol=1e-3)


# -- nothing but the table --------------------------------------------------------------------------------------------

OPENED: list[str] = []
LISTENING = threading.Event()


def note(event: str, arguments: tuple[Any, ...]) -> None:
    if LISTENING.is_set() and event in ("open", "os.listdir", "os.scandir", "glob.glob"):
        OPENED.append(str(arguments[0]))


def test_no_path_of_a_request_reaches_the_file_system(serve: Serve, adapters: Adapters) -> None:
    sys.addaudithook(note)
    client, image, marker = serve(), encode(picture()), "marker-of-this-test"
    target = adapters.folder.parent / marker
    shutil.copytree(adapters.folder / "birds", target)
    names = [str(target), f"../{marker}", f"birds/../../{marker}", f"me/{marker}", f"{marker}@main", f"file://{target}"]
    send(client, image)
    LISTENING.set()
    try:
        for name in names:
            message = refused(send(client, image, name), 404, "unknown_task")
            assert "/v1/tasks" in message
            form = {"data": {"task": "birds"}, "files": {"file": (name, image, f"image/{marker}")}}
            assert client.post(PREDICT, **form).status_code == 200
            text = client.post(PREDICT, json={"task": "birds", "image": name})
            assert "base64" in refused(text, 422, "invalid_request")
            text = client.post(PREDICT, data={"task": "birds"}, files={"file": (None, name)})
            assert "got a text" in refused(text, 422, "invalid_request")
        assert not any(marker in name for name in OPENED)
        (target / "adapter_config.json").read_bytes()
        assert any(marker in name for name in OPENED), "what is opened is noticed"
    finally:
        LISTENING.clear()


def test_an_adapter_behind_a_link_is_that_to_which_the_link_leads_now(
    serve: Serve, engine: Engine, adapters: Adapters
) -> None:
    link = adapters.folder.parent / "current"
    link.symlink_to(adapters.folder / "birds", target_is_directory=True)
    with TestClient(create_app(engine, find_adapters([str(link)]))) as client:
        for task in ("birds", "cars"):
            link.unlink()
            link.symlink_to(adapters.folder / task, target_is_directory=True)
            answer = send(client, encode(picture()), "current", logits="1").json()
            expected = adapters.logits(task, picture())
            torch.testing.assert_close(torch.tensor(answer["logits"]), expected, atol=1e-5, rtol=0)


def test_adapters_of_the_hub_are_downloaded_when_they_are_asked_for(
    hub: HubServer, engine: Engine, adapters: Adapters
) -> None:
    hub.add_repo("me/birds-vpt", adapters.folder / "birds")
    names = ["me/birds-vpt@main", "me/none"]
    with hub.client(), TestClient(create_app(engine, find_adapters(names))) as client:
        labels = [task["labels"] for task in client.get("/v1/tasks").json()["tasks"]]
        assert labels == [None, None] and hub.requests == []
        answer = send(client, encode(picture()), names[0], logits="1").json()
        expected = adapters.logits("birds", picture())
        torch.testing.assert_close(torch.tensor(answer["logits"]), expected, atol=1e-5, rtol=0)
        refused(send(client, encode(picture()), names[1]), 500, "adapter_unavailable")
        labels = [task["labels"] for task in client.get("/v1/tasks").json()["tasks"]]
        assert labels == [["duck", "heron", "swan"], None]


def test_names_of_tasks_come_from_folders_repositories_and_the_operator(adapters: Adapters) -> None:
    folder = adapters.folder
    table = find_adapters([str(folder), f"wagons={folder / 'cars'}", "me/trees", "me/trees@v2", "oaks=me/oaks@main"])
    assert {name: (source.adapter, source.revision) for name, source in table.items()} == {
        "birds": (str(folder / "birds"), None), "cars": (str(folder / "cars"), None),
        "wagons": (str(folder / "cars"), None), "me/trees": ("me/trees", None), "me/trees@v2": ("me/trees", "v2"),
        "oaks": ("me/oaks", "main"),
    }  # fmt: skip
    assert list(find_adapters([str(folder / "birds")])) == ["birds"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least one adapter, got none"),
        (["adapters", "cars=adapters/birds"], "Tasks must have different names, got 'cars'"),
        (["all=adapters"], "is a folder of 2"),
        (["empty"], r"which contains \[notes.txt\]"),
        (["not/a/repository"], "neither an existing folder nor the name of a repository"),
        (["me/trees@"], "neither an existing folder nor the name of a repository"),
        (["=me/trees"], "a name before '='"),
    ],
)
def test_a_table_of_adapters_that_is_not_clear_is_refused(
    sources: list[str], message: str, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapters.folder.parent)
    Path("empty").mkdir()
    Path("empty", "notes.txt").touch()
    with pytest.raises(ValueError, match=message):
        find_adapters(sources)


# -- damaged and hostile images ---------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> bytes:
    """A small file whose header promises many pixels, and whose data keep the promise as far as they go."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10**6))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif_with_a_large_frame(canvas: int, frame: int) -> bytes:
    """A GIF whose first frame is larger than its canvas."""
    file = bytearray(encode(Image.new("P", (canvas, canvas)), "GIF"))
    start = file.index(b"\x2c", 13 + 3 * 2 ** ((file[10] & 7) + 1))
    file[start + 5 : start + 9] = struct.pack("<HH", frame, frame)
    return bytes(file)


def resized(file: bytes, *places: tuple[int, str, int]) -> bytes:
    """A file with other numbers at these places: offset, format of struct, value."""
    changed = bytearray(file)
    for offset, format, value in places:
        struct.pack_into(format, changed, offset, value)
    return bytes(changed)


def tiff_of_size(side: int) -> bytes:
    file = encode(Image.new("L", (8, 8)), "TIFF")
    (start,) = struct.unpack_from("<I", file, 4)
    (count,) = struct.unpack_from("<H", file, start)
    places = []
    for offset in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from("<HH", file, offset)
        if tag in (256, 257):  # width, height
            places.append((offset + 8, "<H" if kind == 3 else "<I", side))
    assert len(places) == 2
    return resized(file, *places)


BOMBS = {
    "png": lambda: png_of_size(60_000, 60_000),
    "png of few more": lambda: png_of_size(1001, 1000),
    "gif": lambda: resized(encode(Image.new("P", (8, 8)), "GIF"), (6, "<H", 65_535), (8, "<H", 65_535)),
    "gif frame": lambda: gif_with_a_large_frame(8, 60_000),
    "tiff": lambda: tiff_of_size(60_000),
    "bmp": lambda: resized(encode(Image.new("RGB", (8, 8)), "BMP"), (18, "<i", 60_000), (22, "<i", 60_000)),
    "webp": lambda: encode(Image.new("RGB", (1200, 1200)), "WEBP"),
    "jpeg": lambda: encode(Image.new("RGB", (1200, 1200)), "JPEG"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_images_with_too_many_pixels_are_refused_before_they_are_decoded(kind: str, serve: Serve) -> None:
    message = refused(send(serve(max_pixels=10**6), BOMBS[kind]()), 413, "image_too_large")
    assert message == "The image must have at most 1,000,000 pixels, got more."


def test_an_image_of_the_largest_size_is_answered(serve: Serve) -> None:
    assert send(serve(max_pixels=600), encode(picture(size=(30, 20)))).status_code == 200


def truncated(kind: str) -> bytes:
    file = encode(picture(size=(200, 200)), kind)
    return file[: len(file) // 2]


NO_IMAGES = {
    "nothing": lambda: b"",
    "text": lambda: b"a photo of a bird",
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "postscript": lambda: encode(picture(), "EPS"),
    "icon": lambda: encode(picture(), "ICO"),
    "truncated png": lambda: truncated("PNG"),
    "truncated jpeg": lambda: truncated("JPEG"),
    "truncated tiff": lambda: truncated("TIFF"),
    "truncated bmp": lambda: truncated("BMP"),
    "truncated webp": lambda: truncated("WEBP"),
    "header of a png": lambda: encode(picture())[:8],
    "png with a bad checksum": lambda: resized(encode(picture()), (29, ">I", 1)),
    "tiff with wild offsets": lambda: resized(encode(picture(), "TIFF"), (4, "<I", 2**32 - 1)),
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_whole_image_is_refused_alone(kind: str, serve: Serve) -> None:
    client = serve()
    refused(send(client, NO_IMAGES[kind]()), 422, "invalid_image")
    assert send(client, encode(picture())).status_code == 200


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_with_more_than_8_bits_are_refused_since_they_would_be_clipped(mode: str, serve: Serve) -> None:
    image = Image.new(mode, (8, 8), 300)
    assert "8 bits" in refused(send(serve(), encode(image, "TIFF")), 422, "invalid_image")


# -- limits of the upload ---------------------------------------------------------------------------------------------


def test_an_upload_that_is_too_large_is_refused_by_its_declared_length(serve: Serve) -> None:
    client = serve(max_upload_bytes=2000)
    refused(send(client, bytes(3000)), 413, "upload_too_large")
    refused(client.post(PREDICT, json={"task": "birds", "image": "A" * 3000}), 413, "upload_too_large")
    assert send(client, encode(picture(size=(4, 4)))).status_code == 200


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json"])
def test_an_upload_without_a_length_is_cut_off_at_the_limit(kind: str, serve: Serve) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while len(sent) < 1000:
            sent.append(1)
            yield bytes(1000)

    client = serve(max_upload_bytes=5000)
    answer = client.post(PREDICT, content=endless(), headers={"Content-Type": kind})
    refused(answer, 413, "upload_too_large")


def test_an_upload_with_a_false_length_is_cut_off_at_the_limit(serve: Serve) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": "10"}
    answer = serve(max_upload_bytes=5000).post(PREDICT, content=b"[" * 6000, headers=headers)
    refused(answer, 413, "upload_too_large")


JSON, FORM = {"Content-Type": "application/json"}, {"Content-Type": "multipart/form-data; boundary=b"}
HALF_FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx'
FIELD = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\nx\r\n--b--\r\n'
OF_NO_TYPE: dict[str, dict[str, Any]] = {
    "no body": {},
    "another type": {"content": b"x", "headers": {"Content-Type": "text/plain"}},
    "a form without files": {"data": {"task": "birds"}},
}
BROKEN: dict[str, dict[str, Any]] = {
    "two files": {"data": {"task": "birds"}, "files": [("file", b"a"), ("file", b"b")]},
    "a long field": {"data": {"task": "b" * 10**5}, "files": {"file": b""}},
    "many fields": {"data": {str(number): "" for number in range(20)}, "files": {"file": b""}},
    "no boundary": {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
    "no parts": {"content": b"xyz", "headers": FORM},
    "odd charset": {"content": FIELD, "headers": {"Content-Type": f"{FORM['Content-Type']}; charset=undefined"}},
}
WRONG: dict[str, dict[str, Any]] = {
    "not json": {"content": b"{", "headers": JSON},
    "deep json": {"content": b"[" * 10**5, "headers": JSON},
    "half a character": {"content": b'{"task": "\\ud800", "image": ""}', "headers": JSON},
    "a list": {"json": []},
    "no image": {"json": {"task": "birds"}},
    "no task": {"json": {"image": ""}},
    "not base64": {"json": {"task": "birds", "image": "?"}},
    "a data url": {"json": {"task": "birds", "image": "data:image/png;base64,AAAA"}},
    "a url": {"json": {"task": "birds", "image": "http://127.0.0.1/a.png"}},
    "unknown field": {"json": {"task": "birds", "image": "", "revision": "x"}},
    "no labels": {"json": {"task": "birds", "image": "", "top_k": 0}},
    "task of another type": {"json": {"task": ["birds"], "image": ""}},
    "file of another name": {"data": {"task": "birds"}, "files": {"image": b""}},
    "text for a number": {"data": {"task": "birds", "top_k": "x"}, "files": {"file": b""}},
    "half a form": {"content": HALF_FORM, "headers": FORM},
}
MALFORMED = {
    **{kind: (request, 415, "unsupported_media_type") for kind, request in OF_NO_TYPE.items()},
    **{kind: (request, 400, "invalid_request") for kind, request in BROKEN.items()},
    **{kind: (request, 422, "invalid_request") for kind, request in WRONG.items()},
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_request_is_told_what_was_expected(kind: str, serve: Serve) -> None:
    request, status, code = MALFORMED[kind]
    refused(serve().post(PREDICT, **request), status, code)


def test_an_upload_that_does_not_arrive_is_given_up(engine: Engine, adapters: Adapters) -> None:
    app = create_app(engine, find_adapters([str(adapters.folder)]), ServerSettings(upload_timeout=0.01))
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": PREDICT, "headers": headers, "query_string": b""}
    sent: list[Any] = []

    async def silence() -> Any:
        await asyncio.Event().wait()

    async def note_sent(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, silence, note_sent))
    assert sent[0]["status"] == 408 and b"within 0.01 seconds" in sent[1]["body"]


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_only_requests_with_one_of_the_tokens_pass(serve: Serve) -> None:
    client, image = serve(tokens=frozenset({"first", "second"})), encode(picture())
    wrong = ["", "Bearer", "Bearer third", "Bearer firs", "Bearer first2", "Basic first", "first", b"Bearer f\xefrst"]
    for path in (PREDICT, "/v1/tasks", "/metrics"):
        call = client.post if path == PREDICT else client.get
        for value in wrong:
            answer = call(path, headers={"Authorization": value} if value else {})
            refused(answer, 401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    for token in ("first", "second"):
        client.headers["Authorization"] = f"Bearer {token}"
        assert send(client, image).status_code == 200
        assert client.get("/v1/tasks").status_code == client.get("/metrics").status_code == 200


def test_health_needs_no_token(serve: Serve) -> None:
    client = serve(tokens=frozenset({"secret"}))
    assert client.get("/healthz").json() == {"status": "ok"} and client.get("/readyz").status_code == 200


def test_tokens_are_read_from_a_file_and_the_environment(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("one\n\n two \n")
    assert read_tokens(tmp_path / "tokens", "three") == {"one", "two", "three"}
    assert read_tokens(None, None) == frozenset()
    (tmp_path / "empty").write_text("\n")
    for file, variable in ((tmp_path / "empty", None), (tmp_path / "missing", None), (None, " ")):
        with pytest.raises(ConfigError):
            read_tokens(file, variable)


def test_settings_must_make_sense_and_do_not_show_tokens() -> None:
    for values in (
        {"max_pixels": 0},
        {"upload_timeout": -1},
        {"tokens": frozenset({"a b"})},
        {"tokens": frozenset({"ü"})},
    ):
        with pytest.raises(ConfigError):
            ServerSettings(**values)  # type: ignore[arg-type]
    assert "secret" not in repr(ServerSettings(tokens=frozenset({"secret"})))


# -- load and failure -------------------------------------------------------------------------------------------------


def test_a_full_queue_and_a_closed_engine_ask_to_try_again(
    own_engine: None, serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, image = serve(), encode(picture())

    def full(*args: Any, **options: Any) -> Any:
        raise QueueFullError("1024 requests are waiting, which is max_queue.")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", full)
        answer = send(client, image)
        refused(answer, 503, "queue_full")
        assert int(answer.headers["Retry-After"]) > 0
    assert send(client, image).status_code == 200
    engine.close()
    answer = send(client, image)
    refused(answer, 503, "shutting_down")
    assert int(answer.headers["Retry-After"]) > 0


def test_after_shutdown_the_app_is_not_ready(serve: Serve, engine: Engine, adapters: Adapters) -> None:
    app = create_app(engine, find_adapters([str(adapters.folder)]))
    with TestClient(app) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
    client = TestClient(app)
    refused(client.get("/readyz"), 503, "shutting_down")
    refused(send(client, encode(picture())), 503, "shutting_down")
    assert client.get("/healthz").status_code == 200


def test_more_requests_than_permitted_are_refused_while_the_others_are_answered(
    engine: Engine, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(engine, find_adapters([str(adapters.folder)]), ServerSettings(max_requests=1))
    submitted, submit, futures = threading.Event(), engine.submit, []

    def hold(*args: Any, **options: Any) -> Future[Any]:
        held: Future[Any] = Future()
        futures.append((held, submit(*args, **options)))
        submitted.set()
        return held

    monkeypatch.setattr(engine, "submit", hold)

    async def run() -> tuple[Any, Any]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            files = {"file": ("image.png", encode(picture()))}
            first = asyncio.create_task(client.post(PREDICT, data={"task": "birds"}, files=files))
            assert await asyncio.to_thread(submitted.wait, 60)
            second = await asyncio.wait_for(client.post(PREDICT, data={"task": "birds"}, files=files), 60)
            held, real = futures[0]
            held.set_result(real.result())
            return await first, second

    first, second = asyncio.run(run())
    assert first.status_code == 200
    refused(second, 503, "queue_full")


def test_other_requests_are_answered_while_an_image_is_decoded(
    engine: Engine, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, goes_on = threading.Event(), threading.Event()

    def slow(image: Image.Image) -> Image.Image:
        decoding.set()
        assert goes_on.wait(60)
        return to_rgb(image)

    monkeypatch.setattr("vpt_peft.deploy.server.images.to_rgb", slow)
    app = create_app(engine, find_adapters([str(adapters.folder)]))

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            files = {"file": ("image.png", encode(picture()))}
            predicting = asyncio.create_task(client.post(PREDICT, data={"task": "birds"}, files=files))
            assert await asyncio.to_thread(decoding.wait, 60)
            assert (await client.get("/healthz")).status_code == 200
            goes_on.set()
            return await predicting

    assert asyncio.run(run()).status_code == 200


def test_images_wait_until_there_is_room_for_their_pixels_and_none_overtakes() -> None:
    async def run() -> None:
        budget, entered, gates = PixelBudget(10), [], [asyncio.Event() for _ in range(4)]

        async def hold(number: int, pixels: int) -> None:
            async with budget.take(pixels):
                entered.append(number)
                await gates[number].wait()

        async def settle() -> list[int]:
            for _ in range(20):
                await asyncio.sleep(0)
            return entered

        tasks = [asyncio.create_task(hold(number, pixels)) for number, pixels in enumerate((4, 4, 8, 1))]
        assert await settle() == [0, 1], "8 do not fit beside 4 and 4, and 1 comes after them"
        gates[0].set()
        assert await settle() == [0, 1]
        tasks[2].cancel()
        assert await settle() == [0, 1, 3], "who gives up makes room"
        for gate in gates:
            gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.free == 10

    asyncio.run(run())


def test_many_large_images_at_once_are_all_answered(engine: Engine, adapters: Adapters) -> None:
    app = create_app(engine, find_adapters([str(adapters.folder)]), ServerSettings(max_pixels=600, decode_workers=4))

    async def run() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            files = [{"file": ("image.png", encode(picture(seed=seed)))} for seed in range(6)]
            calls = [client.post(PREDICT, data={"task": "birds", "logits": "1"}, files=file) for file in files]
            return await asyncio.gather(*calls)

    for seed, answer in enumerate(asyncio.run(run())):
        expected = adapters.logits("birds", picture(seed=seed))
        torch.testing.assert_close(torch.tensor(answer.json()["logits"]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("damage", ["truncated weights", "config", "missing"])
def test_a_damaged_adapter_fails_alone_and_its_path_stays_in_the_log(
    damage: str, serve: Serve, adapters: Adapters, caplog: pytest.LogCaptureFixture
) -> None:
    client, image, folder = serve(), encode(picture()), adapters.folder / "birds"
    weights = folder / "adapter_model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "config":
        (folder / "adapter_config.json").write_text("{")
    else:
        shutil.rmtree(folder)
    message = refused(send(client, image), 500, "adapter_unavailable")
    assert message == "The adapter of the task 'birds' cannot be used; the server's log says why."
    assert "birds" in caplog.text and "cannot be used" in caplog.text
    assert send(client, image, "cars").status_code == 200
    adapters.save("birds", ["duck"])
    assert send(client, image).status_code == 200


def test_an_error_of_the_server_itself_shows_no_traceback(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("in /secret/place")

    monkeypatch.setattr(engine, "submit", fail)
    assert "secret" not in refused(send(serve(), encode(picture())), 500, "internal")


def test_unknown_pages_and_methods_are_errors_of_the_same_form(serve: Serve) -> None:
    client = serve()
    refused(client.get("/v2/predict"), 404, "http_404")
    refused(client.get(PREDICT), 405, "http_405")
    refused(client.get("/v1/../../etc/passwd"), 404, "http_404")


# -- operation --------------------------------------------------------------------------------------------------------


def test_metrics_count_requests_and_tell_the_engines_numbers(own_engine: None, serve: Serve) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    client, image = serve(), encode(picture())
    send(client, image)
    send(client, image)
    send(client, b"")
    send(client, image, "dogs")
    client.get("/unknown-1")
    client.get("/unknown-2")
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    requests = {
        tuple(dict(labels).values()): value
        for (name, *labels), value in values.items()
        if name == "vpt_peft_http_requests_total"
    }
    assert requests == {(PREDICT, "200"): 2, (PREDICT, "422"): 1, (PREDICT, "404"): 1, ("other", "404"): 2}
    assert values["vpt_peft_http_request_seconds_count", ("path", PREDICT)] == 4
    assert values["vpt_peft_engine_accepted_total",] == values["vpt_peft_engine_answered_total",] == 2
    assert values["vpt_peft_engine_hits_total",] == values["vpt_peft_engine_misses_total",] == 1
    assert values["vpt_peft_engine_adapters",] == 1 and values["vpt_peft_engine_queue_length",] == 0
    assert values["vpt_peft_engine_batch_size_total", ("images", "1")] == 2
    assert values["vpt_peft_engine_latency_seconds", ("quantile", "0.5")] > 0


def test_the_openapi_page_describes_both_bodies_and_the_errors(serve: Serve) -> None:
    client = serve(tokens=frozenset({"secret"}))
    assert client.get("/docs").status_code == 200
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {PREDICT, "/v1/tasks", "/healthz", "/readyz", "/metrics"}
    operation = schema["paths"][PREDICT]["post"]
    bodies = operation["requestBody"]["content"]
    assert set(bodies["multipart/form-data"]["schema"]["properties"]) == {"file", "task", "top_k", "logits"}
    assert set(bodies["application/json"]["schema"]["properties"]) == {"image", "task", "top_k", "logits"}
    assert {"200", "401", "404", "413", "422", "503"} <= set(operation["responses"]) and operation["security"]
    assert "secret" not in json.dumps(schema)
