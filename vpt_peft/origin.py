"""Where an adapter's backbone comes from: found free, remembered by name and revision, and compared again later."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn

from .backbones import Backbone, find_backbone
from .config import PromptConfig
from .errors import AdapterError
from .routes import has_doors


def free_backbone(model: nn.Module) -> Backbone:
    if isinstance(model, nn.Module) and has_doors(model):
        raise AdapterError(
            f"Expected a bare backbone, got {type(model).__name__}, which already carries VPT. Call unload() first."
        )
    return find_backbone(model)


def with_origin(config: PromptConfig, backbone: Backbone) -> PromptConfig:
    """The config with the backbone's name and revision, where the user gave none."""
    if not isinstance(config, PromptConfig):
        raise AdapterError(f"config must be a PromptConfig, got {type(config).__name__}.")
    if config.base_model_name_or_path is not None:
        return config
    name = backbone.model.config.name_or_path or None
    return config.replace(base_model_name_or_path=name, revision=config.revision or find_revision(backbone.model))


def find_revision(model: Any) -> str | None:
    """The commit on the Hub that a model was loaded from, as far as that is known.

    Older versions of transformers keep it in the config. Newer ones do not: there it is the newest commit of the main
    branch in the cache. For a model of another revision, say so by ``PromptConfig(revision=...)``.
    """
    kept = getattr(model.config, "_commit_hash", None)
    name = model.config.name_or_path
    if kept is not None or not name or Path(name).exists():
        return kept
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a folder that is gone
        return None
    return Path(cached).parent.name if isinstance(cached, str) else None


def warn_of_change(config: PromptConfig, model: Any) -> None:
    revision = find_revision(model)
    if config.revision is not None and revision is not None and config.revision != revision:
        warnings.warn(
            f"The adapter was trained on revision {config.revision} of '{config.base_model_name_or_path}', but the "
            f"backbone is of revision {revision}: results may differ. Load it with revision='{config.revision}'.",
            stacklevel=3,
        )


def warn_of_local(name: str | None) -> None:
    """Warns that a pushed adapter's backbone is one that nobody else can load."""
    if name is None or Path(name).is_dir():
        backbone = "has no name" if name is None else f"is a local folder ('{name}')"
        warnings.warn(
            f"The adapter's backbone {backbone}: nobody else can load it. Push the backbone too, and give its name as "
            "base_model_name_or_path in the PromptConfig.",
            stacklevel=3,
        )
