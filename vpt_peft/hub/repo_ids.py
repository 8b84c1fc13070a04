"""What a model name refers to: a local folder, or a repository on the Hub. Names may come from untrusted files."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import CheckpointError, safe_repr


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


def check_model_name(name: str | os.PathLike[str]) -> None:
    """Raises CheckpointError unless a name can be that of a model: an existing folder, or a repository's name."""
    if not is_folder(name) and not is_repo_id(os.fspath(name)):
        raise CheckpointError(
            f"Expected the folder of a model, or its name on the Hub, got {safe_repr(os.fspath(name))}, which is "
            f"neither an existing folder nor a valid repository name.{similar_folder(name) or ' Check the path.'}"
        )


def similar_folder(name: str | os.PathLike[str]) -> str:
    """A sentence about the folder whose name is most similar to that of a missing one; empty: there is none."""
    path = Path(name)
    try:
        names = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    except (OSError, ValueError):
        return ""
    found = get_close_matches(path.name, names, 1)
    return f" Did you mean '{path.parent / found[0]}'?" if found else ""
