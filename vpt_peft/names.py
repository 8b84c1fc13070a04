"""What the name of a model means: a folder here, or a repository on the Hub. A stranger's file may say anything."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def is_folder(name: str | os.PathLike[str]) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long, or with a NUL in it
        return False


def is_repository(name: str) -> bool:
    """Whether it can be a repository's name; a folder of the same name goes before it, as in ``transformers``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_folder(name)
