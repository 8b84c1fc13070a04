"""Adapters in folders, and their backbones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Tiny, move
from helpers.tasks import TASKS

from vpt_peft import PromptConfig, VPTModel, get_vpt_model

Save = Callable[..., Path]


@pytest.fixture
def fresh(tiny: Tiny, tmp_path: Path) -> Callable[[], Any]:
    """Loads the backbone from a folder."""
    tiny.model.save_pretrained(tmp_path / "backbone")
    return lambda: type(tiny.model).from_pretrained(tmp_path / "backbone")


@pytest.fixture
def fresh_vit(vit: Tiny, tmp_path: Path) -> Callable[[], Any]:
    """Loads a ViT from a folder."""
    vit.model.save_pretrained(tmp_path / "backbone")
    return lambda: type(vit.model).from_pretrained(tmp_path / "backbone")


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any, str], tuple[Path, VPTModel]]:
    """Saves an adapter of a task, and returns its folder and a model with it."""

    def make(model: Any, task: str) -> tuple[Path, VPTModel]:
        config, num_labels = TASKS[task]
        torch.manual_seed(1)
        vpt = get_vpt_model(model, PromptConfig(**config), num_labels=num_labels).eval()
        move(vpt.adapters["default"].prefix, vpt.adapters["default"].bias)
        vpt.save_pretrained(tmp_path / task)
        return tmp_path / task, vpt

    return make
