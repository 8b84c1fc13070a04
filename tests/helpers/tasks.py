"""Adapters of different tasks, and batches that mix them."""

from __future__ import annotations

from typing import Any

TASKS: dict[str, tuple[dict[str, Any], int]] = {
    "deep": ({"num_tokens": 3}, 7),
    "long": ({"num_tokens": 6, "projection_dim": 5}, 3),
    "shallow": ({"num_tokens": 4, "deep": False}, 5),
    "pooled": ({"num_tokens": 2, "pooling": "global"}, 2),
    "tokens": ({"num_tokens": 3, "route": "tokens"}, 7),
    "gaps": ({"num_tokens": 3, "layers_to_transform": [1, 3], "carry": False}, 4),
    "linear": ({"num_tokens": 0}, 6),
    "prefix": ({"num_tokens": 4, "kind": "prefix"}, 4),
    "prefixes": ({"num_tokens": 2, "kind": "prefix", "layers_to_transform": [1, 2], "projection_dim": 5}, 7),
    "bitfit": ({"num_tokens": 0, "bias": "all"}, 5),
    "biased": ({"num_tokens": 3, "kind": "prefix", "bias": "all"}, 3),
    "biased_shallow": ({"num_tokens": 3, "deep": False, "bias": "all", "pooling": "global"}, 7),
}


MIXES = [
    ["deep", "deep", "deep", "deep"],
    ["deep", "long", "deep", "__base__"],
    ["shallow", "deep", "shallow", "long"],
    ["pooled", "shallow", "gaps", "tokens"],
    ["linear", "gaps", "linear", "pooled"],
    ["__base__", "linear", "__base__", "__base__"],
    ["tokens", "tokens", "deep", "deep"],
    ["prefix", "prefixes", "prefix", "deep"],
    ["prefix", "prefix", "__base__", "prefix"],
    ["shallow", "prefix", "pooled", "prefixes"],
    ["bitfit", "__base__", "deep", "bitfit"],
    ["biased", "biased_shallow", "bitfit", "prefix"],
    ["shallow", "biased_shallow", "pooled", "biased"],
]
