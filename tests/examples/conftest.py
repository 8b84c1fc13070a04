"""Fixtures for the examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import digits
import plots
import pytest
from accelerate.state import AcceleratorState
from trainer_task import Task

NUM_DIGITS = 200  # a tenth of them per class


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
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small dataset of handwritten digits, and one epoch of pretraining."""
    whole = digits.load_digits()
    few = SimpleNamespace(images=whole.images[:NUM_DIGITS], target=whole.target[:NUM_DIGITS])
    monkeypatch.setattr(digits, "load_digits", lambda: few)
    monkeypatch.setattr(digits, "PRETRAINING_EPOCHS", 1)


@pytest.fixture
def used_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[bytes]]]:
    """The purpose of each dataset that the examples with Trainer prepare, in order, with its images."""
    used: list[tuple[str, set[bytes]]] = []

    def recording(purpose: str, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, rows: Any) -> Any:
            used.append((purpose, {image.tobytes() for image in rows["image"]}))
            return prepare(self, rows)

        return call

    for purpose in ("for_training", "for_testing"):
        monkeypatch.setattr(Task, purpose, recording(purpose, getattr(Task, purpose)))
    return used
