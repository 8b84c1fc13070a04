"""Fixtures for the examples."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(scope="session", autouse=True)
def _cheap_garbage_collection() -> None:
    """Exempts imported modules from garbage collection, which Trainer runs several times per training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fresh_accelerator_state() -> Iterator[None]:
    """Resets the state that accelerate sets up per process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
