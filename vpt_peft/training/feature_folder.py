"""A folder of cached features: what they were made of, shards of safetensors, and the data set that reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from .. import io
from ..errors import AdapterError, CheckpointError, safe_repr, truncate_list

DESCRIPTION = "features.json"
FEATURES, DIGEST, KEY = "cached_features", "image_digest", "cache_key"
SHARD_BYTES = 64 * 2**20
MAX_SHARD_ROWS = 512  # an interrupt loses no more than a shard
MAX_LISTED = 5


@dataclass(frozen=True)
class FeatureFolder:
    """A folder of cached features. Row ``draw · num_images + image`` belongs to one augmentation of one image.

    Attributes:
        description: what the features were made of, as JSON types.
        num_images, draws: numbers of images, and of augmentations of each.
        rows_per_shard: number of rows of each file but the last.
    """

    path: Path
    description: Mapping[str, Any]
    num_images: int
    draws: int
    rows_per_shard: int

    @classmethod
    def prepare(cls, path: Path, description: Mapping[str, Any], row_bytes: int) -> FeatureFolder:
        """Opens a folder, or creates it with a description.

        Args:
            row_bytes: size of the features of one image.

        Raises:
            CheckpointError: the folder has other features, or other files.
        """
        file = path / DESCRIPTION
        own = json.loads(json.dumps(description))
        if file.is_file():
            _check_same(path, _read_description(file), own)
        elif any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise CheckpointError(
                f"folder must be empty, or have cached features, got '{path}' with other files. Choose another folder."
            )
        else:
            io.atomic_write(file, json.dumps(own, indent=1).encode())
        rows = max(1, min(MAX_SHARD_ROWS, SHARD_BYTES // max(1, row_bytes)))
        return cls(path, own, own["images"], own["augmentations"], rows)

    def shards(self) -> Iterator[range]:
        """The rows of each shard."""
        total = self.num_images * self.draws
        for start in range(0, total, self.rows_per_shard):
            yield range(start, min(total, start + self.rows_per_shard))

    def file(self, rows: range) -> Path:
        """The file of a shard."""
        return self.path / f"features-{rows.start:08d}.safetensors"

    def write(self, rows: range, values: Sequence[Mapping[str, Tensor]]) -> None:
        """Writes a shard. A killed process leaves none of it.

        Args:
            values: of each row: features, digest, and fields such as ``labels``.

        Raises:
            AdapterError: the fields of images differ in names, types or shapes.
        """
        kinds = {tuple((name, value.dtype, tuple(value.shape)) for name, value in row.items()) for row in values}
        if len(kinds) > 1:
            raise AdapterError(
                f"The fields of all images must have the same names, types and shapes, got {safe_repr(kinds)}. Pad or "
                "remove them in the data set."
            )
        with torch.autocast("cpu", enabled=False):  # it would convert bytes
            tensors = {name: torch.stack([row[name] for row in values]) for name in values[0]}
        io.atomic_write(self.file(rows), safetensors.torch.save(tensors))

    def read_digests(self, rows: range) -> Tensor | None:
        """The digests of a shard's images, ``(num_rows, 16)``; None: the shard is missing or damaged."""
        if not self.file(rows).is_file():
            return None
        try:
            with safe_open(self.file(rows), framework="pt") as shard:
                digests: Tensor = shard.get_tensor(DIGEST)
        except (OSError, SafetensorError):
            return None
        return digests if len(digests) == len(rows) else None

    def open_shard(self, rows: range) -> dict[str, Tensor]:
        """The tensors of a shard, mapped into memory and read from disk on access."""
        with safe_open(self.file(rows), framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys() if name != DIGEST}  # noqa: SIM118


class CachedFeatures(Dataset[dict[str, Any]]):
    """The features of images, made by :func:`~vpt_peft.training.cache_features`.

    An item is a dict with ``cached_features``, a tensor of the stored precision; ``cache_key``, a number that tells the
    model which cache it is from; and the other fields of the image, such as ``labels``. ``vpt(**batch)`` takes a batch.

    Each time that an image is read, its next augmentation is returned, and after the last one the first again: with one
    pass over the data set for each epoch, epoch ``e`` has augmentation ``e % augmentations`` of every image. That holds
    with worker processes too, which share the counts.

    Attributes:
        folder: where the features are.
        augmentations: number of augmentations of each image.
    """

    def __init__(self, folder: FeatureFolder, key: int) -> None:
        self.folder = folder.path
        self.augmentations = folder.draws
        self._folder = folder
        self._key = key
        self._reads = torch.zeros(folder.num_images, dtype=torch.int64).share_memory_()
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self._folder.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}.")
        image = index % len(self)
        draw = int(self._reads[image]) % self.augmentations
        self._reads[image] += 1
        return self._read(draw * len(self) + image)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next pass over the data set that of an epoch, counted from 0: to resume training, for example."""
        self._reads.fill_(epoch)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # other processes map the files themselves

    def _read(self, row: int) -> dict[str, Any]:
        size = self._folder.rows_per_shard
        number, offset = divmod(row, size)
        if number not in self._open:
            start, total = number * size, len(self) * self.augmentations
            self._open[number] = self._folder.open_shard(range(start, min(total, start + size)))
        tensors = self._open[number]
        return {**{name: tensor[offset].clone() for name, tensor in tensors.items()}, KEY: self._key}


def _read_description(file: Path) -> dict[str, Any]:
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read: {error}. Delete its folder to cache again.") from error
    if not isinstance(saved, dict):
        raise CheckpointError(f"'{file}' must have a JSON object, got {safe_repr(saved)}. Delete its folder.")
    return saved


def _check_same(path: Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises CheckpointError if the features in a folder were made of something else."""
    changed = [name for name in own if saved.get(name) != own[name]]
    if not changed:
        return
    different: list[str] = []
    if "backbone" in changed:
        before, now = (io.Fingerprint.from_dict(values.get("backbone")) for values in (saved, own))
        different += before.differences(now)
    different += [
        f"{name} {safe_repr(saved.get(name))}, now {safe_repr(own[name])}"
        for name in changed
        if name != "backbone" and not (different and name == "weights")
    ]
    raise CheckpointError(
        f"'{path}' has cached features of something else: {truncate_list(different, MAX_LISTED)}. Choose another "
        "folder, or delete this one to cache again."
    )


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Creates a folder, and excludes other processes from writing to it."""
    path.mkdir(parents=True, exist_ok=True)
    with io.lock_folder(path):
        yield path
