"""The weights file: safetensors with a seal, checked before any memory is taken for it.

Besides the tensors the file's metadata holds the config that it was saved with, the hash of the config file that it
replaces, and a hash over all of it. So one file, replaced at once, decides which adapter a folder holds, and a flipped
bit does not go unnoticed. Files without a seal, written by other tools, are read too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import CheckpointError, shown

MAX_HEADER_BYTES = 32 * 2**20
MAX_CONTAINERS = 200_000  # in a header or config
MAX_DIMENSIONS = 8
MAX_SIZE = 2**63 - 1
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
CONFIG, REPLACES, SEAL = "vpt_config", "vpt_replaces", "vpt_seal"


@dataclass(frozen=True)
class Weights:
    """An open weights file.

    Attributes:
        shapes: ``{name: shape}`` of its tensors.
        config: text of the config that it was saved with; replaces: hash of the config file it took the place of;
            both None without a seal.
    """

    path: Path
    file: BinaryIO
    entries: Mapping[str, Any]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self.entries.items()}

    @property
    def config(self) -> str | None:
        return self.metadata.get(CONFIG)

    @property
    def replaces(self) -> str | None:
        return self.metadata.get(REPLACES)

    def tensors(self) -> dict[str, Tensor]:
        """Reads the tensors.

        Raises:
            CheckpointError: they are not what was saved.
        """
        self.file.seek(0)
        content = self.file.read()
        data = memoryview(content)[8 + int.from_bytes(content[:8], "little") :]
        if SEAL in self.metadata and _seal(self.entries, self.metadata, data) != self.metadata[SEAL]:
            raise CheckpointError(f"'{self.path}' is damaged: its content is not what was saved. Get it again.")
        try:
            return safetensors.torch.load(content)
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"'{self.path}' must be a safetensors file, but is damaged: {error}.") from error


def pack(tensors: dict[str, Tensor], config: str, replaces: str) -> bytes:
    """The content of a sealed weights file."""
    plain = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    entries = json.loads(plain[8:start])
    metadata = {"format": "pt", CONFIG: config, REPLACES: replaces}
    metadata[SEAL] = _seal(entries, metadata, plain[start:])
    # Written here, since the library orders metadata at random: equal adapters shall be equal files.
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[start:]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _seal(entries: Mapping[str, Any], metadata: Mapping[str, str], data: bytes | memoryview) -> str:
    named = {name: value for name, value in metadata.items() if name != SEAL}
    head = json.dumps([dict(entries), named], sort_keys=True)
    seal = hashlib.sha256(head.encode() + b"\0")
    seal.update(data)
    return seal.hexdigest()


@contextmanager
def open_weights(path: Path) -> Iterator[Weights]:
    """Opens a weights file and checks its header.

    Raises:
        CheckpointError: it is no safetensors file, or its header does not describe its content exactly.
    """
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
            weights = _read_header(path, file)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"'{path}' must be a safetensors file, but is damaged, cut off, or something else: {error}. "
                "Pickled weights are never opened."
            ) from error
        yield weights


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object, strictly: no key twice, no NaN.

    Raises:
        ValueError, RecursionError: it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError(f"a key stands twice among {sorted(key for key, _ in pairs)}"[:500])
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    # Empty ones are a few bytes here, and thirty times as many in memory.
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"it must hold at most {MAX_CONTAINERS:,} lists and objects")
    values = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    if not isinstance(values, dict):
        raise ValueError(f"it must hold a JSON object, got {type(values).__name__}")
    if SURROGATE.search(content):  # half a pair of them is no text
        json.dumps(values, ensure_ascii=False).encode()
    return values


def _read_header(path: Path, file: BinaryIO) -> Weights:
    size = os.fstat(file.fileno()).st_size  # of this file, not of one that took its place
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header claims {length:,} bytes in a file of {size:,}")
    header = parse_json(file.read(length))
    metadata = header.pop("__metadata__", {})
    _check_header(header, metadata, size - 8 - length)
    return Weights(path, file, header, metadata)


def _check_header(entries: Mapping[str, Any], metadata: Any, size: int) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata must map names to strings")
    sealed = [name for name in metadata if name.startswith("vpt_")]
    if sealed and set(sealed) != {CONFIG, REPLACES, SEAL}:
        raise ValueError(f"its seal is incomplete: {shown(sorted(sealed))}")
    spans = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {shown(name)} must have a dtype, a shape and data_offsets")
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        is_known = isinstance(dtype, str) and dtype in ITEM_BYTES
        if not is_known or not _are_sizes(shape) or not _are_sizes(span) or len(span) != 2:
            raise ValueError(f"the entry of {shown(name)} is not valid: {shown(entry)}")
        if span[1] - span[0] != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{shown(name)} of shape {tuple(shape)} does not fill its {span[1] - span[0]:,} bytes")
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"its tensors must lie one behind the other, but one begins at {start:,}, not {end:,}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors end at {end:,}, its data at {size:,}")


def _are_sizes(values: Any) -> bool:
    """Whether they are a shape or offsets; of few and not too large numbers, whose product is quickly known."""
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)
