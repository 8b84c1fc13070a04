"""Adapters of every kind, and what an adapter must leave unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from helpers.models import Tiny

CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"deep": False},
    "first_layers_carried": {"layers_to_transform": [0, 1]},
    "last_layers": {"layers_to_transform": [2, 3]},
    "not_carried": {"layers_to_transform": [0, 2], "carry": False},
    "projected": {"projection_dim": 6},
    "shared": {"shared": True, "projection_dim": 6},
    "pools_image": {"pooling": "image"},
    "pools_prompts": {"pooling": "prompt"},
    "pools_all": {"deep": False, "pooling": "global"},
    "biases": {"bias": "all"},
    "modules": {"modules_to_save": ["layernorm"]},
    "bitfit": {"num_tokens": 0, "bias": "all"},
    "linear": {"num_tokens": 0},
    "prefix": {"kind": "prefix"},
    "prefix_projected": {"kind": "prefix", "shared": True, "projection_dim": 6},
    "prefix_in_some_layers": {"kind": "prefix", "layers_to_transform": [1, 3], "pooling": "image"},
    "prefix_and_biases": {"kind": "prefix", "bias": "all"},
}


def on_backbones(configs: dict[str, dict[str, Any]], everywhere: tuple[str, ...]) -> Any:
    """Parametrizes a test with ``tiny`` and ``config``: all configs on ViT, and some on the other backbones."""
    cases = [("vit", name) for name in configs] + [(kind, name) for kind in ("swin", "beit") for name in everywhere]
    parameters = [pytest.param(kind, configs[name], id=f"{kind}-{name}") for kind, name in cases]
    return pytest.mark.parametrize(("tiny", "config"), parameters, indirect=["tiny"])


each_config = on_backbones(
    CONFIGS, ("deep", "shallow", "not_carried", "projected", "pools_all", "biases", "modules", "prefix")
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an adapter could leave changed."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "buffers": {name: tensor.clone() for name, tensor in model.named_buffers()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "attributes": {
            name: {key: id(value) for key, value in vars(module).items() if key in ("config", "forward")}
            for name, module in model.named_modules()
        },
        "hooks": {
            name: sum(len(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict))
            for name, module in model.named_modules()
        },
        "types": {name: type(module) for name, module in model.named_modules()},
    }  # fmt: skip


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for kind in before:
        if kind in ("state", "buffers"):
            assert before[kind].keys() == after[kind].keys()
            for name in before[kind]:
                assert torch.equal(before[kind][name], after[kind][name]), name
        else:
            assert before[kind] == after[kind], kind


def train_a_little(vpt: Any, tiny: Tiny) -> None:
    optimizer = torch.optim.SGD([p for p in vpt.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
