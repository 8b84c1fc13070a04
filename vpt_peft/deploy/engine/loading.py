"""Adapters in memory: where they come from, and which of them stay."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from ... import hub, io
from ...adapter import Adapter
from ...errors import AdapterError, CheckpointError, safe_repr
from ...model import VPTModel
from .backbone import PREFIX

ATTEMPTS = 20
FILES = (io.CONFIG_NAME, io.WEIGHTS_NAME, hub.PREPROCESSOR_NAME)
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """Where an adapter comes from: a folder, by its absolute path, or a repository and its revision."""

    adapter: str
    revision: str | None = None

    @classmethod
    def find(cls, adapter: str | os.PathLike[str], revision: str | None) -> Source:
        """The source that a request names.

        Raises:
            AdapterError: it is no name.
        """
        if not isinstance(adapter, str | os.PathLike) or not isinstance(revision, str | None):
            raise AdapterError(
                "adapter must be the folder or the repository of an adapter, and revision a branch, tag or commit, got "
                f"{safe_repr(adapter)} and {safe_repr(revision)}."
            )
        return cls(os.path.abspath(adapter)) if hub.is_folder(adapter) else cls(os.fspath(adapter), revision)

    def __str__(self) -> str:
        return self.adapter if self.revision is None else f"{self.adapter}@{self.revision}"

    @property
    def signature(self) -> Signature | None:
        """Changes with the adapter's files; None for a repository, whose adapter stays as it was loaded."""
        return _sign(Path(self.adapter)) if os.path.isabs(self.adapter) else None


def _sign(folder: Path) -> Signature:
    """Name, time, size and inode of each file of an adapter."""
    folder = find_adapter_folder(folder)
    signature: list[Any] = []
    for name in FILES:
        try:
            status = os.stat(folder / name)
        except (OSError, ValueError):  # the latter for names with a NUL character
            signature.append((name, None))
        else:
            signature.append((name, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return tuple(signature)


def find_adapter_folder(folder: Path) -> Path:
    """The folder itself, or the subfolder with the only adapter."""
    if (folder / io.CONFIG_NAME).exists():
        return folder
    inner = list(folder.glob(f"*/{io.CONFIG_NAME}"))
    return inner[0].parent if len(inner) == 1 else folder


@dataclass(eq=False)
class Entry:
    """One version of an adapter in memory. It is never changed: a folder that has changed gets a new one.

    Attributes:
        name: its name in the model.
        signature: of its files; None for a repository.
        users: number of its requests that are not answered yet.
        adapter: None while it is being loaded.
        processor_file: content of its image processor's file; None: the backbone's is used.
        image_processor: None before the first image that it processes.
        waiting: requests to go on with then.
        is_current: it answers new requests.
        is_attached: it is part of the model. Known to the computing thread only, as ``is_alone``.
        is_alone: it cannot be mixed with others.
    """

    name: str
    source: Source
    signature: Signature | None
    users: int = 0
    adapter: Adapter | None = None
    processor_file: bytes | None = None
    image_processor: Any = None
    waiting: list[Any] = field(default_factory=list)
    is_current: bool = True
    is_attached: bool = False
    is_alone: bool = False


class AdapterCache:
    """The adapters in memory; the least recently used go. Its owner makes sure that threads take turns.

    Attributes:
        removed: entries that nobody needs any more, to be taken out of the model.
    """

    def __init__(self, max_adapters: int) -> None:
        self.max_adapters = max_adapters
        self.entries: OrderedDict[Source, Entry] = OrderedDict()  # most recently used last
        self.removed: list[Entry] = []
        self.created = self.evictions = self.replacements = 0

    def use(self, source: Source, signature: Signature | None) -> Entry:
        """The entry of a source, which has one more user. A new one must be loaded."""
        entry = self.entries.get(source)
        if entry is not None and entry.signature != signature:
            self.replacements += 1
            self.remove(entry)
            entry = None
        if entry is None:
            self.created += 1
            entry = self.entries[source] = Entry(f"{PREFIX}{self.created}", source, signature)
        self.entries.move_to_end(source)
        entry.users += 1
        return entry

    def release(self, entry: Entry) -> None:
        """Ends the use of an entry."""
        entry.users -= 1
        if not entry.users and not entry.is_current:
            self.removed.append(entry)
        self.evict()

    def evict(self) -> None:
        """Removes the least recently used entries beyond ``max_adapters``, except those in use."""
        excess = len(self.entries) - self.max_adapters
        idle = [entry for entry in self.entries.values() if not entry.users] if excess > 0 else []
        for entry in idle[: max(excess, 0)]:
            self.evictions += 1
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Lets an entry answer no new requests."""
        if entry.is_current:
            entry.is_current = False
            del self.entries[entry.source]
            if not entry.users:
                self.removed.append(entry)


class AdapterLoader:
    """Reads adapters, in any thread.

    Args:
        vpt: the model, of which nothing is changed.
        structure: held while an adapter is made, which reads the modules of the backbone. Whoever adds overrides to
            these modules holds it too.
        hub_options: ``token``, ``cache_dir`` and ``local_files_only``.
    """

    def __init__(self, vpt: VPTModel, structure: Lock, hub_options: dict[str, Any]) -> None:
        self.vpt, self.structure, self.hub_options = vpt, structure, hub_options

    def load(self, source: Source) -> tuple[Adapter, bytes | None, Signature | None]:
        """An adapter, the content of its image processor's file, and the signature of its files.

        Raises:
            CheckpointError, AdapterError, ConfigError: as :meth:`VPTModel.load_adapter`.
            huggingface_hub.errors.HfHubHTTPError: from the Hub client.
        """
        options = {"revision": source.revision, "with_processor": True, **self.hub_options}
        with hub.pulled(source.adapter, **options) as folder:
            if source.signature is None:
                return *self._read(folder), None
            for _ in range(ATTEMPTS):  # until nothing has changed meanwhile
                signature = source.signature
                try:
                    with io.lock_folder(find_adapter_folder(folder), is_writer=False):
                        adapter, processor_file = self._read(folder)
                except (CheckpointError, OSError):
                    if signature == source.signature:
                        raise
                else:
                    if signature == source.signature:
                        return adapter, processor_file, signature
        raise CheckpointError(f"The folder '{source}' is being replaced over and over. Try again.")

    def _read(self, folder: Path) -> tuple[Adapter, bytes | None]:
        with io.open_folder(folder) as saved:
            with self.structure:
                adapter = io.load_adapter(saved, self.vpt.backbone, self.vpt._fingerprint)
            file = saved.weights.path.parent / hub.PREPROCESSOR_NAME
            processor_file = file.read_bytes() if file.is_file() else None
        if adapter.num_labels == 0:
            raise AdapterError(f"The engine needs adapters with labels, got one with num_labels=0 in '{folder}'.")
        hub.warn_if_revision_differs(adapter.config, self.vpt.base_model)
        return adapter, processor_file
