"""Models with several adapters."""

from __future__ import annotations

import pytest
import torch
from helpers.models import Tiny, move
from helpers.tasks import TASKS

from vpt_peft import PromptConfig, VPTModel, get_vpt_model


@pytest.fixture
def many(tiny: Tiny) -> VPTModel:
    """An adapter of every kind."""
    torch.manual_seed(1)
    (first, (config, _)), *others = TASKS.items()
    vpt = get_vpt_model(tiny.model, PromptConfig(**config), adapter_name=first)
    for name, (config, num_labels) in others:
        vpt.add_adapter(name, PromptConfig(**config), num_labels=num_labels)
    for adapter in vpt.adapters.values():
        move(adapter.prefix, adapter.bias)
    return vpt
