"""The command ``vpt-peft`` in this process, on tiny models and images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from vpt_peft.recipes.data import digits
from vpt_peft.recipes.report import plots
from vpt_peft.recipes.training import pretraining
from vpt_peft.recipes.training.task import Task

NUM_DIGITS = 200  # a tenth of them per class


Command = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    """Resets the state of the process that accelerate sets up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _empty_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces plots by empty files, since rendering is slow, except in tests that use ``rendered_plots``."""
    if "rendered_plots" not in request.fixturenames:
        monkeypatch.setattr(plots, "_save", lambda figure, path: path.touch())


@pytest.fixture
def rendered_plots() -> None:
    """Plots are rendered in this test."""


@pytest.fixture
def train(command: Command, checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Command:
    """Runs ``vpt-peft train`` for one epoch with a tiny ViT on colored images, into the folder "out"."""
    image_folder("colors", "red green blue", splits=("train", "test"))

    def run(*options: Any, output: str = "out", epochs: int = 1, model: Path = checkpoint, ok: bool = True) -> Any:
        data = ["--model", model, "--data", tmp_path / "colors", "--epochs", epochs, "--output", tmp_path / output]
        done = command("train", *data, *options)
        assert done.code == 0 or not ok, done.err
        return done

    return run


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small dataset of handwritten digits and scenes, and one epoch of pretraining."""
    whole = digits.load_digits()
    few = SimpleNamespace(images=whole.images[:NUM_DIGITS], target=whole.target[:NUM_DIGITS])
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    monkeypatch.setattr(digits, "SCENES", 4)
    monkeypatch.setattr(digits, "PRETRAINING_SCENES", 4)
    monkeypatch.setattr(pretraining, "EPOCHS", 1)
    monkeypatch.setattr(pretraining, "SEGMENTATION_EPOCHS", 1)


@pytest.fixture
def used_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[bytes]]]:
    """The purpose of each dataset that is prepared, in order, with its images."""
    used: list[tuple[str, set[bytes]]] = []

    def recording(purpose: str, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, rows: Any) -> Any:
            used.append((purpose, {image.tobytes() for image in rows["image"]}))
            return prepare(self, rows)

        return call

    for purpose in ("for_training", "for_testing"):
        monkeypatch.setattr(Task, purpose, recording(purpose, getattr(Task, purpose)))
    return used
