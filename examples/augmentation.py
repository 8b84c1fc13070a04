"""Random resized crops and horizontal flips, with torchvision if it is installed and with PIL otherwise."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from PIL import Image, ImageOps

RATIO = (3 / 4, 4 / 3)  # aspect ratios, width / height
ATTEMPTS = 10


def has_torchvision() -> bool:
    """Whether torchvision, an optional dependency, is installed."""
    return importlib.util.find_spec("torchvision") is not None


class RandomCropAndFlip:
    """Random resized crop, and horizontal flip with probability 0.5.

    Random numbers come from torch's default generator, so that seeds and Trainer's checkpoints cover them.

    Args:
        size: ``(height, width)`` of the result.
        min_crop: lower bound of the crop's area as a fraction of the image's.
        flip: random horizontal flips, for classes that do not depend on orientation.
        resample: PIL's resampling filter, as in image processors (2 bilinear, 3 bicubic).
        torchvision: whether to use torchvision; None: if it is installed.
    """

    def __init__(
        self,
        size: tuple[int, int],
        min_crop: float = 0.08,
        flip: bool = True,
        resample: int = Image.Resampling.BICUBIC,
        torchvision: bool | None = None,
    ) -> None:
        if not 0 < min_crop <= 1:
            raise ValueError(f"min_crop must be a fraction of the area, above 0 and at most 1, got {min_crop}.")
        self.size, self.min_crop, self.flip, self.resample = size, min_crop, flip, Image.Resampling(resample)
        self.transform = (
            self._torchvision_transform() if torchvision or (torchvision is None and has_torchvision()) else None
        )

    def _torchvision_transform(self) -> Any:
        from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-not-found]  # optional dependency

        mode = InterpolationMode[self.resample.name]
        crop = v2.RandomResizedCrop(self.size, scale=(self.min_crop, 1), ratio=RATIO, interpolation=mode)
        return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if self.flip else 0)])

    def __call__(self, image: Image.Image) -> Image.Image:
        """Transforms an image of any size."""
        if self.transform is not None:
            return self.transform(image)
        left, top, width, height = self.random_box(*image.size)
        box = (left, top, left + width, top + height)
        cropped = image.resize(self.size[::-1], self.resample, box=box)
        return ImageOps.mirror(cropped) if self.flip and torch.rand(()) < 0.5 else cropped

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """``(left, top, width, height)`` of a crop: area uniformly, aspect ratio log-uniformly distributed.

        If no such crop fits after 10 attempts, the largest centred one with an allowed aspect ratio.
        """
        for _ in range(ATTEMPTS):
            area = width * height * torch.empty(()).uniform_(self.min_crop, 1).item()
            ratio = math.exp(torch.empty(()).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).item())
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(torch.randint(width - w + 1, ()))
                return left, int(torch.randint(height - h + 1, ())), w, h
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        return (width - w) // 2, (height - h) // 2, w, h
