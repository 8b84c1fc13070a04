"""Adapters on the Hugging Face Hub: push and pull, by ``huggingface_hub``'s own functions and with its own errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import CheckpointError, VPTError
from .folder import CONFIG_NAME, WEIGHTS_NAME
from .names import is_folder, is_repository

PREPROCESSOR_NAME = "preprocessor_config.json"
FILES = (CONFIG_NAME, WEIGHTS_NAME, "README.md", PREPROCESSOR_NAME)


@contextmanager
def pulled(model_id: str | os.PathLike[str], **source: Any) -> Iterator[Path]:
    """The folder that :func:`pull` gives; errors about what lies in it name the repository."""
    folder = pull(model_id, **source)
    try:
        yield folder
    except VPTError as error:
        if is_folder(model_id) or str(model_id) in str(error):
            raise
        raise type(error)(f"In the repository '{model_id}': {error}") from error


def pull(
    model_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of an adapter: ``model_id`` itself, or the Hub's files of that name in the cache.

    Args:
        model_id: a folder, or the name of a repository.
        subfolder: where in it the adapter lies; None: at the top, or wherever its only one does.
        revision: branch, tag or commit.
        token, cache_dir, local_files_only: as ``huggingface_hub.hf_hub_download`` takes them.

    Raises:
        CheckpointError: neither a folder nor the name of a repository, or there is no adapter in it.
        huggingface_hub.errors.HfHubHTTPError, LocalEntryNotFoundError: the client's own errors.
    """
    if is_folder(model_id):
        return Path(model_id) / (subfolder or "")
    repo_id = str(model_id)
    if not is_repository(repo_id):
        raise CheckpointError(
            f"Expected an adapter folder or the name of a repository on the Hub, got '{model_id}', "
            "which does not exist or is no folder, and is no such name."
        )
    where: dict[str, Any] = {"revision": revision, "token": token, "local_files_only": local_files_only}
    where["cache_dir"] = None if cache_dir is None else str(cache_dir)
    try:
        config = Path(hf_hub_download(repo_id, CONFIG_NAME, subfolder=subfolder, **where))
    except EntryNotFoundError as error:
        if subfolder is not None:
            raise
        is_offline = isinstance(error, LocalEntryNotFoundError)
        subfolder = _cached_subfolder(repo_id, where) if is_offline else _only_subfolder(repo_id, revision, token)
        if subfolder is None:
            raise
        config = Path(hf_hub_download(repo_id, CONFIG_NAME, subfolder=subfolder, **where))
    # The commit that the config came from: a push in between must not mix two adapters.
    commit = config.parents[len(PurePosixPath(subfolder or "").parts)].name
    hf_hub_download(repo_id, WEIGHTS_NAME, subfolder=subfolder, **{**where, "revision": commit})
    return config.parent


def _only_subfolder(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    files = map(PurePosixPath, HfApi().list_repo_files(repo_id, revision=revision, token=token))
    found = sorted(str(file.parent) for file in files if file.name == CONFIG_NAME)
    if len(found) != 1:
        there = f"several: {', '.join(found)}. Name one as subfolder" if found else "none"
        raise CheckpointError(f"Expected an adapter ({CONFIG_NAME}) in the repository '{repo_id}', got {there}.")
    return found[0]


def _cached_subfolder(repo_id: str, where: dict[str, Any]) -> str | None:
    """Where in the cache a repository's only adapter lies, when the Hub cannot be asked; None if that is unknown."""
    try:
        root = Path(snapshot_download(repo_id, **{**where, "local_files_only": True}))
    except LocalEntryNotFoundError:
        return None
    found = [config.parent.name for config in root.glob(f"*/{CONFIG_NAME}")]
    return found[0] if len(found) == 1 else None


def fetch_cards(
    repo_id: str, folder: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
) -> None:
    """Puts the model cards of a repository, if there is one, into a folder, so that the user's words are kept."""
    for source in dict.fromkeys([revision, None]):  # a branch that does not exist yet begins as the main one is
        with suppress(RepositoryNotFoundError, RevisionNotFoundError):
            patterns = ["README.md", "*/README.md"]
            snapshot_download(repo_id, local_dir=str(folder), allow_patterns=patterns, revision=source, token=token)
            return


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Uploads the adapters in a folder, and nothing else that lies there. Equal files are not uploaded again.

    Args:
        repo_id: the repository, created if it does not exist.
        private: whether it is created so; an existing one stays as it is.
        revision: branch to push to, created if it does not exist.
        create_pr: opens a pull request instead of pushing to the branch.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the client's own errors.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload VPT adapter",
        revision=revision,
        create_pr=create_pr,
        allow_patterns=[*FILES, *(f"*/{name}" for name in FILES)],
    )
