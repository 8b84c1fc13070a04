"""Provenance of a backbone: its name and revision, saved with an adapter and compared when that is loaded."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..backbones import Backbone
from ..config import PromptConfig
from ..errors import AdapterError, safe_repr
from .repo_ids import is_folder, is_repo_id


def add_provenance(config: object, backbone: Backbone) -> PromptConfig:
    """The config with name and revision of the backbone, unless the user has set the name."""
    if not isinstance(config, PromptConfig):
        got = "the class itself" if config is PromptConfig else safe_repr(config)
        raise AdapterError(f"config must be a PromptConfig, got {got}. Make one: vpt_peft.PromptConfig(num_tokens=10).")
    if config.base_model_name_or_path is not None:
        return config
    name = backbone.model.config.name_or_path or None
    return config.replace(base_model_name_or_path=name, revision=config.revision or find_revision(backbone.model))


def find_revision(model: Any) -> str | None:
    """The commit on the Hub that a model was loaded from; None if unknown.

    Older versions of transformers keep it in the config. Otherwise it is the cached commit whose weights equal the
    model's, else the latest cached commit of the main branch. ``PromptConfig(revision=...)`` overrides it.
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
    same = (folder.name for folder in (main.parent, *others) if _has_weights(folder / "model.safetensors", model))
    return next(same, main.parent.name)


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # a folder that does not exist any more
        return None
    return Path(found) if isinstance(found, str) else None


def _has_weights(file: Path, model: nn.Module) -> bool:
    """Whether a file contains the model's weights, judged by norms and biases, which are small."""
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.ndim == 1}
    try:
        with safe_open(file, "pt") as stored:
            both = [name for name in stored.keys() if name in own]  # noqa: SIM118  not a dict
            return len(both) > 0 and all(_equal(stored.get_tensor(name), own[name]) for name in both)
    except (OSError, SafetensorError):
        return False


def _equal(stored: Tensor, own: Tensor) -> bool:
    return stored.shape == own.shape and bool((stored.to(own.device, own.dtype) == own).all())


def warn_if_revision_differs(config: PromptConfig, model: Any) -> None:
    """Warns if an adapter was trained on another revision of the backbone."""
    revision, trained_on = find_revision(model), resolve_commit(config)
    if trained_on is not None and revision is not None and trained_on != revision:
        warnings.warn(
            f"The adapter was trained on revision {trained_on} of {safe_repr(config.base_model_name_or_path)}, but the "
            f"backbone has revision {revision}: results may differ. Load it with revision='{trained_on}'.",
            stacklevel=3,
        )


def resolve_commit(config: PromptConfig) -> str | None:
    """The commit of a config's revision; a branch or tag is looked up in the cache. None if unknown."""
    name, revision = config.base_model_name_or_path, config.revision
    if revision is None or re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    cached = _cached(name, "config.json", revision) if name and is_repo_id(name) else None
    return cached.parent.name if cached else None


def without_local_backbone(config: PromptConfig) -> PromptConfig:
    """The config to publish: without the name of a backbone that is not on the Hub, which is a path of this machine."""
    name = config.base_model_name_or_path
    if name is None or is_repo_id(name):
        return config
    return config.replace(base_model_name_or_path=None, revision=None)


def warn_if_local(name: str | None) -> None:
    """Warns if others cannot load the backbone of a pushed adapter."""
    if name is None or not is_repo_id(name):
        backbone = "has no name" if name is None else f"is a local folder ({safe_repr(name)}), which is not published"
        warnings.warn(
            f"The adapter's backbone {backbone}: others cannot load it. Push the backbone too, and set its name as "
            "base_model_name_or_path in the PromptConfig.",
            stacklevel=3,
        )
