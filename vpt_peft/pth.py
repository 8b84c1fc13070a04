"""Files that ``torch.save`` wrote, read as tensors only: what asks for anything else is refused, and never run.

``torch.load(weights_only=True)`` builds tensors by itself, but arrays would be built by numpy, which trusts what it
unpickles. Here the names that an array asks for stand for classes of ours, which take its bytes as a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors.torch import load_file
from torch import Tensor, nn, serialization

from .errors import CheckpointError

DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}


class _Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = DTYPES[code]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] != "<":
            raise ValueError(f"expected little-endian numbers, got byte order {state[1]!r}")


class _Array:
    """Stands in for ``numpy.ndarray``, and for the function that makes an empty one to be filled."""

    tensor: Tensor | None = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        flat = torch.frombuffer(bytearray(data), dtype=dtype.dtype)
        self.tensor = flat.reshape(shape[::-1]).permute(*range(len(shape))[::-1]) if is_fortran else flat.reshape(shape)


STAND_INS = [
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_Array, "numpy.core.multiarray._reconstruct"),  # numpy 1
    (_Array, "numpy._core.multiarray._reconstruct"),  # numpy 2
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a ``.pth`` or ``.safetensors`` file, bare or under ``model`` or ``state_dict``, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything but tensors and arrays of floats.
    """
    if not path.is_file():
        raise CheckpointError(f"Expected a checkpoint, got '{path}', which does not exist or is no file.")
    _check_archive(path)
    try:
        values = load_file(path) if path.suffix == ".safetensors" else _load(path)
    except Exception as error:  # whatever a stranger's file makes torch raise
        names = _refused(path)
        asked = f"asks for {', '.join(names)}" if names else f"is damaged or holds others ({type(error).__name__})"
        raise CheckpointError(
            f"'{path}' must hold tensors and arrays of floats only, but {asked}. Nothing in it was run. "
            "If you trust it, save its state dict anew, with tensors only."
        ) from error
    for key in ("model", "state_dict"):
        values = dict.get(values, key, values) if isinstance(values, dict) else values
    # Methods of dict and Tensor themselves: a file can put other attributes in front of theirs.
    items = list(dict.items(values)) if isinstance(values, dict) else []
    if not items or not all(isinstance(key, str) for key, _ in items):
        raise CheckpointError(f"'{path}' must hold a dict of tensors by name, got {type(values).__name__}.")
    tensors: dict[str, Any] = {key: value.tensor if isinstance(value, _Array) else value for key, value in items}
    others = sorted(key for key, value in tensors.items() if not _is_plain(value, path.stat().st_size))
    if others:
        raise CheckpointError(
            f"'{path}' must hold dense tensors no larger than itself, which is not so of {', '.join(others)}."
        )
    return {key: Tensor.detach(tensor) for key, tensor in tensors.items()}


def _check_archive(path: Path) -> None:
    """Raises CheckpointError for an archive that would unpack to more than its own size; torch.save's never do."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # whatever a stranger's file makes it raise
        raise CheckpointError(f"'{path}' must hold tensors and arrays, but its archive is damaged.") from None
    size = sum(entry.file_size for entry in entries)
    if size > path.stat().st_size or any(entry.compress_type != ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"'{path}' must hold tensors and arrays as torch.save writes them, uncompressed, got an archive of "
            f"{path.stat().st_size:,} bytes that unpacks to {size:,}."
        )


def _load(path: Path) -> Any:
    with _only_stand_ins():
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    """While it is open, torch allows ours beside its own names, and none that the program has allowed elsewhere."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    serialization.add_safe_globals(list(STAND_INS))
    try:
        yield
    finally:
        meanwhile = [name for name in serialization.get_safe_globals() if name not in STAND_INS]
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before + meanwhile)


def _refused(path: Path) -> list[str]:
    """What a file asks for besides tensors, found without running it; empty where that cannot be told."""
    try:
        with _only_stand_ins():
            return sorted(serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return []


def _is_plain(value: object, limit: int) -> bool:
    """Whether it is an ordinary tensor, and none that claims more numbers than a file of ``limit`` bytes can hold."""
    if type(value) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(value, Tensor)
    is_dense = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    return is_dense and not value.is_quantized and value.nbytes <= limit
