"""Image classification datasets in memory, for the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPImageProcessorPil

from vpt_peft.images.files import image_errors, to_rgb
from vpt_peft.recipes.data.folders import IMAGE, LABEL, read_splits
from vpt_peft.recipes.data.transforms import image_size as image_size_of
from vpt_peft.recipes.data.transforms import processor_settings
from vpt_peft.recipes.errors import RecipeError

HALF = (0.5, 0.5, 0.5)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scales uint8 images ``(num_images, 3, height, width)`` to 0..1 and normalises each channel."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - shift) / scale


@dataclass(frozen=True)
class Preprocessing:
    """Input format of a backbone: square images of ``size`` pixels, scaled to 0..1, then normalised per channel."""

    size: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    @classmethod
    def from_checkpoint(cls, model_name: str, image_size: int | None = None) -> Preprocessing:
        """The preprocessing of a checkpoint; with mean and standard deviation 0.5 if it has no image processor.

        Args:
            image_size: None: the checkpoint's.

        Raises:
            RecipeError: the checkpoint does not exist or is not a vision model, or its image processor cannot be read.
        """
        size = image_size_of(model_name)[0]
        settings = processor_settings(model_name)
        mean, std = (tuple(settings.get(name, HALF)) for name in ("image_mean", "image_std"))
        return cls(image_size or size, mean, std)

    def load(self, image: Image.Image) -> Tensor:
        """uint8 ``(3, size, size)``: the largest centred square of the image, resized."""
        square = ImageOps.fit(to_rgb(image), (self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    def image_processor(self) -> Any:
        """An image processor with this preprocessing, to be saved with a model. It resizes before it crops, so that its
        output may differ by rounding."""
        return CLIPImageProcessorPil(
            size={"shortest_edge": self.size},
            crop_size={"height": self.size, "width": self.size},
            resample=Image.Resampling.BICUBIC,
            image_mean=list(self.mean),
            image_std=list(self.std),
        )


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: uint8 ``(num_images, 3, size, size)``.
        labels: ``(num_images,)`` indices into ``class_names``.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def pixel_values(self, images: Tensor) -> Tensor:
        """Normalises uint8 images to the model's input, both ``(num_images, 3, size, size)``."""
        return normalize(images, self.preprocessing.mean, self.preprocessing.std)

    def select(self, indices: Tensor) -> ImageSet:
        """The images at ``indices``."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def select_classes(self, classes: Sequence[int]) -> ImageSet:
        """The images of some classes, relabelled from 0."""
        subset = self.select(torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten())
        labels = torch.tensor([list(classes).index(label) for label in subset.labels.tolist()])
        return replace(subset, labels=labels, class_names=tuple(self.class_names[label] for label in classes))

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """A random, stratified split: ``share`` of each class's images, and the rest.

        Raises:
            RecipeError: one of the parts would be empty.
        """
        generator = torch.Generator().manual_seed(seed)
        first, second = [], []
        for label in range(len(self.class_names)):
            members = (self.labels == label).nonzero().flatten()
            members = members[torch.randperm(len(members), generator=generator)]
            cut = round(share * len(members))
            first.append(members[:cut])
            second.append(members[cut:])
        parts = torch.cat(first), torch.cat(second)
        if not all(map(len, parts)):
            raise RecipeError(
                f"Expected more images per class, got {len(self)} images of {len(self.class_names)} classes: a split "
                f"of {share:.0%} has parts of {len(parts[0])} and {len(parts[1])} images."
            )
        return self.select(parts[0]), self.select(parts[1])


def augment(images: Tensor, generator: torch.Generator, flip: bool = False) -> Tensor:
    """Random shifts by up to a sixteenth of the image size, padded with edge pixels; optional horizontal flips."""
    size = images.shape[-1]
    max_shift = size // 16
    positions = torch.arange(size)
    shifts = torch.randint(-max_shift, max_shift + 1, (len(images), 2), generator=generator)
    mirrored = torch.rand(len(images), generator=generator) < (0.5 if flip else 0)
    changed = torch.empty_like(images)
    for index, (down, right) in enumerate(shifts.tolist()):
        rows, columns = ((positions + shift).clamp(0, size - 1) for shift in (down, right))
        columns = columns.flip(0) if mirrored[index] else columns
        changed[index] = images[index][:, rows][:, :, columns]
    return changed


def load_images(source: str, preprocessing: Preprocessing, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images from a folder or the Hugging Face Hub.

    Args:
        source: see :func:`~vpt_peft.recipes.data.folders.read_splits`.
        seed: for the random split if there is no test split: one image in five is held out.

    Raises:
        RecipeError: the source is not a usable dataset.
    """
    splits = read_splits(source)
    train_set = _to_memory(splits["train"], preprocessing)
    test = next((splits[name] for name in ("test", "validation") if name in splits), None)
    return train_set.split(0.8, seed) if test is None else (train_set, _to_memory(test, preprocessing))


def _to_memory(rows: Any, preprocessing: Preprocessing) -> ImageSet:
    images = []
    for row in tqdm(rows, desc="Reading images", unit="image", leave=False):
        with image_errors("An image of the dataset"):
            images.append(preprocessing.load(row[IMAGE]))
    names = tuple(rows.features[LABEL].names)
    return ImageSet(torch.stack(images), torch.tensor(list(rows[LABEL])), names, preprocessing)
