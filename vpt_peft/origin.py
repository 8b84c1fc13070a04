"""Where an adapter's backbone comes from: found free, remembered by name and revision, and compared again later."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .backbones import Backbone, find_backbone
from .config import PromptConfig
from .errors import AdapterError, shown
from .names import is_folder, is_repository
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

    Older versions of transformers keep it in the config. Newer ones do not: there it is the commit in the cache whose
    weights are the model's, else the newest of the main branch. For a model of another revision, say so by
    ``PromptConfig(revision=...)``.
    """
    kept = getattr(model.config, "_commit_hash", None)
    name = model.config.name_or_path
    if kept is not None or not name or is_folder(name):
        return kept
    main = _cached(name, "config.json", None)
    if main is None:
        return None
    others = sorted(folder for folder in main.parent.parent.iterdir() if folder != main.parent)
    if not others:
        return main.parent.name
    same = (folder.name for folder in (main.parent, *others) if _holds(folder / "model.safetensors", model))
    return next(same, main.parent.name)


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(found) if isinstance(found, str) else None


def _holds(file: Path, model: nn.Module) -> bool:
    """Whether a file holds the model's weights, judged by those that are small: norms and biases."""
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 1}
    try:
        with safe_open(file, "pt") as stored:
            both = [name for name in stored.keys() if name in own]  # noqa: SIM118  it is no dict
            return len(both) > 0 and all(_equal(stored.get_tensor(name), own[name]) for name in both)
    except (OSError, SafetensorError):
        return False


def _equal(stored: Tensor, own: Tensor) -> bool:
    return stored.shape == own.shape and bool((stored.to(own.device, own.dtype) == own).all())


def warn_of_change(config: PromptConfig, model: Any) -> None:
    revision, trained_on = find_revision(model), as_commit(config)
    if trained_on is not None and revision is not None and trained_on != revision:
        warnings.warn(
            f"The adapter was trained on revision {trained_on} of {shown(config.base_model_name_or_path)}, but the "
            f"backbone is of revision {revision}: results may differ. Load it with revision='{trained_on}'.",
            stacklevel=3,
        )


def as_commit(config: PromptConfig) -> str | None:
    """The commit that an adapter's revision means, as far as that is known: a branch or tag by the cache."""
    name, revision = config.base_model_name_or_path, config.revision
    if revision is None or re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    cached = _cached(name, "config.json", revision) if name and is_repository(name) else None
    return cached.parent.name if cached else None


def warn_of_local(name: str | None) -> None:
    """Warns that a pushed adapter's backbone is one that nobody else can load."""
    if name is None or not is_repository(name):
        backbone = "has no name" if name is None else f"is a local folder ({shown(name)})"
        warnings.warn(
            f"The adapter's backbone {backbone}: nobody else can load it. Push the backbone too, and give its name as "
            "base_model_name_or_path in the PromptConfig.",
            stacklevel=3,
        )
