"""Atomic replacement of files, in folders that one process at a time writes to."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

from ..errors import CheckpointError

TEMPORARY = ".saving-"
ATTEMPTS = 20
T = TypeVar("T")


@contextmanager
def lock_folder(folder: Path, is_writer: bool = True) -> Iterator[None]:
    """Excludes other threads and processes from writing to a folder.

    The lock is on the folder itself, so that no file is left in it and processes need not agree on a temporary folder.
    Where folders cannot be locked (Windows, NFS), the lock is a file in the temporary folder.

    Args:
        is_writer: removes temporary files of killed processes.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(_flock(folder))
        except (ImportError, OSError):
            name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
            stack.enter_context(WeakFileLock(Path(tempfile.gettempdir()) / f"vpt-peft-{name}.lock"))
        for left in folder.glob(f"{TEMPORARY}*") if is_writer else ():
            shutil.rmtree(left, ignore_errors=True)
        yield


def atomic_write(path: Path, content: bytes) -> None:
    """Replaces a file: at any moment it has the old content or the new one. A link is replaced, not followed."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=TEMPORARY) as folder:
        file = Path(folder) / path.name
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(file, path)


def read_unreplaced(path: Path, read: Callable[[BinaryIO], T]) -> T:
    """Calls a function with an open file, again if the file was replaced meanwhile.

    Raises:
        CheckpointError: it is replaced at each attempt.
    """
    for _ in range(ATTEMPTS):
        with path.open("rb") as file:  # while it is open, no other file gets its inode
            error = None
            try:
                result = read(file)
            except Exception as caught:
                error = caught
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                if error is not None:
                    raise error
                return result
    raise CheckpointError(f"'{path}' is being replaced over and over. Try again.")


def pack_files(processor: Any) -> dict[str, bytes]:
    """The files that ``save_pretrained`` of an image processor, say, writes: ``{name: content}``."""
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        return {file.name: file.read_bytes() for file in sorted(Path(temporary).iterdir())}


@contextmanager
def _flock(folder: Path) -> Iterator[None]:
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing would not unlock it if a process was forked in between
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)
