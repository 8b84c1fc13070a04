"""Push and pull of adapters, with the functions and errors of ``huggingface_hub``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..errors import CheckpointError, VPTError
from ..io import CONFIG_NAME, WEIGHTS_NAME, open_folder
from .endpoint_files import HANDLER_NAME, REQUIREMENTS_NAME
from .repo_ids import is_folder, is_repo_id

PREPROCESSOR_NAME = "preprocessor_config.json"  # of images
PROCESSOR_NAMES = (PREPROCESSOR_NAME, "video_preprocessor_config.json")
FILES = (CONFIG_NAME, WEIGHTS_NAME, "README.md", *PROCESSOR_NAMES)
REFUSED = (401, 403)  # HTTP status codes


@contextmanager
def suggest_login() -> Iterator[None]:
    """Adds how to log in to errors of the Hub client that a missing or wrong token can cause."""
    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code in REFUSED or isinstance(error, RepositoryNotFoundError):
            error.append_to_message(
                "\nTo read a private or gated repository, or to write to one, log in with `hf auth login`, or pass a "
                "token with that right."
            )
        raise


@contextmanager
def pulled(model_id: str | os.PathLike[str], **source: Any) -> Iterator[Path]:
    """The folder returned by :func:`pull`. Errors raised inside the context name the repository."""
    with suggest_login():
        folder = pull(model_id, **source)
    try:
        yield folder
    except VPTError as error:
        if is_folder(model_id) or str(model_id) in str(error):
            raise
        raise type(error)(f"In the repository '{model_id}': {error}") from error


@contextmanager
def pulled_adapter(model_id: str | os.PathLike[str], **source: Any) -> Iterator[Path]:
    """The folder with the files of an adapter, also where it is a subfolder; otherwise as :func:`pulled`."""
    with pulled(model_id, **source) as folder:
        with open_folder(folder) as saved:
            own = saved.weights.path.parent
        yield own


def pull(
    model_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    with_processor: bool = False,
) -> Path:
    """The local folder of an adapter: ``model_id`` itself, or the files of that repository in the Hub's cache.

    Args:
        model_id: a folder or a repository.
        subfolder: folder of the adapter in it; None: the top, or the subfolder with the only adapter.
        revision: branch, tag or commit.
        token, cache_dir, local_files_only: as in ``huggingface_hub.hf_hub_download``.
        with_processor: also downloads the image processor, if the adapter has one.

    Raises:
        CheckpointError: neither a folder nor the name of a repository, or it contains no adapter; or, without a
            connection, it is unknown whether the adapter has an image processor.
        huggingface_hub.errors.HfHubHTTPError, LocalEntryNotFoundError: from the Hub client.
    """
    if is_folder(model_id):
        return Path(model_id) / (subfolder or "")
    repo_id = str(model_id)
    if not is_repo_id(repo_id):
        raise CheckpointError(
            f"Expected an adapter folder or the name of a repository on the Hub, got '{model_id}', "
            "which is neither an existing folder nor a valid repository name."
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
    # Pinned to the commit of the config: a push in between must not mix two adapters.
    commit = config.parents[len(PurePosixPath(subfolder or "").parts)].name
    where["revision"] = commit
    hf_hub_download(repo_id, WEIGHTS_NAME, subfolder=subfolder, **where)
    if with_processor:
        _pull_processor(repo_id, subfolder, where)
    return config.parent


def _pull_processor(repo_id: str, subfolder: str | None, where: dict[str, Any]) -> None:
    path = str(PurePosixPath(subfolder or "", PREPROCESSOR_NAME))
    try:
        hf_hub_download(repo_id, path, **where)
    except LocalEntryNotFoundError as error:
        if try_to_load_from_cache(repo_id, path, where["cache_dir"], where["revision"]) is None:  # not known as absent
            raise CheckpointError(
                f"Whether the repository '{repo_id}' has an image processor is unknown without a connection, since "
                "the cache contains only its adapter. Pass image_processor=..., or load it once with a connection."
            ) from error
    except EntryNotFoundError:
        pass  # the backbone's is used


def _only_subfolder(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    files = map(PurePosixPath, HfApi().list_repo_files(repo_id, revision=revision, token=token))
    found = sorted(str(file.parent) for file in files if file.name == CONFIG_NAME)
    if len(found) != 1:
        there = f"several: {', '.join(found)}. Name one as subfolder" if found else "none"
        raise CheckpointError(f"Expected an adapter ({CONFIG_NAME}) in the repository '{repo_id}', got {there}.")
    return found[0]


def _cached_subfolder(repo_id: str, where: dict[str, Any]) -> str | None:
    """Subfolder of the only adapter in a cached repository, for use without a connection; None if unknown."""
    try:
        root = Path(snapshot_download(repo_id, **{**where, "local_files_only": True}))
    except LocalEntryNotFoundError:
        return None
    found = [config.parent.name for config in root.glob(f"*/{CONFIG_NAME}")]
    return found[0] if len(found) == 1 else None


def full_repo_id(repo_id: str, private: bool | None = None, token: str | bool | None = None) -> str:
    """The name of a repository with its owner. Without one it is the user's, and created if it does not exist."""
    if "/" in repo_id:
        return repo_id
    return HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True).repo_id


def find_commit(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> tuple[str, list[str]]:
    """The commit that a push to a repository is based on, and the paths of its files.

    Args:
        revision: the branch that is pushed to; a new one starts from the main branch.

    Returns:
        An empty name and list if there is no such repository.
    """
    for source in dict.fromkeys([revision, None]):
        try:
            info = HfApi(token=token).model_info(repo_id, revision=source)
        except (RepositoryNotFoundError, RevisionNotFoundError):
            continue
        return str(info.sha), [file.rfilename for file in info.siblings or []]
    return "", []


def tensor_names(repo_id: str, path: str, commit: str, token: str | bool | None = None) -> list[str]:
    """Names of the tensors in a safetensors file on the Hub, of which only the header is downloaded."""
    try:
        header = HfApi(token=token).parse_safetensors_file_metadata(repo_id, path, revision=commit)
    except SafetensorsParsingError:
        return []
    return list(header.tensors)


def fetch_cards(repo_id: str, folder: str | os.PathLike[str], commit: str, token: str | bool | None = None) -> None:
    """Downloads the model cards of a repository, so that their text is kept."""
    patterns = ["README.md", "*/README.md"]
    snapshot_download(repo_id, local_dir=str(folder), allow_patterns=patterns, revision=commit, token=token)


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
    """Uploads adapters in a folder, and files of an endpoint, but no others. Unchanged files are not uploaded again.

    Args:
        repo_id: the repository, created if it does not exist.
        private: visibility of a new repository; an existing one is not changed.
        revision: branch to push to, created if it does not exist.
        create_pr: open a pull request instead of pushing to the branch.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: from the Hub client.
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
        allow_patterns=[*FILES, *(f"*/{name}" for name in FILES), HANDLER_NAME, REQUIREMENTS_NAME],
    )
