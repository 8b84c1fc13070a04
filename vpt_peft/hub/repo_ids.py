"""What a model name refers to: a local folder, or a repository on the Hub. Names may come from untrusted files."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether a folder of that name exists."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long, or with a NUL character
        return False


def is_repo_id(name: str) -> bool:
    """Whether a name is a valid repository name. An existing folder takes precedence, as in ``transformers``."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_folder(name)
