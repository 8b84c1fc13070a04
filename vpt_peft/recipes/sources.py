"""Models and adapters that a command is given by name: whether they can be there, before the Hub's client looks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from ..hub import check_model_name, is_folder, similar_folder
from .errors import RecipeError

TIMEOUT = 10  # seconds


def check_source(name: str) -> None:
    """Checks that a name can be found. Where the Hub cannot be reached, its client uses only its cache from now on.

    Otherwise the client would try again for half a minute, for each file.

    Args:
        name: folder or Hub repository of a model or an adapter.

    Raises:
        CheckpointError: it is neither a folder nor the name of a repository.
        RecipeError: neither is there such a folder, nor such a repository on the Hub or, without a connection, in the
            cache.
    """
    check_model_name(name)
    if is_folder(name):
        return
    is_cached = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model")).is_dir()
    if constants.HF_HUB_OFFLINE:
        problem: object = "HF_HUB_OFFLINE is set"
    else:
        try:
            HfApi().model_info(name, timeout=TIMEOUT)
            return
        except RepositoryNotFoundError:
            hint = similar_folder(name)
            if not hint:
                return  # the client says what may be missing: the repository, or a token
            raise RecipeError(f"There is neither a folder '{name}' nor a repository of that name.{hint}") from None
        except HfHubHTTPError:
            return  # likewise
        except Exception as error:  # of the HTTP library, which depends on the client's version
            problem = error
    if not is_cached:
        raise RecipeError(
            f"There is no folder '{name}', and whether there is a repository of that name is unknown, since the Hub "
            f"cannot be reached ({problem}).{similar_folder(name)}"
        )
    constants.HF_HUB_OFFLINE = True


@contextmanager
def hub_settings() -> Iterator[None]:
    """A context behind which the Hub's client is as it was, see :func:`check_source`."""
    before = constants.HF_HUB_OFFLINE
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
