"""Image sets for the examples and benchmarks, read from folders or from the Hugging Face Hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, file_exists, try_to_load_from_cache
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig
from transformers.image_processing_base import ImageProcessingMixin

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TEST_SPLITS = ("test", "validation", "valid", "val")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
HALF = (0.5, 0.5, 0.5)


class DataError(ValueError):
    """The images cannot be used. Says what was expected, what came and what to do."""


def image_size_of(model_name: str) -> tuple[int, int]:
    """Height and width of the images that a checkpoint was trained on.

    Raises:
        DataError: there is no such checkpoint, or it is not for images.
    """
    try:
        size = AutoConfig.from_pretrained(model_name).image_size
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"The model must be the name or folder of a checkpoint for images, got '{model_name}': {error}"
        ) from error
    return (size, size) if isinstance(size, int) else tuple(size)


def public_name(source: str) -> str:
    """The name of a folder, without where it lies on this machine; a name on the Hub stays as it is."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def upright(image: Image.Image) -> Image.Image:
    """An image as it is meant to be looked at: turned as its camera noted, in three channels of 8 bits.

    Raises:
        DataError: it has more bits, of which PIL would cut off all above 255.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        least, most = image.getextrema()
        raise DataError(
            f"images must have 8 bits a channel, got mode {image.mode} with values from {least:g} to {most:g}. Convert "
            "them, scaled by the range that their values can have"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """While an image is read: what is wrong with it is told with its name.

    Raises:
        DataError: it cannot be read or used.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{name} must be an image, but cannot be read: {error}. Repair or remove it.") from error
    except DataError as error:
        raise DataError(f"{name} cannot be used: {error}.") from error


@contextmanager
def opened(file: Path) -> Iterator[Image.Image]:
    """An image file, :func:`reading` it."""
    with reading(f"'{file}'"), Image.open(file) as image:
        yield image


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to what a backbone reads, both ``(num_images, 3, height, width)``: 0..1, then normalised a channel."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - shift) / scale


def mean_and_std(model_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A checkpoint's own mean and standard deviation, or 0.5 and 0.5 where it comes without an image processor.

    Raises:
        DataError: its image processor cannot be read.
    """
    # Its settings are all that is needed; some versions of AutoImageProcessor cannot do without torchvision.
    settings = processor_settings(model_name)
    return tuple(settings.get("image_mean", HALF)), tuple(settings.get("image_std", HALF))


def processor_settings(model_name: str) -> dict[str, Any]:
    """The settings of a checkpoint's image processor; none, and a note, where it comes without one.

    Raises:
        DataError: there is one, or may be one, but it cannot be read.
    """
    try:
        return ImageProcessingMixin.get_image_processor_dict(model_name)[0]
    except (OSError, ValueError) as error:
        if not _comes_without_processor(model_name):
            raise DataError(
                f"The image processor of '{model_name}' must be readable, since images normalised otherwise than in "
                f"pretraining give wrong results without a word: {error}"
            ) from error
    print(f"{model_name} comes without an image processor: images are normalised by 0.5 and 0.5.", file=sys.stderr)
    return {}


def _comes_without_processor(model_name: str) -> bool:
    if os.path.isdir(model_name):
        return not any(Path(model_name, file).is_file() for file in PROCESSOR_FILES)
    if all(try_to_load_from_cache(model_name, file) is _CACHED_NO_EXIST for file in PROCESSOR_FILES):
        return True
    try:
        return not any(file_exists(model_name, file) for file in PROCESSOR_FILES)
    except Exception:  # the Hub cannot be asked
        return False


@dataclass(frozen=True)
class Preprocessing:
    """What a backbone expects: square images of ``size`` pixels, scaled to 0..1, then normalised a channel."""

    size: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    @classmethod
    def of(cls, model_name: str, image_size: int | None = None) -> Preprocessing:
        """The checkpoint's own mean and standard deviation, or 0.5 and 0.5 where it comes without a processor.

        Args:
            image_size: None: the checkpoint's own.

        Raises:
            DataError: there is no such checkpoint, it is not for images, or its processor cannot be read.
        """
        own = image_size_of(model_name)[0]
        return cls(image_size or own, *mean_and_std(model_name))

    def load(self, image: Image.Image) -> Tensor:
        """``(3, size, size)`` bytes: the largest square in the middle of the image, resized."""
        square = ImageOps.fit(upright(image), (self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)


@dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: ``(num_images, 3, size, size)`` bytes.
        labels: ``(num_images,)`` positions in ``class_names``.
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.images)

    def pixel_values(self, images: Tensor) -> Tensor:
        """Bytes to what the backbone reads, both ``(num_images, 3, size, size)``."""
        return normalised(images, self.preprocessing.mean, self.preprocessing.std)

    def take(self, indices: Tensor) -> ImageSet:
        """The images at ``indices``."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def only(self, classes: Sequence[int]) -> ImageSet:
        """The images of some classes, which are counted anew from 0."""
        kept = self.take(torch.isin(self.labels, torch.tensor(classes)).nonzero().flatten())
        labels = torch.tensor([list(classes).index(label) for label in kept.labels.tolist()])
        return replace(kept, labels=labels, class_names=tuple(self.class_names[label] for label in classes))

    def split(self, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
        """Two disjoint sets, drawn at random: ``share`` of each class's images, and the rest.

        Raises:
            DataError: there are so few that one of them would be empty.
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
            raise DataError(
                f"There must be more images of a class, got {len(self)} of {len(self.class_names)} classes, of which "
                f"{share:.0%} and the rest are {len(parts[0])} and {len(parts[1])} images."
            )
        return self.take(parts[0]), self.take(parts[1])


def augment(images: Tensor, generator: torch.Generator, flip: bool = False) -> Tensor:
    """Shifts each image by up to a sixteenth of its size, its edges repeated, and mirrors half of them if ``flip``."""
    size = images.shape[-1]
    reach = size // 16
    positions = torch.arange(size)
    shifts = torch.randint(-reach, reach + 1, (len(images), 2), generator=generator)
    mirrored = torch.rand(len(images), generator=generator) < (0.5 if flip else 0)
    changed = torch.empty_like(images)
    for index, (down, right) in enumerate(shifts.tolist()):
        rows, columns = ((positions + shift).clamp(0, size - 1) for shift in (down, right))
        columns = columns.flip(0) if mirrored[index] else columns
        changed[index] = images[index][:, rows][:, :, columns]
    return changed


def load_images(source: str, preprocessing: Preprocessing, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images from a folder or, where there is no such folder, from the Hugging Face Hub.

    Args:
        source: a folder that holds one folder of images for each class, or ``train`` and ``test`` with such folders;
            or the name of an image classification dataset on the Hub.
        seed: where there is no test split, one image in five is drawn for it at random.

    Raises:
        DataError: nothing usable is there.
    """
    splits = _from_folder(Path(source), preprocessing) if os.path.isdir(source) else _from_hub(source, preprocessing)
    return splits if isinstance(splits, tuple) else splits.split(0.8, seed)


def _from_folder(folder: Path, preprocessing: Preprocessing) -> ImageSet | tuple[ImageSet, ImageSet]:
    test = next((folder / name for name in TEST_SPLITS if (folder / name).is_dir()), None)
    if not (folder / "train").is_dir() or test is None:
        return _from_class_folders(folder, _class_names(folder), preprocessing)
    names = _class_names(folder / "train")
    unknown = sorted(set(_class_names(test)) - set(names))
    if unknown:
        raise DataError(
            f"'{test}' must hold the classes of '{folder / 'train'}', but has {', '.join(unknown)} besides."
        )
    train_set = _from_class_folders(folder / "train", names, preprocessing)
    return train_set, _from_class_folders(test, names, preprocessing)


def _class_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _from_class_folders(folder: Path, names: tuple[str, ...], preprocessing: Preprocessing) -> ImageSet:
    files = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).glob("*"))
        if file.suffix.lower() in SUFFIXES
    ]
    if len({label for _, label in files}) < 2:
        raise DataError(
            f"'{folder}' must hold a folder of images for each class and at least two classes; it has the folders "
            f"{list(names)} with {len(files)} images. Known endings: {' '.join(SUFFIXES)}."
        )
    images, labels = [], []
    for file, label in tqdm(files, desc=f"Reading {folder.name}", unit="image", leave=False):
        with opened(file) as image:
            images.append(preprocessing.load(image))
        labels.append(label)
    return ImageSet(torch.stack(images), torch.tensor(labels), names, preprocessing)


def _from_hub(name: str, preprocessing: Preprocessing) -> ImageSet | tuple[ImageSet, ImageSet]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]  # optional
    except ImportError as error:
        raise DataError(
            f"There is no folder '{name}'. To read it as a dataset from the Hugging Face Hub, "
            "first install the datasets package: pip install datasets"
        ) from error
    try:
        splits = load_dataset(name)
    except (OSError, ValueError) as error:
        raise DataError(f"'{name}' is no folder, and no dataset of this name could be loaded: {error}") from error
    if "train" not in splits:
        raise DataError(f"The dataset '{name}' must have a split named train, got {', '.join(splits)}.")
    test = next((split for split in TEST_SPLITS if split in splits), None)
    train_set = _from_hub_split(splits["train"], name, preprocessing)
    return (train_set, _from_hub_split(splits[test], name, preprocessing)) if test else train_set


def _from_hub_split(rows: Any, name: str, preprocessing: Preprocessing) -> ImageSet:
    kinds = {type(feature).__name__: column for column, feature in reversed(rows.features.items())}
    if "Image" not in kinds or "ClassLabel" not in kinds:
        raise DataError(
            f"The dataset '{name}' must have a column of type Image and one of type ClassLabel, "
            f"got {dict(rows.features)}."
        )
    images = [preprocessing.load(row[kinds["Image"]]) for row in tqdm(rows, desc=f"Reading {name}", leave=False)]
    label = kinds["ClassLabel"]
    return ImageSet(
        torch.stack(images), torch.tensor(list(rows[label])), tuple(rows.features[label].names), preprocessing
    )
