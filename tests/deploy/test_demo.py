"""The page of ``vpt-peft demo``: what it shows, asked by Gradio's client and read in a headless browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from helpers.families import enlarge
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessorPil

from vpt_peft import AdapterError, CheckpointError, PromptConfig, VPTModel, get_vpt_model

pytest.importorskip("matplotlib")
gradio = pytest.importorskip("gradio")
from vpt_peft.deploy import demo  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = "<img src=x onerror=document.title='taken'>"
TEXTS = "return [...document.querySelectorAll(arguments[0])].map(element => element.innerText)"
PATIENCE = 120  # seconds until a browser gives up
Save = Callable[..., Path]


@pytest.fixture
def save(checkpoint: Path, tmp_path: Path) -> Save:
    """Saves an adapter of the tiny checkpoint, with an image processor of its own."""

    def make(name: str, labels: str = "red green", mean: float = 0.5, problem_type: str | None = None, **config: Any):
        names = labels.split("|") if "|" in labels else labels.split()
        model = ViTForImageClassification.from_pretrained(
            checkpoint, num_labels=len(names), ignore_mismatched_sizes=True, problem_type=problem_type,
            id2label=dict(enumerate(names)), label2id={label: index for index, label in enumerate(names)},
        )  # fmt: skip
        vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=2, **config)).eval())
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[mean] * 3)
        vpt.save_pretrained(tmp_path / name, image_processor=processor)
        return tmp_path / name

    return make


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """An image of random colours, which lies on its side until it is turned."""
    pixels = torch.randint(256, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    image = Image.fromarray(pixels.numpy())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves a page at a free port, until the test ends."""
    pages = []

    def start(tasks: demo.Tasks, **options: Any) -> str:
        pages.append(demo.build_page(tasks, **options))
        return demo.launch(pages[-1], port=None)

    yield start
    for page in pages:
        page.close(verbose=False)


def expected(
    adapter: Path, checkpoint: Path, photo: Path, mean: float = 0.5, regression: bool = False
) -> dict[str, float]:
    """The probability or value of each label, by the library alone."""
    vpt = VPTModel.from_pretrained(ViTForImageClassification.from_pretrained(checkpoint), adapter)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[mean] * 3)
    upright = Image.open(photo).transpose(Image.Transpose.ROTATE_270)
    with torch.no_grad():
        logits = vpt(**processor(upright, return_tensors="pt")).logits[0]
    scores = logits if regression else logits.softmax(-1)
    return {vpt.config.id2label[index]: score for index, score in enumerate(scores.tolist())}


def read(page: str) -> dict[str, list[tuple[str, str]]]:
    """The labels and scores that a page shows for each task."""
    cards = re.findall(r"<section.*?<h2>(.*?)</h2>(.*?)</section>", page, flags=re.DOTALL)
    row = r'<span class="vpt-label">(.*?)</span>.*?<span class="vpt-score">(.*?)</span>'
    return {html.unescape(name): [(html.unescape(a), b) for a, b in re.findall(row, body)] for name, body in cards}


def shown(scores: dict[str, float]) -> list[tuple[str, str]]:
    """How a page shows probabilities."""
    return [(label, f"{100 * scores[label]:.1f} %") for label in sorted(scores, key=lambda name: -scores[name])]


def last(tasks: demo.Tasks, file: Path | None, names: list[str], attention: bool = False) -> str:
    """What the page shows in the end."""
    return list(demo.describe(tasks, None if file is None else str(file), names, attention))[-1]


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_each_task_shows_its_labels_by_its_own_image_processor(save: Save, checkpoint: Path, photo: Path) -> None:
    colors, tones = save("colors"), save("tones", "black grey white", mean=0.1, kind="prefix")
    tasks = demo.Tasks([colors, tones])
    assert read(last(tasks, photo, ["tones", "colors"])) == {
        "tones": shown(expected(tones, checkpoint, photo, 0.1)), "colors": shown(expected(colors, checkpoint, photo)),
    }  # fmt: skip


def test_labels_come_first_and_the_pictures_of_the_attention_one_after_the_other(save: Save, photo: Path) -> None:
    tasks = demo.Tasks([save("colors"), save("tones", "black white", kind="prefix")])
    pages = list(demo.describe(tasks, str(photo), ["colors", "tones"], True))
    assert [page.count("data:image/png;base64,") for page in pages] == [0, 1, 2]
    assert [page.count("Drawing the attention") for page in pages] == [2, 1, 0]
    assert all(read(page) == read(pages[0]) for page in pages)
    pictures = re.findall(r'src="(data:.*?)"', pages[-1])
    assert pictures[0] != pictures[1], "each adapter has its own attention"


def test_labels_and_names_are_escaped(save: Save, photo: Path) -> None:
    tasks = demo.Tasks([save("a&b", f"{HOSTILE}|harmless")])
    page = last(tasks, photo, ["a&b"])
    assert HOSTILE not in page and HOSTILE in {label for label, _ in read(page)["a&b"]}


def test_a_regression_shows_values_without_bars(save: Save, checkpoint: Path, photo: Path) -> None:
    adapter = save("age", "years months", problem_type="regression")
    page = last(demo.Tasks([adapter]), photo, ["age"])
    values = expected(adapter, checkpoint, photo, regression=True)
    assert dict(read(page)["age"]) == {label: f"{value:.4g}" for label, value in values.items()}
    assert "vpt-bar" not in page


def test_without_an_image_or_a_task_the_page_says_what_to_do(save: Save, photo: Path) -> None:
    tasks = demo.Tasks([save("colors")])
    assert "Drop an image" in last(tasks, None, ["colors"])
    assert "Choose a task" in last(tasks, photo, [])


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("text.png", lambda file: file.write_text("no image"), "text.png cannot be read as an image. Choose a file of"),
        ("cut.png", lambda file: file.write_bytes(file.with_name("photo.png").read_bytes()[:200]), "cut.png cannot be"),
        ("a.eps", lambda file: Image.new("RGB", (4, 4)).save(file), "a.eps cannot be read as an image"),
        (
            "deep.png",
            lambda file: Image.new("I;16", (9, 9)).save(file),
            "deep.png cannot be used: images must have 8 bits",
        ),
    ],
)
def test_images_that_cannot_be_used_are_told_in_a_sentence(
    name: str, write: Callable[[Path], Any], message: str, save: Save, photo: Path, tmp_path: Path
) -> None:
    write(tmp_path / name)
    page = html.unescape(last(demo.Tasks([save("colors")]), tmp_path / name, ["colors"], True))
    assert message in page and str(tmp_path) not in page and not read(page)


def test_images_with_too_many_pixels_are_not_decoded(save: Save, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    assert "photo.png has too many pixels" in last(demo.Tasks([save("colors")]), photo, ["colors"])


def test_labels_stay_where_the_attention_cannot_be_drawn(
    save: Save, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AdapterError("its attention <cannot> be recorded")

    monkeypatch.setattr(demo, "explain", fail)
    page = last(demo.Tasks([save("colors")]), photo, ["colors"], True)
    assert "The attention cannot be drawn: its attention &lt;cannot&gt; be recorded" in page
    assert len(read(page)["colors"]) == 2 and "Drawing" not in page


def test_the_backbone_may_be_given_and_must_fit(save: Save, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    adapter = save("colors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/not/here"}))
    with pytest.raises(CheckpointError, match="/not/here"):
        demo.Tasks([adapter])
    tasks = demo.Tasks([adapter], str(checkpoint))
    assert read(last(tasks, photo, ["colors"]))["colors"] == shown(expected(adapter, checkpoint, photo))


def test_the_same_adapter_twice_is_refused(save: Save) -> None:
    adapter = save("colors")
    with pytest.raises(AdapterError, match="adapters must be different"):
        demo.Tasks([adapter, adapter])


# -- the server -------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_a_client_gets_the_labels(serve: Callable[..., str], save: Save, checkpoint: Path, photo: Path) -> None:
    client = pytest.importorskip("gradio_client")
    adapter = save("colors")
    url = serve(demo.Tasks([adapter]), examples=[photo])
    asked = client.Client(url, verbose=False, analytics_enabled=False)
    page = asked.predict(client.handle_file(photo), ["colors"], True, api_name="/look")
    assert read(page) == {"colors": shown(expected(adapter, checkpoint, photo))}
    assert "data:image/png;base64," in page
    page = asked.predict(None, ["colors"], True, api_name="/look")
    assert "Drop an image" in page
    page = asked.predict(client.handle_file(adapter / "README.md"), ["colors"], True, api_name="/look")
    assert "cannot be read as an image" in page and "/tmp" not in page
    with pytest.raises(Exception, match="not in the list of choices"):
        asked.predict(client.handle_file(photo), ["others"], False, api_name="/look")


@pytest.mark.heavy
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
def test_a_person_drops_an_image_chooses_tasks_and_reads_labels(
    serve: Callable[..., str], save: Save, checkpoint: Path, photo: Path
) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.support.ui import WebDriverWait

    colors, tones = save("colors"), save("tones", f"{HOSTILE}|black|white")
    url = serve(demo.Tasks([colors, tones]))
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def find(selector: str) -> list[Any]:
        return browser.find_elements("css selector", selector)

    def wait(condition: Callable[[], Any]) -> Any:
        return WebDriverWait(browser, PATIENCE).until(lambda _: condition())

    def texts(selector: str) -> list[str]:  # at once: the page may be replaced meanwhile
        return list(browser.execute_script(TEXTS, selector))

    def rows(task: int) -> list[tuple[str, str]]:
        card = f".vpt-card:nth-of-type({task + 1})"
        return list(zip(texts(f"{card} .vpt-label"), texts(f"{card} .vpt-score"), strict=True))

    try:
        browser.get(url)
        wait(lambda: find("#vpt-image input[type=file]"))[0].send_keys(str(photo))
        wait(lambda: len(find(".vpt-picture img")) == 2)
        assert texts(".vpt-card h2") == ["colors", "tones"]
        assert rows(0) == shown(expected(colors, checkpoint, photo))
        assert rows(1) == shown(expected(tones, checkpoint, photo))
        widths = [bar.size["width"] for bar in find(".vpt-bar i")]
        assert widths[0] > widths[1] > 0, "bars are as long as probabilities"
        assert find(".vpt-picture img")[0].get_property("naturalWidth") > 300
        find("#vpt-tasks input")[0].click()
        wait(lambda: texts(".vpt-card h2") == ["tones"])
        assert browser.title == "vpt-peft", "labels are text"
        requested = {urlsplit(address).hostname for address in requests(browser)}
        assert requested <= {"127.0.0.1", None}, "nothing is loaded from elsewhere"
        severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert severe == []
    finally:
        browser.quit()


def requests(browser: Any) -> Iterator[str]:
    """The addresses that a page has asked for."""
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


@pytest.mark.heavy
def test_serving_the_page_asks_no_other_server(
    serve: Callable[..., str], save: Save, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    asked: list[Any] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connecting(self: socket.socket, address: Any) -> Any:
        asked.append(address[0] if isinstance(address, tuple) else address)
        return connect(self, address)

    def resolving(host: Any, *args: Any, **options: Any) -> Any:
        asked.append(host.decode() if isinstance(host, bytes) else host)
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", resolving)
    serve(demo.Tasks([save("colors")]), examples=[photo])
    assert set(asked) <= {"127.0.0.1", "localhost", None}, asked


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_serves_the_page_until_it_is_interrupted(
    save: Save, command: Callable[..., Any], photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def launch(page: Any, host: str, port: int, share: bool) -> str:
        seen.update(page=page, host=host, port=port, share=share)
        monkeypatch.setattr(page, "block_thread", lambda: seen.update(blocked=True))
        return "http://here"

    module = __import__("vpt_peft.recipes.commands.demo", fromlist=["demo"])
    monkeypatch.setattr(module, "launch", launch)
    done = command("demo", save("colors"), save("tones"), "--examples", photo, "--port", 7999, "--device", "cpu")
    assert done.code == 0 and "The page is at http://here" in done.out, done.err
    page = seen.pop("page")
    assert seen == {"host": "127.0.0.1", "port": 7999, "share": False, "blocked": True}
    assert any(getattr(block, "choices", None) == [("colors",) * 2, ("tones",) * 2] for block in page.blocks.values())


def test_what_the_command_cannot_show_is_told_in_one_line(
    save: Save, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = save("colors")
    assert "--examples must be image files, got" in refused("demo", adapter, "--examples", tmp_path / "none.png")
    assert "nowhere" in refused("demo", tmp_path / "nowhere")
    monkeypatch.delitem(sys.modules, "vpt_peft.deploy.demo")
    monkeypatch.delitem(sys.modules, "vpt_peft.recipes.commands.demo", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "needs the package gradio: pip install 'vpt-peft[demo]'" in refused("demo", adapter)
