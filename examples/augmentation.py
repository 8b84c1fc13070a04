"""Random crops and mirroring of training images, by torchvision where it is installed and by PIL where it is not."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from PIL import Image, ImageOps

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


def has_torchvision() -> bool:
    """Whether torchvision can be imported; it is not needed."""
    return importlib.util.find_spec("torchvision") is not None


class RandomCropAndFlip:
    """Cuts a random part out of an image, resizes it, and mirrors half of the images.

    All that is random is drawn from torch's generator, so that seeds and Trainer's checkpoints cover it.

    Args:
        size: ``(height, width)`` of the result.
        min_crop: the smallest part that is cut out, as share of the image's area; 1: nearly all of it.
        flip: mirror half of the images; only where a mirrored image keeps its class.
        resample: how PIL resizes, as image processors name it (2 bilinear, 3 bicubic).
        torchvision: whether to use it; None: where it is installed.
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
            raise ValueError(f"min_crop must be a share of the image, above 0 and at most 1, got {min_crop}.")
        self.size, self.min_crop, self.flip, self.resample = size, min_crop, flip, Image.Resampling(resample)
        self.transform = self._of_torchvision() if torchvision or (torchvision is None and has_torchvision()) else None

    def _of_torchvision(self) -> Any:
        from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-not-found]  # optional

        mode = InterpolationMode[self.resample.name]
        crop = v2.RandomResizedCrop(self.size, scale=(self.min_crop, 1), ratio=RATIO, interpolation=mode)
        return v2.Compose([crop, v2.RandomHorizontalFlip(0.5 if self.flip else 0)])

    def __call__(self, image: Image.Image) -> Image.Image:
        """An image of any size to one of ``size``."""
        if self.transform is not None:
            return self.transform(image)
        left, top, width, height = self.random_box(*image.size)
        part = (left, top, left + width, top + height)
        cropped = image.resize(self.size[::-1], self.resample, box=part)
        return ImageOps.mirror(cropped) if self.flip and torch.rand(()) < 0.5 else cropped

    def random_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """``(left, top, width, height)`` of a part of an image: its area evenly, its shape log-evenly distributed.

        Where no such part fits, the largest one of an allowed shape in the middle.
        """
        for _ in range(ATTEMPTS):
            area = width * height * torch.empty(()).uniform_(self.min_crop, 1).item()
            shape = math.exp(torch.empty(()).uniform_(math.log(RATIO[0]), math.log(RATIO[1])).item())
            w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
            if 0 < w <= width and 0 < h <= height:
                left = int(torch.randint(width - w + 1, ()))
                return left, int(torch.randint(height - h + 1, ())), w, h
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        return (width - w) // 2, (height - h) // 2, w, h
