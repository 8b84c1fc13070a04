"""The adapters that a server offers: a table of names, fixed when it starts.

Requests name a task of this table. Nothing else of a request chooses a file or a repository.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...config import check_unicode
from ...errors import AdapterError, VPTError, safe_repr, truncate_list
from ...hub import is_folder, is_repo_id, pull
from ...io import CONFIG_NAME, open_folder

MAX_LISTED = 10


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter is: a folder, or a Hub repository at a revision."""

    adapter: str
    revision: str | None = None


def find_adapters(sources: Iterable[str]) -> dict[str, AdapterSource]:
    """The table of adapters.

    Args:
        sources: each is an adapter folder, a folder of adapter folders, or a Hub repository with or without a revision
            (``me/birds-vpt@v2``). The task is named like the folder or the repository, or by ``name=`` before it.

    Raises:
        AdapterError: a source is none of these, or two tasks have the same name.
    """
    table: dict[str, AdapterSource] = {}
    for source in sources:
        for name, found in _find(source):
            check_unicode("The name of a task", name)
            if name in table and table[name] != found:
                raise AdapterError(
                    f"Tasks must have different names, got '{name}' for '{table[name].adapter}' and "
                    f"'{found.adapter}'. Name one of them: other-name={found.adapter}"
                )
            table[name] = found
    if not table:
        raise AdapterError("Expected at least one adapter, got none. Give folders or Hub repositories of adapters.")
    return table


def _find(source: str) -> Iterator[tuple[str, AdapterSource]]:
    """Names and places of the adapters that one source stands for."""
    name, separator, place = source.partition("=")
    if not separator or is_folder(source):
        name, place = "", source
    elif not name:
        raise AdapterError(f"Expected a name before '=', got {safe_repr(source)}.")
    if is_folder(place):
        folder = Path(os.path.abspath(place))  # a link stays one: it may lead elsewhere later
        if (folder / CONFIG_NAME).is_file():
            yield name or folder.name, AdapterSource(str(folder))
            return
        inner = sorted(config.parent for config in folder.glob(f"*/{CONFIG_NAME}"))
        if not inner:
            there = truncate_list(sorted(entry.name for entry in folder.iterdir()), MAX_LISTED)
            raise AdapterError(
                f"Expected an adapter folder (with {CONFIG_NAME}) or a folder of adapter folders, got '{place}', "
                f"which contains [{there}]."
            )
        if name:
            raise AdapterError(
                f"A name can be given to one adapter, but '{place}' is a folder of {len(inner)}. Leave '{name}=' out."
            )
        yield from ((adapter.name, AdapterSource(str(adapter))) for adapter in inner)
        return
    repository, at, revision = place.partition("@")
    if not is_repo_id(repository) or (at and not revision):
        raise AdapterError(
            f"Expected a folder or a Hub repository such as me/birds-vpt or me/birds-vpt@revision, got "
            f"{safe_repr(place)}, which is neither an existing folder nor the name of a repository."
        )
    yield name or place, AdapterSource(repository, revision or None)


def read_labels(table: Mapping[str, AdapterSource]) -> dict[str, list[str] | None]:
    """The labels of each task as they are on this machine now.

    Returns:
        None for an adapter of the Hub that was not downloaded yet, and for one that is damaged.
    """
    return {name: _labels(source) for name, source in table.items()}


def _labels(source: AdapterSource) -> list[str] | None:
    try:
        folder = pull(source.adapter, revision=source.revision, local_files_only=True)
        config = (folder / CONFIG_NAME).stat()
        return _read(folder, config.st_mtime_ns, config.st_size, config.st_ino)
    except (VPTError, OSError):  # those of the Hub client are OSErrors
        return None


@lru_cache(maxsize=10_000)
def _read(folder: os.PathLike[str], *version: int) -> list[str]:
    """The labels in an adapter folder, read once for each version of its config."""
    with open_folder(folder) as saved:
        return list(saved.labels["id2label"].values())
