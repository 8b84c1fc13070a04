"""Tiny random models, one of each kind, and images for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import BUILDERS, Tiny

logging.getLogger("transformers").setLevel(logging.ERROR)


@pytest.fixture(params=list(BUILDERS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A classifier of each supported family, with images."""
    return BUILDERS[request.param]()


@pytest.fixture
def vit() -> Tiny:
    return BUILDERS["vit"]()


@pytest.fixture
def swin() -> Tiny:
    return BUILDERS["swin"]()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def new(tiny: Tiny) -> Callable[[], Tiny]:
    """Builds the same model again."""
    return BUILDERS[tiny.name]
