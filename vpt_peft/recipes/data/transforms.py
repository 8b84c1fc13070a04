"""From stored images to model inputs: image processors and augmentation."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub import _CACHED_NO_EXIST, file_exists, try_to_load_from_cache
from PIL import Image, ImageOps
from transformers import AutoConfig, ViTImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin

from ...errors import CheckpointError
from ...hub import check_model_name
from ...images.files import image_errors, to_rgb
from ...images.processors import read_processor
from ..errors import RecipeError
from .folders import IMAGE, LABEL
from .masks import MASK, read_mask

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
RATIO = (3 / 4, 4 / 3)  # aspect ratios of crops, width / height
ATTEMPTS = 10

Size = tuple[int, int]  # height, width


# -- image processors -------------------------------------------------------------------------------------------------


def load_image_processor(model_name: str, size: Size | None = None, revision: str | None = None) -> Any:
    """The image processor of a checkpoint; if it has none, one with mean 0.5 and standard deviation 0.5.

    Args:
        size: height and width of its output; None: those that the checkpoint was trained on.
        revision: of the checkpoint's repository; None: the newest.

    Raises:
        RecipeError: the checkpoint does not exist or is not a vision model, or its image processor cannot be read.
    """
    height, width = size or image_size(model_name, revision)
    settings = {"size": {"height": height, "width": width}}
    if not processor_settings(model_name, revision):
        return ViTImageProcessorPil(**settings)
    try:
        processor = read_processor(model_name, revision=revision)
        if processed_size(processor) == (height, width):
            return processor
        return read_processor(model_name, revision=revision, do_center_crop=False, **settings)
    except (OSError, ValueError) as error:
        raise RecipeError(f"'{model_name}' must have an image processor of transformers: {error}") from error


def processed_size(processor: Any) -> Size:
    """``(height, width)`` of an image processor's output."""
    crops = getattr(processor, "do_center_crop", False)
    size = dict(processor.crop_size if crops else processor.size)
    side = size.get("shortest_edge")
    height, width = size.get("height") or side, size.get("width") or side
    assert height and width
    return height, width


def image_size(model_name: str, revision: str | None = None) -> Size:
    """Height and width of the images that a checkpoint was trained on.

    Raises:
        RecipeError: the checkpoint does not exist, or is not a vision model.
    """
    try:
        check_model_name(model_name)
        config = AutoConfig.from_pretrained(model_name, revision=revision)
        inner = getattr(config, "vision_config", None) or getattr(config, "backbone_config", None)
        size = getattr(config if hasattr(config, "image_size") else inner, "image_size")  # noqa: B009  of any config
    except CheckpointError as error:
        raise RecipeError(str(error)) from error
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"The model must be the name or folder of a vision checkpoint, got '{model_name}': {error}"
        ) from error
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def processor_settings(model_name: str, revision: str | None = None) -> dict[str, Any]:
    """Settings of a checkpoint's image processor; an empty dict and a message on stderr if it has none.

    Raises:
        RecipeError: there is, or may be, an image processor, but it cannot be read.
    """
    try:
        return ImageProcessingMixin.get_image_processor_dict(model_name, revision=revision)[0]
    except (OSError, ValueError) as error:
        if not _lacks_processor(model_name, revision):
            raise RecipeError(
                f"The image processor of '{model_name}' cannot be read, and with a normalisation other than in "
                f"pretraining the results would be silently wrong: {error}"
            ) from error
    print(f"{model_name} has no image processor: normalising images with mean 0.5 and std 0.5.", file=sys.stderr)
    return {}


def has_processor(model_name: str) -> bool:
    """Whether a folder or repository has a file of an image processor."""
    return not _lacks_processor(model_name, None)


def _lacks_processor(model_name: str, revision: str | None) -> bool:
    if os.path.isdir(model_name):
        return not any(Path(model_name, file).is_file() for file in PROCESSOR_FILES)
    if all(try_to_load_from_cache(model_name, file, revision=revision) is _CACHED_NO_EXIST for file in PROCESSOR_FILES):
        return True
    try:
        return not any(file_exists(model_name, file, revision=revision) for file in PROCESSOR_FILES)
    except Exception:  # the Hub cannot be reached
        return False


# -- augmentation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomCropAndFlip:
    """Random resized crop, and horizontal flip with probability 0.5, of an image and its mask, if there is one.

    Random numbers come from torch's default generator, so that seeds and Trainer's checkpoints cover them.

    Attributes:
        size: ``(height, width)`` of the result.
        min_crop: lower bound of the crop's area as a fraction of the image's; 1: the whole image.
        flip: random horizontal flips, for classes that do not depend on orientation.
        resample: PIL's resampling filter of images, as in image processors (2 bilinear, 3 bicubic).
    """

    size: Size
    min_crop: float = 0.08
    flip: bool = True
    resample: int = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if not 0 < self.min_crop <= 1:
            raise RecipeError(f"min_crop must be a fraction of the area, above 0 and at most 1, got {self.min_crop}.")

    def __call__(self, image: Image.Image, mask: Image.Image | None = None) -> tuple[Image.Image, Image.Image | None]:
        """Transforms an image of any size, and a mask of its aspect ratio."""
        width, height = image.size
        left, top, w, h = (0, 0, width, height) if self.min_crop == 1 else self.random_box(width, height)
        mirrored = self.flip and bool(torch.rand(()) < 0.5)

        def cropped(picture: Image.Image, resample: int) -> Image.Image:
            x, y = picture.width / width, picture.height / height
            box = (left * x, top * y, (left + w) * x, (top + h) * y)
            result = picture.resize(self.size[::-1], Image.Resampling(resample), box=box)
            return ImageOps.mirror(result) if mirrored else result

        return cropped(image, self.resample), None if mask is None else cropped(mask, Image.Resampling.NEAREST)

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
        w, h = min(width, max(1, round(height * RATIO[1]))), min(height, max(1, round(width / RATIO[0])))
        return (width - w) // 2, (height - h) // 2, w, h


# -- model inputs -----------------------------------------------------------------------------------------------------


def to_inputs(
    rows: Dataset, processor: Any, augmentation: RandomCropAndFlip | None = None, ignore_index: int = 255
) -> Dataset:
    """The rows with ``pixel_values`` and ``labels``, computed on access: classes ``(batch,)`` or, if the rows have
    masks, the labels of pixels ``(batch, height, width)``.

    Args:
        augmentation: for training, replaces the processor's resizing and cropping.
        ignore_index: value of unlabelled pixels in masks.
    """
    mode = rows.features[IMAGE].mode
    for column in (IMAGE, MASK):
        if column in rows.features:
            rows = rows.cast_column(column, ImageFeature(rows.features[column].mode, decode=False))
    if MASK in rows.features and augmentation is None:  # images are resized with their masks
        augmentation = RandomCropAndFlip(processed_size(processor), min_crop=1, flip=False, resample=processor.resample)
    return rows.with_transform(Transform(processor, augmentation, ImageFeature(mode), ignore_index))


@dataclass(frozen=True)
class Transform:
    """Maps a batch of rows to model inputs. A class, so that it can be pickled for worker processes."""

    processor: Any
    augmentation: Callable[..., tuple[Image.Image, Image.Image | None]] | None
    feature: ImageFeature
    ignore_index: int

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """``pixel_values`` and ``labels`` of a batch of rows."""
        pictures = [self._decoded(stored) for stored in rows[IMAGE]]
        masks: list[Image.Image | None] = [None] * len(pictures)
        if MASK in rows:
            masks = [self._mask(stored) for stored in rows[MASK]]
        kwargs: dict[str, Any] = {"return_tensors": "pt"}
        if self.augmentation is not None:
            pairs = [self.augmentation(*pair) for pair in zip(pictures, masks, strict=True)]
            pictures, masks = [picture for picture, _ in pairs], [mask for _, mask in pairs]
            kwargs |= {"do_resize": False, "do_center_crop": False}
        labels = [torch.from_numpy(np.array(mask)).long() for mask in masks] if MASK in rows else rows[LABEL]
        return {"pixel_values": self.processor(pictures, **kwargs)["pixel_values"], "labels": labels}

    def _decoded(self, stored: dict[str, Any]) -> Image.Image:
        """Decodes a stored image by the dataset's feature."""
        with image_errors(f"'{stored['path']}'" if stored["path"] else "An image of the dataset"):
            return to_rgb(self.feature.decode_example(stored))

    def _mask(self, stored: dict[str, Any]) -> Image.Image:
        with image_errors(f"'{stored['path']}'"):
            return read_mask(ImageFeature().decode_example(stored), self.ignore_index)
