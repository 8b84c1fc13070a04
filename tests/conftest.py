"""Tiny random models, one of each kind, and images for them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.hub_server import HubServer
from PIL import Image

HUB = HubServer()
HUB.take_process()  # before the client is imported, which reads its address then; no test reaches the network

from helpers.models import BUILDERS, Tiny  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil  # noqa: E402

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
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a folder of pictures for each class: all red, all green, ..."""

    def make(name: str, classes: str = "red green", number: int = 5, splits: tuple[str, ...] = ("",)) -> Path:
        for color in classes.split():
            for split in splits:
                folder = tmp_path / name / split / color
                folder.mkdir(parents=True)
                for index in range(number):
                    Image.new("RGB", (20 + index, 16), color).save(folder / f"{index}.png")
        return tmp_path / name

    return make


@pytest.fixture
def used_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[bytes]]]:
    """What the examples with Trainer prepare pictures for, and which ones, in order."""
    from trainer_task import Task  # the tests that use this know where the examples are

    used: list[tuple[str, set[bytes]]] = []

    def recording(purpose: str, prepare: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, rows: Any) -> Any:
            used.append((purpose, {picture.tobytes() for picture in rows["image"]}))
            return prepare(self, rows)

        return call

    for purpose in ("for_training", "for_testing"):
        monkeypatch.setattr(Task, purpose, recording(purpose, getattr(Task, purpose)))
    return used


@pytest.fixture
def launched(tmp_path: Path) -> Callable[..., str]:
    """Runs a script, given as its module, by a launcher, and gives what it printed."""

    def launch(launcher: list[str], script: ModuleType, *options: str) -> str:
        file = Path(str(script.__file__))
        command = [sys.executable, "-m", *launcher, str(file), *options]
        environment = os.environ | {
            "PYTHONPATH": str(file.parents[1]), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"
        }  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return launch
