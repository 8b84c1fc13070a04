"""Safetensors files with a seal.

The metadata holds, under the key ``vpt_peft``, a JSON object: the ``config`` that was saved with the tensors, the hash
of the config file that was there before (``replaces``), and a hash over all of it (``seal``). So one file, replaced
atomically, decides which adapter a folder holds, and a flipped bit is noticed. Files of other tools, without this key,
are read too. The structure of the file is checked by safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .atomic import read_unreplaced

KEY = "vpt_peft"
MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 10_000  # many more than adapters have
PEFT_PREFIX = "base_model.model."  # of each name in files that transformers has saved, see vpt_peft.peft


@dataclass(frozen=True)
class Weights:
    """An open weights file.

    Attributes:
        shapes: ``{name: shape}`` of its tensors, none of which has been read.
        config: the config that was saved with them; None without a seal.
        replaces: hash of the config file that was replaced.
        prefix: of the names in the file.
    """

    path: Path
    file: Any
    shapes: dict[str, tuple[int, ...]]
    config: dict[str, Any] | None
    replaces: str
    seal: str
    prefix: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Reads the tensors.

        Raises:
            CheckpointError: they are not those that were saved.
        """
        try:
            tensors = {name: self.file.get_tensor(self.prefix + name) for name in self.shapes}
        except (SafetensorError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"'{self.path}' contains a tensor that cannot be read: {_reason(error)}.") from error
        if self.config is not None and self.seal != _seal(tensors, self.config, self.replaces):
            raise CheckpointError(f"'{self.path}' is damaged: its content is not what was saved. Download it again.")
        return tensors


def pack_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any], replaces: str = "") -> bytes:
    """The content of a sealed weights file; equal for equal arguments.

    Args:
        tensors: dense tensors, on any device.
        config: a JSON object.
        replaces: hash of the config file that it replaces, see :mod:`vpt_peft.io.folder`.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(content[:8], "little")
    sealed = {"config": config, "replaces": replaces, "seal": _seal(tensors, config, replaces)}
    # The library writes metadata in random order, so the header is written here.
    metadata = {"format": "pt", KEY: json.dumps(sealed, sort_keys=True)}
    header = json.dumps({"__metadata__": metadata, **json.loads(content[8:start])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[start:]


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Opens a weights file without reading its tensors.

    Raises:
        CheckpointError: it is not a safetensors file, or its seal cannot be read.
    """
    try:
        opened = read_unreplaced(path, lambda file: _open(file, path))
    except (OSError, ValueError, MemoryError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"'{path}' must be a safetensors file, but is damaged or something else: {_reason(error)}. "
            "Pickled weights are never opened."
        ) from error
    with opened as file:
        names = file.keys()
        if len(names) > MAX_TENSORS:  # older versions of safetensors need minutes for the shapes of so many
            raise CheckpointError(
                f"'{path}' must contain the tensors of an adapter, at most {MAX_TENSORS:,}, got {len(names):,}."
            )
        prefix = PEFT_PREFIX if all(name.startswith(PEFT_PREFIX) for name in names) else ""
        shapes = {name.removeprefix(prefix): tuple(file.get_slice(name).get_shape()) for name in names}
        yield Weights(path, file, shapes, *_read_seal(path, file.metadata() or {}), prefix)


def digest(content: bytes) -> str:
    """The SHA-256 hash in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _open(file: BinaryIO, path: Path) -> Any:
    size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise ValueError(f"its header must be at most {MAX_HEADER_BYTES:,} bytes, got {size:,}")
    return safe_open(path, "pt")  # opens the path twice, once for the header and once for the data


def _read_seal(path: Path, metadata: Mapping[str, str]) -> tuple[dict[str, Any] | None, str, str]:
    """Config, ``replaces`` and seal of a file's metadata."""
    if KEY not in metadata:
        return None, "", ""
    try:
        sealed = json.loads(metadata[KEY])
        return dict(sealed["config"]), sealed["replaces"], sealed["seal"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"The metadata '{KEY}' of '{path}' is damaged: {error}. Download it again.") from error


def _reason(error: Exception) -> str:
    """The message of an error, cut off: it may repeat names in the file."""
    return str(error)[:300]


def _seal(tensors: Mapping[str, Tensor], config: Mapping[str, Any], replaces: str) -> str:
    """A hash over the config and over names, types, shapes and values of the tensors."""
    seal = hashlib.sha256(json.dumps([config, replaces], sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        seal.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        seal.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return seal.hexdigest()
