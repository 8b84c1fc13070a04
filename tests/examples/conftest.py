"""Fixtures for the examples."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import digit_sets
import pytest
from accelerate.state import AcceleratorState

NUM_DIGITS = 200  # a tenth of them per class


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    """Resets the state of the process that accelerate sets up."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small dataset of handwritten digits, and one epoch of pretraining."""
    whole = digit_sets.load_digits()
    few = SimpleNamespace(images=whole.images[:NUM_DIGITS], target=whole.target[:NUM_DIGITS])
    monkeypatch.setattr(digit_sets, "load_digits", lambda: few)
    monkeypatch.setattr(digit_sets, "PRETRAINING_EPOCHS", 1)
