"""Reads tensors and arrays from files written by ``torch.save``, without running any code in them.

``torch.load(weights_only=True)`` builds tensors itself, but arrays can only be allowed by allowing numpy's own
constructors, which do not validate what they unpickle. Instead, numpy's names are mapped to the classes below, which
copy an array's bytes into a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import Struct
from typing import Any
from zipfile import ZipFile

import torch
from safetensors.torch import load_file
from torch import Tensor, serialization

from ..errors import CheckpointError, truncate_list

DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
MAX_LISTED = 100

# The end of an archive written by torch.save, which always uses the format's 64-bit extension (ZIP64): a record with
# the size and offset of the directory, a record with the position of that record, and one of the original format.
END = Struct("<4s36xQQ4s4xQ4x4s18x")


class _Dtype:
    """Unpickled in place of ``numpy.dtype``."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = DTYPES[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise ValueError(f"expected little-endian numbers, got byte order {state[1]!r}")


class _Array:
    """Unpickled in place of ``numpy.ndarray`` and of ``_reconstruct``, which creates the empty array to be filled."""

    tensor: Tensor | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        flat = torch.frombuffer(bytearray(data), dtype=dtype.dtype)
        self.tensor = flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if is_fortran else flat.reshape(shape)


SAFE_GLOBALS = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_Array, "numpy.core.multiarray._reconstruct"),  # numpy 1
    (_Array, "numpy._core.multiarray._reconstruct"),  # numpy 2
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a state dict, which may be nested under ``model`` or ``state_dict``, to the CPU.

    Args:
        path: a ``.safetensors`` file, or a file written by ``torch.save``.

    Raises:
        CheckpointError: the file is missing or damaged, or contains anything but tensors and arrays of floats.
    """
    if not path.is_file():
        raise CheckpointError(f"Expected a checkpoint file, got '{path}', which does not exist or is not a file.")
    file_size = path.stat().st_size
    _check_archive(path, file_size)
    try:
        values = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except Exception as error:  # invalid files make torch raise errors of many types
        names = _unsafe_globals(path)
        found = f"references {truncate_list(names, MAX_LISTED)}" if names else f"is invalid ({type(error).__name__})"
        raise CheckpointError(
            f"'{path}' must contain only tensors and arrays of floats, but it {found}. No code in it was run. "
            "If you trust the file, load it yourself and save its state dict with tensors only."
        ) from error
    for key in ("model", "state_dict"):
        values = dict.get(values, key, values) if isinstance(values, dict) else values
    # Methods are called on the class: a file can set instance attributes of the same name.
    items = list(dict.items(values)) if isinstance(values, dict) else []
    if not items or not all(isinstance(key, str) for key, _ in items):
        raise CheckpointError(f"'{path}' must contain a dict of tensors by name, got {type(values).__name__}.")
    tensors: dict[str, Any] = {key: value.tensor if isinstance(value, _Array) else value for key, value in items}
    others = sorted(key for key, value in tensors.items() if not _is_dense(value, file_size))
    if others:
        raise CheckpointError(
            f"'{path}' must contain only dense tensors that are not larger than the file, which is not true of "
            f"{truncate_list(others, MAX_LISTED)}."
        )
    return {key: Tensor.detach(tensor) for key, tensor in tensors.items()}


def _check_archive(path: Path, file_size: int) -> None:
    """Checks that a zip archive unpacks to at most its own size, as the uncompressed archives of ``torch.save`` do.

    Otherwise, compressed, overlapping and mis-sized members could fill the memory. Only the directory is read: torch
    allocates the sizes that are given there.

    Raises:
        CheckpointError: the archive unpacks to more, or its directory is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch recognizes archives by the same bytes
            return
        file.seek(max(0, file_size - END.size))
        end = file.read()
    try:
        id64, size, offset, id_locator, position, id_end = END.unpack(end)
        # torch finds the directory by position and offset, zipfile expects it right before these records: an archive
        # in which the two differ could hide its members from zipfile.
        is_valid = (id64, id_locator, id_end) == (
            b"PK\x06\x06",
            b"PK\x06\x07",
            b"PK\x05\x06",
        ) and offset + size == position == file_size - END.size
        with ZipFile(path) as archive:
            unpacked_size = sum(member.file_size for member in archive.infolist())
    except Exception:  # invalid archives make zipfile raise errors of many types
        is_valid = False
    if not is_valid:
        raise CheckpointError(f"'{path}' must be an archive as written by torch.save, but its directory is damaged.")
    if unpacked_size > file_size:
        raise CheckpointError(
            f"'{path}' must be an uncompressed archive as written by torch.save, got {file_size:,} bytes that unpack "
            f"to {unpacked_size:,}. Nothing was unpacked."
        )


def _load(path: Path) -> Any:
    with _only_safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _only_safe_globals() -> Iterator[None]:
    """Replaces the classes that the program has allowed for ``torch.load`` by ours, and restores them on exit."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    serialization.add_safe_globals(list(SAFE_GLOBALS))
    try:
        yield
    finally:
        added = [name for name in serialization.get_safe_globals() if name not in SAFE_GLOBALS]
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before + added)


def _unsafe_globals(path: Path) -> list[str]:
    """Names of the classes and functions in a file that are not allowed; empty if the file cannot be parsed."""
    try:
        with _only_safe_globals():
            return sorted(serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _is_dense(value: object, max_bytes: int) -> bool:
    """Whether a value is a dense tensor on the CPU of at most ``max_bytes``; expanded tensors can be larger."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not value.is_nested and not value.is_quantized and value.nbytes <= max_bytes
