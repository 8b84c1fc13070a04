"""Tiny random models, one of each kind, and images for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from hub_server import HubServer

HUB = HubServer()
HUB.take_process()  # before the client is imported, which reads its address then; no test reaches the network

from tiny import BUILDERS, Tiny  # noqa: E402

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


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """An empty Hub with the user "me"; afterwards, no request may have been unknown to it."""
    HUB.reset()
    HUB.add_user("me", "hf_me")
    yield HUB
    HUB.check()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def new(tiny: Tiny) -> Callable[[], Tiny]:
    """Builds the same model again."""
    return BUILDERS[tiny.name]
