"""The page of ``vpt-peft demo``: drop an image, choose tasks, see their labels and what their prompts attend to."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock
from typing import Any

import gradio as gr
import torch
from PIL import Image

from .. import hub
from ..auto import AutoVPTModel
from ..errors import AdapterError, VPTError
from ..explanation import explain
from ..images.files import FORMATS, to_rgb
from ..images.processors import load_processor, saved_processor
from ..model import VPTModel
from ..pipelines import pipeline
from .adapters import name_adapters
from .engine.backbone import load_backbone

LABELS = 5  # shown for each task
CHOSEN = 4  # tasks that are chosen at first
MAX_FILE_SIZE = "32mb"
KEPT = 3600  # seconds that uploaded images stay in the temporary folder of Gradio
FONT, MONOSPACE = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # of the system: none is downloaded
CSS = """
.gradio-container { width: 100% !important; max-width: 1320px !important; margin: 0 auto !important; }
.vpt-header .html-container, #vpt-answer .html-container { padding: 0 !important; }
.vpt-header h1 { font-size: 1.6rem; font-weight: 650; line-height: 1.2; margin: 0; }
.vpt-header p, .vpt-card h2, .vpt-note, .vpt-empty { color: var(--body-text-color); opacity: .7; }
.vpt-header p, .vpt-note { margin: .25rem 0 0; }
.vpt-row { flex-wrap: wrap !important; align-items: flex-start !important; gap: 1.5rem !important; }
.vpt-row > .column { min-width: min(320px, 100%) !important; }
.vpt-card { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 1rem 1.25rem;
  background: var(--block-background-fill); }
.vpt-card + .vpt-card { margin-top: 1rem; }
.vpt-card h2 { font-size: 1rem; font-weight: 600; margin: 0 0 .6rem; }
.vpt-labels { list-style: none; margin: 0; padding: 0; }
.vpt-labels li { display: grid; grid-template-columns: minmax(6rem, 12rem) 1fr 4.2rem; gap: .75rem; align-items: center;
  padding: .22rem 0; }
.vpt-labels li:first-child { font-size: 1.25rem; font-weight: 650; }
.vpt-label { overflow-wrap: anywhere; line-height: 1.2; }
.vpt-bar { height: .6rem; border-radius: .3rem; background: var(--border-color-primary); overflow: hidden; }
.vpt-bar i { display: block; height: 100%; border-radius: .3rem; background: #d9822b; opacity: .55; }
.vpt-labels li:first-child .vpt-bar i { opacity: 1; }
.vpt-score { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; font-size: 1rem; }
.vpt-picture { margin: 1rem 0 0; overflow-x: auto; border-radius: 8px; background: white; }
.vpt-picture img { display: block; width: 100%; min-width: 640px; }
.vpt-problem { border-left: 4px solid #c0392b; padding: .5rem .75rem; margin: 0; overflow-wrap: anywhere; }
.vpt-empty { border: 1px dashed currentColor; border-radius: 12px; padding: 3rem 1rem; text-align: center; }
@media (min-width: 800px) { .vpt-row > .column:first-child { position: sticky; top: 1rem; } }
@media (max-width: 500px) {
  .gradio-container .main { padding: .75rem !important; }
  .vpt-card { padding: .75rem; }
  .vpt-labels li { grid-template: "label score" "bar bar" / 1fr auto; gap: .2rem .5rem; }
  .vpt-bar { grid-area: bar; }
}
"""


class Tasks:
    """Adapters for image classification on one backbone, of which one computes at a time.

    Args:
        adapters: folders or Hub repositories.
        model: folder or repository of the backbone; None: the one that the first adapter names.
        device: to compute on.

    Attributes:
        vpt: the model with all of them.
        names: of the adapters, the last parts of their folders or repositories.
        pipelines: by name, each with the image processor of its adapter.
        problem_types: by name, as in ``transformers``.

    Raises:
        VPTError, OSError: an adapter cannot be loaded, or is for another task or backbone.
    """

    def __init__(
        self, adapters: Sequence[str | os.PathLike[str]], model: str | None = None, device: str | torch.device = "cpu"
    ) -> None:
        if isinstance(adapters, str | os.PathLike) or not adapters:
            raise AdapterError(f"adapters must be a list of folders or repositories, got {adapters!r}.")
        self.names = name_adapters(adapters)
        if len(set(self.names)) < len(self.names):
            raise AdapterError(f"adapters must be different, got {', '.join(map(str, adapters))}.")
        self.lock = Lock()
        self.pipelines: dict[str, Any] = {}
        self.problem_types: dict[str, str | None] = {}
        for name, source in zip(self.names, adapters, strict=True):
            with hub.pulled_adapter(source, with_processor=True) as folder:
                if not self.pipelines:
                    self.vpt = _load(folder, name, model)
                else:
                    self.vpt.load_adapter(folder, name)
                self.vpt.set_adapter(name)
                self.problem_types[name] = self.vpt.config.problem_type
                processor = load_processor(self.vpt, saved_processor(folder))
                self.pipelines[name] = pipeline(
                    self.vpt, "image-classification", image_processor=processor, device=device
                )
        self.vpt.train(False)

    def find_labels(self, name: str, image: Image.Image) -> list[dict[str, Any]]:
        """The best labels of an adapter, ``[{"label": "rose", "score": 0.98}, ...]``."""
        with self.lock:
            self.vpt.set_adapter(name)
            return list(self.pipelines[name](image, top_k=LABELS))

    def draw_attention(self, name: str, file: Path) -> bytes:
        """The attention to an image file with an adapter and without, see :func:`vpt_peft.explanation.explain`.

        Returns:
            A PNG file.

        Raises:
            VPTError: the attention of this model or adapter cannot be shown.
        """
        with self.lock, TemporaryDirectory() as folder:
            self.vpt.set_adapter(name)
            picture = Path(folder, "attention.png")
            explain(self.vpt, file, output=picture, image_processor=self.pipelines[name].image_processor)
            return picture.read_bytes()


def _load(folder: Path, name: str, model: str | None) -> VPTModel:
    if model is None:
        return AutoVPTModel.from_pretrained(folder, name, dtype=torch.float32)
    return VPTModel.from_pretrained(load_backbone(model, {"dtype": torch.float32}), folder, name)


# -- the page ---------------------------------------------------------------------------------------------------------


def build_page(tasks: Tasks, examples: Sequence[str | os.PathLike[str]] = ()) -> gr.Blocks:
    """The page.

    Args:
        tasks: the adapters.
        examples: image files to choose from.
    """

    def look(file: str | None, names: Sequence[str], attention: bool) -> Iterator[str]:
        yield from describe(tasks, file, names, attention)

    several = len(tasks.names) > 1
    with gr.Blocks(analytics_enabled=False, title="vpt-peft", delete_cache=(KEPT, KEPT)) as page:
        gr.HTML(_header(tasks), elem_classes="vpt-header", padding=False)
        with gr.Row(elem_classes="vpt-row"):
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    label="Image", sources=["upload", "clipboard", "webcam"], height=320, elem_id="vpt-image"
                )
                setattr(image, "preprocess", _find_file)  # noqa: B010  # Gradio would decode and convert the image
                chosen = gr.CheckboxGroup(
                    tasks.names, value=tasks.names[:CHOSEN], label="Tasks", visible=several, elem_id="vpt-tasks"
                )
                attention = gr.Checkbox(True, label="Draw the attention", elem_id="vpt-attention")
                if examples:
                    gr.Examples([[os.fspath(file)] for file in examples], [image], cache_examples=False)
            with gr.Column(scale=5, min_width=320):
                answer = gr.HTML(_empty("Drop an image to see its labels."), elem_id="vpt-answer", padding=False)
        inputs: list[Any] = [image, chosen, attention]
        gr.on(
            [component.change for component in inputs], look, inputs, answer,
            api_name="look", trigger_mode="always_last", concurrency_limit=1, show_progress="minimal",
        )  # fmt: skip
    return page


def _find_file(upload: Any) -> str | None:
    """The file that was uploaded."""
    return None if upload is None else upload.path


def describe(tasks: Tasks, file: str | None, names: Sequence[str], attention: bool) -> Iterator[str]:
    """What the page shows, in HTML: first the labels of each task, then more and more pictures of the attention.

    Args:
        file: an image file.
        names: of tasks.
        attention: whether to draw the attention.
    """
    if file is None or not names:
        yield _empty("Drop an image to see its labels." if file is None else "Choose a task.")
        return
    try:
        with Image.open(file, formats=FORMATS) as opened:
            image = to_rgb(opened)
    except Exception as error:  # decoders raise errors of many kinds
        yield _problem(_say_unreadable(error, Path(file)))
        return
    bodies: dict[str, str] = {}
    for name in names:
        try:
            bodies[name] = _bars(tasks.find_labels(name, image), tasks.problem_types[name])
        except VPTError as error:
            bodies[name] = _problem(str(error))
    drawing = '<p class="vpt-note">Drawing the attention …</p>' if attention else ""
    yield _cards({name: body + drawing for name, body in bodies.items()})
    if not attention:
        return
    for index, name in enumerate(names):
        try:
            bodies[name] += _picture(tasks.draw_attention(name, Path(file)), name)
        except VPTError as error:
            bodies[name] += f'<p class="vpt-note">The attention cannot be drawn: {html.escape(str(error))}</p>'
        later = set(names[index + 1 :])
        yield _cards({name: body + (drawing if name in later else "") for name, body in bodies.items()})


def launch(page: gr.Blocks, host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> str:
    """Serves the page in threads of its own, until ``page.close()``. It loads nothing from other servers.

    Args:
        page: of :func:`build_page`.
        share: makes the page public by a tunnel through Gradio's servers, from where it loads a program.

    Returns:
        The address; the public one if it is shared.

    Raises:
        OSError: the port is not free.
    """
    _, local, public = page.launch(
        server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, inbrowser=False,
        theme=gr.themes.Default(font=FONT, font_mono=MONOSPACE), css=CSS, footer_links=[], run_history=False,
        enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, max_file_size=MAX_FILE_SIZE,
    )  # fmt: skip
    return public or local


# -- HTML; labels and errors are of others and escaped ----------------------------------------------------------------


def _header(tasks: Tasks) -> str:
    number = f"{len(tasks.names)} tasks" if len(tasks.names) > 1 else f"the task {tasks.names[0]}"
    backbone = os.path.basename(tasks.vpt.name_or_path.rstrip("/\\"))
    return f"<h1>What is in this image?</h1><p>{html.escape(number)} on one frozen {html.escape(backbone)}</p>"


def _empty(text: str) -> str:
    return f'<div class="vpt-empty">{html.escape(text)}</div>'


def _problem(text: str) -> str:
    return f'<p class="vpt-problem" role="alert">{html.escape(text)}</p>'


def _cards(bodies: dict[str, str]) -> str:
    return "".join(
        f'<section class="vpt-card"><h2>{html.escape(name)}</h2>{body}</section>' for name, body in bodies.items()
    )


def _bars(labels: Sequence[dict[str, Any]], problem_type: str | None) -> str:
    """Labels with bars as long as their probabilities; of a regression, values alone."""
    items = []
    for label in labels:
        name, score = html.escape(str(label["label"])), label["score"]
        if problem_type == "regression":
            bar, text = "<span></span>", f"{score:.4g}"
        else:
            bar, text = f'<span class="vpt-bar"><i style="width: {score:.1%}"></i></span>', f"{100 * score:.1f} %"
        items.append(f'<li><span class="vpt-label">{name}</span>{bar}<span class="vpt-score">{text}</span></li>')
    return f'<ol class="vpt-labels">{"".join(items)}</ol>'


def _picture(png: bytes, name: str) -> str:
    alt = html.escape(f"Attention to the image with the prompts of {name} and without")
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<div class="vpt-picture"><img src="{source}" alt="{alt}"></div>'


def _say_unreadable(error: Exception, file: Path) -> str:
    """Why an image cannot be used, without the path of the temporary file."""
    if isinstance(error, VPTError):
        return f"{file.name} cannot be used: {error}."
    if isinstance(error, Image.DecompressionBombError):
        return f"{file.name} has too many pixels. Make it smaller."
    return f"{file.name} cannot be read as an image. Choose a file of one of the formats {', '.join(FORMATS)}."
