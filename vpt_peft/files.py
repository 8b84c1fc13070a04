"""Files that are replaced at once, in folders that one process at a time writes to."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; what one that was killed left behind is removed first.

    The folder itself is locked, so that it holds only the adapter, and whatever each process takes for the temporary
    folder. Where the system cannot do that (Windows, NFS), a file in the temporary folder is.
    """
    descriptor = _lock(folder)
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    try:
        if descriptor is None:
            with WeakFileLock(Path(tempfile.gettempdir()) / f"vpt-peft-{name}.lock"):
                _tidy(folder)
                yield
        else:
            _tidy(folder)
            yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def replace(path: Path, content: bytes) -> None:
    """Writes a file. At any moment it is the one that was there, or the new one. A link is replaced, not followed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        file = Path(folder) / path.name
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(file, path)


def save_whole(processor: Any, folder: Path) -> None:
    """Saves what has a ``save_pretrained`` of its own, such as an image processor, so that no file is ever half."""
    with tempfile.TemporaryDirectory() as place:
        processor.save_pretrained(place)
        with locked(folder):
            for file in sorted(Path(place).iterdir()):
                replace(folder / file.name, file.read_bytes())


def _lock(folder: Path) -> int | None:
    """A descriptor that keeps the folder locked while it is open; None where folders cannot be locked."""
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _tidy(folder: Path) -> None:
    for left in folder.glob(".saving-*"):
        shutil.rmtree(left, ignore_errors=True)
