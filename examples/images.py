"""Image classification datasets for the examples and benchmarks, loaded from folders or the Hugging Face Hub."""

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
from transformers import AutoConfig, CLIPImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin

from vpt_peft import CheckpointError
from vpt_peft.hub import check_model_name

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
TEST_SPLITS = ("test", "validation", "valid", "val")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
HALF = (0.5, 0.5, 0.5)


class DataError(ValueError):
    """The data, the model or an option of an example cannot be used."""


def get_image_size(model_name: str) -> tuple[int, int]:
    """Height and width of the images that a checkpoint was trained on.

    Raises:
        DataError: the checkpoint does not exist, or is not a vision model.
    """
    try:
        check_model_name(model_name)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    try:
        config = AutoConfig.from_pretrained(model_name)
        size = getattr(config, "vision_config", config).image_size  # of models of images and texts
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(
            f"The model must be the name or folder of a vision checkpoint, got '{model_name}': {error}"
        ) from error
    return (size, size) if isinstance(size, int) else tuple(size)


def display_name(source: str) -> str:
    """The last component of a folder's path, without the rest of the path; a name on the Hub is returned unchanged."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """An RGB image with 8 bits per channel, rotated according to its EXIF orientation.

    Raises:
        DataError: the image has more than 8 bits per channel: PIL would clip values above 255.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        low, high = image.getextrema()
        raise DataError(
            f"images must have 8 bits per channel, got mode {image.mode} with values from {low:g} to {high:g}. Convert "
            "them to 8 bits, scaled by the full range of their values"
        )
    return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Adds the name of an image to errors raised while it is read.

    Raises:
        DataError: the image cannot be read or used.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{name} cannot be read as an image: {error}. Repair or remove it.") from error
    except DataError as error:
        raise DataError(f"{name} cannot be used: {error}.") from error


@contextmanager
def open_image(file: Path) -> Iterator[Image.Image]:
    """Opens an image file; errors name it, see :func:`image_errors`."""
    with image_errors(f"'{file}'"), Image.open(file) as image:
        yield image


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scales uint8 images ``(num_images, 3, height, width)`` to 0..1 and normalises each channel."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - shift) / scale


def mean_and_std(model_name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a checkpoint's image processor; 0.5 and 0.5 if it has none.

    Raises:
        DataError: the image processor cannot be read.
    """
    # Only its settings are needed, and some versions of AutoImageProcessor require torchvision.
    settings = processor_settings(model_name)
    return tuple(settings.get("image_mean", HALF)), tuple(settings.get("image_std", HALF))


def processor_settings(model_name: str) -> dict[str, Any]:
    """Settings of a checkpoint's image processor; an empty dict and a message on stderr if it has none.

    Raises:
        DataError: there is, or may be, an image processor, but it cannot be read.
    """
    try:
        return ImageProcessingMixin.get_image_processor_dict(model_name)[0]
    except (OSError, ValueError) as error:
        if not _lacks_processor(model_name):
            raise DataError(
                f"The image processor of '{model_name}' cannot be read, and with a normalisation other than in "
                f"pretraining the results would be silently wrong: {error}"
            ) from error
    print(f"{model_name} has no image processor: normalising images with mean 0.5 and std 0.5.", file=sys.stderr)
    return {}


def _lacks_processor(model_name: str) -> bool:
    if os.path.isdir(model_name):
        return not any(Path(model_name, file).is_file() for file in PROCESSOR_FILES)
    if all(try_to_load_from_cache(model_name, file) is _CACHED_NO_EXIST for file in PROCESSOR_FILES):
        return True
    try:
        return not any(file_exists(model_name, file) for file in PROCESSOR_FILES)
    except Exception:  # the Hub cannot be reached
        return False


@dataclass(frozen=True)
class Preprocessing:
    """Input format of a backbone: square images of ``size`` pixels, scaled to 0..1, then normalised per channel."""

    size: int
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    @classmethod
    def from_checkpoint(cls, model_name: str, image_size: int | None = None) -> Preprocessing:
        """The preprocessing of a checkpoint, see :func:`mean_and_std`.

        Args:
            image_size: None: the checkpoint's.

        Raises:
            DataError: the checkpoint does not exist or is not a vision model, or its image processor cannot be read.
        """
        return cls(image_size or get_image_size(model_name)[0], *mean_and_std(model_name))

    def load(self, image: Image.Image) -> Tensor:
        """uint8 ``(3, size, size)``: the largest centred square of the image, resized."""
        square = ImageOps.fit(to_upright_rgb(image), (self.size, self.size), Image.Resampling.BICUBIC)
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
            DataError: one of the parts would be empty.
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
    """Loads training and test images from a folder or, if there is no such folder, from the Hugging Face Hub.

    Args:
        source: a folder with one folder of images per class, or with ``train`` and ``test`` of this structure; or the
            name of an image classification dataset on the Hub.
        seed: for the random split if there is no test split: one image in five is held out.

    Raises:
        DataError: the source is not a usable dataset.
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
        raise DataError(f"'{test}' must have only classes of '{folder / 'train'}', but also has {', '.join(unknown)}.")
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
            f"'{folder}' must contain a folder of images per class, for at least two classes, got the folders "
            f"{list(names)} with {len(files)} images. Supported file types: {' '.join(SUFFIXES)}."
        )
    images, labels = [], []
    for file, label in tqdm(files, desc=f"Reading {folder.name}", unit="image", leave=False):
        with open_image(file) as image:
            images.append(preprocessing.load(image))
        labels.append(label)
    return ImageSet(torch.stack(images), torch.tensor(labels), names, preprocessing)


def _from_hub(name: str, preprocessing: Preprocessing) -> ImageSet | tuple[ImageSet, ImageSet]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]  # optional dependency
    except ImportError as error:
        raise DataError(
            f"There is no folder '{name}'. To load it as a dataset from the Hugging Face Hub, install the datasets "
            "package: pip install datasets"
        ) from error
    try:
        splits = load_dataset(name)
    except (OSError, ValueError) as error:
        raise DataError(f"'{name}' is not a folder, and could not be loaded as a dataset: {error}") from error
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
