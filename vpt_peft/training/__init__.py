"""Optimizers, cached features, and callbacks of transformers' Trainer, which are loaded when they are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .feature_folder import CachedFeatures
from .features import cache_features
from .optimizer import adamw, parameter_groups

if TYPE_CHECKING:
    from .callbacks import PushAdapter

__all__ = ["CachedFeatures", "PushAdapter", "adamw", "cache_features", "parameter_groups"]


def __getattr__(name: str) -> Any:
    if name == "PushAdapter":  # importing Trainer, its base class's home, takes a second
        from .callbacks import PushAdapter

        return PushAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
