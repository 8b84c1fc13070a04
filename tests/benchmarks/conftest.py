"""Fixtures for the benchmarks."""

from __future__ import annotations

from types import SimpleNamespace

import digit_sets
import pytest

NUM_DIGITS = 200  # a tenth of them per class


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small dataset of handwritten digits, and one epoch of pretraining."""
    whole = digit_sets.load_digits()
    few = SimpleNamespace(images=whole.images[:NUM_DIGITS], target=whole.target[:NUM_DIGITS])
    monkeypatch.setattr(digit_sets, "load_digits", lambda: few)
    monkeypatch.setattr(digit_sets, "PRETRAINING_EPOCHS", 1)
