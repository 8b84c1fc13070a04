"""Tiny random models, one of each kind, and images for them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import BACKBONE, HubServer
from helpers.torchvision_operators import declare_missing_operators
from PIL import Image

HUB = HubServer()
HUB.take_process()  # before the client is imported, which reads its address then; no test reaches the network
declare_missing_operators()  # before transformers is imported, which imports torchvision where it is installed

from helpers.models import BUILDERS, Tiny  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil  # noqa: E402

from vpt_peft.recipes.command import main  # noqa: E402

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


@pytest.fixture
def online(hub: HubServer, vit: Tiny, tmp_path: Path) -> Iterator[HubServer]:
    """The Hub with a ViT on it, and the client logged in as "me"."""
    vit.model.save_pretrained(tmp_path / "backbone")
    hub.add_repo(BACKBONE, tmp_path / "backbone")
    with hub.client(token="hf_me", cache=tmp_path / "cache"):
        yield hub


@pytest.fixture(scope="session", autouse=True)
def _cheap_garbage_collection() -> None:
    """Exempts imported modules from garbage collection, which accelerate runs several times per training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def new(tiny: Tiny) -> Callable[[], Tiny]:
    """Builds the same model again."""
    return BUILDERS[tiny.name]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny ViT and its image processor."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Creates a folder with one folder of images per class: all red, all green, ..."""

    def make(name: str, classes: str = "red green", number: int = 5, splits: tuple[str, ...] = ("",)) -> Path:
        for color in classes.split():
            for split in splits:
                folder = tmp_path / name / split / color
                folder.mkdir(parents=True)
                for index in range(number):
                    Image.new("RGB", (20 + index, 16), color).save(folder / f"{index}.png")
        return tmp_path / name

    return make


@dataclass(frozen=True)
class Done:
    """A command that has run: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs ``vpt-peft`` with these arguments."""

    def run(*arguments: Any) -> Done:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Callable[..., Done]) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2 and one line, which is returned."""

    def run(*arguments: Any) -> str:
        done = command(*arguments)
        assert done.code == 2, done.out + done.err
        lines = [line for line in done.err.replace("\r", "\n").splitlines() if " error: " in line]
        assert len(lines) == 1, done.err
        assert done.err.splitlines()[-1] == lines[0]
        return lines[0]

    return run
