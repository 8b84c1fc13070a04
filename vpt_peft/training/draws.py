"""The images of a data set, each in several augmentations that are drawn the same way each time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import AdapterError, safe_repr
from ..model.arguments import check_pixel_values

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Draw:
    """One augmentation of one image.

    Attributes:
        pixels: ``(num_channels, height, width)``, or a video.
        fields: the other fields of the item, such as ``labels``.
        digest: hash of all of them, ``(16,)`` bytes.
    """

    pixels: Tensor
    fields: dict[str, Tensor]
    digest: Tensor


@dataclass(frozen=True)
class Draws(Dataset[Draw]):
    """Augmentation ``row // num_images`` of image ``row % num_images``, determined by the row and a seed.

    Attributes:
        images: a data set with a length; an item is a dict with pixels by ``input_name``, a tuple of pixels and label,
            or pixels.
        input_dims: number of dimensions of a batch of pixels.
    """

    images: Any
    input_name: str
    input_dims: int
    seed: int

    def __getitem__(self, row: int) -> Draw:
        draw, image = divmod(row, len(self.images))
        with _seeded(f"{self.seed} {draw} {image}"):
            item = self.images[image]
        if isinstance(item, Tensor):
            item = {self.input_name: item}
        elif isinstance(item, tuple | list) and len(item) == 2:
            item = {self.input_name: item[0], "labels": item[1]}
        if not isinstance(item, Mapping) or self.input_name not in item:
            got = f"the keys {', '.join(map(str, item))}" if isinstance(item, Mapping) else safe_repr(item)
            raise AdapterError(
                f"Item {image} of the data set must be a dict with {self.input_name}, a pair of pixels and label, or "
                f"pixels, got {got}. Apply the image processor in the data set."
            )
        pixels = torch.as_tensor(item[self.input_name])
        check_pixel_values(pixels.unsqueeze(0), self.input_dims, f"{self.input_name} of an item, with a batch of 1,")
        fields = {
            name: self._as_tensor(name, value)
            for name, value in item.items()
            if name != self.input_name and value is not None
        }
        return Draw(pixels, fields, _digest({self.input_name: pixels, **fields}))

    def _as_tensor(self, name: str, value: Any) -> Tensor:
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise AdapterError(
                f"The fields of an item must be numbers or tensors, got {name}={safe_repr(value)}. Remove it from the "
                "items of the data set."
            ) from error


def _digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """Hash of named tensors, ``(16,)`` bytes."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(as_bytes(tensor))
    return torch.frombuffer(bytearray(found.digest()), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on any device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Seeds the default random generators of torch, numpy and Python, and restores them."""
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        torch.default_generator.manual_seed(seed >> 1)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
