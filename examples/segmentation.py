"""Semantic segmentation datasets from folders or synthetic, mean IoU, and plots of predictions."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from images import SUFFIXES, DataError, open_image, to_upright_rgb
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

VOID = 255  # label of unlabelled pixels; transformers' losses ignore it by default
SCENE, DIGIT = 64, 28  # side length in pixels


@dataclass(frozen=True)
class SegmentationSet:
    """Images and their masks in memory.

    Attributes:
        images: uint8 ``(num_images, 3, height, width)``.
        masks: labels or VOID, ``(num_images, height, width)``.
        label_names: by label.
    """

    images: Tensor
    masks: Tensor
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_folder(
    folder: Path, ignore_index: int, size: tuple[int, int] | None
) -> tuple[SegmentationSet, SegmentationSet]:
    """Loads training and test images.

    Args:
        folder: with ``train/images``, ``train/masks``, ``test/images`` and ``test/masks``, or ``images/train`` and so
            on. A mask has the name of its image, one channel, and labels as values. An optional ``labels.txt`` names
            the labels, one per line.
        ignore_index: value of unlabelled pixels in the masks.
        size: ``(height, width)`` to resize to; None: the size of the first image.

    Raises:
        DataError: files are missing or inconsistent.
    """
    splits = []
    for split in ("train", "test"):
        pairs = _pairs(folder, split)
        if size is None:
            with open_image(pairs[0][0]) as first:
                size = to_upright_rgb(first).size[::-1]
        images, masks = (torch.stack(both) for both in zip(*(_read(*pair, size) for pair in pairs), strict=True))
        splits.append((images, masks.masked_fill(masks == ignore_index, VOID)))
    if len(splits[0][0]) < 2:
        raise DataError(f"'{folder}' must contain at least 2 training images, got {len(splits[0][0])}.")
    used = torch.cat([masks[masks != VOID].unique() for _, masks in splits])
    if not len(used):
        raise DataError(f"The masks in '{folder}' must have labels other than {ignore_index}, got no others.")
    names = _label_names(folder, int(used.max()) + 1)
    if len(names) < 2:
        raise DataError(
            f"The masks in '{folder}' must have at least two labels, got only 0 and {ignore_index}, which is ignored. "
            f"If {ignore_index} is a label, choose another --ignore-index, or another value in the masks."
        )
    train, test = (SegmentationSet(images, masks, names) for images, masks in splits)
    return train, test


def _pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """The image and mask files of a split."""
    both = [[folder / split / kind, folder / kind / split] for kind in ("images", "masks")]
    found = [next((path for path in paths if path.is_dir()), None) for paths in both]
    if found[0] is None or found[1] is None:
        missing = both[0 if found[0] is None else 1]
        raise DataError(f"Expected a folder '{missing[0]}' or '{missing[1]}', found neither.")
    images, masks = (_by_name(path) for path in found if path)
    if not images or images.keys() != masks.keys():
        unpaired = sorted(images.keys() ^ masks.keys())[:5]
        raise DataError(
            f"Each image in '{found[0]}' needs a mask of the same name in '{found[1]}', got {len(images)} images and "
            f"{len(masks)} masks; unpaired: {', '.join(unpaired) or 'none'}."
        )
    return [(images[name], masks[name]) for name in images]


def _by_name(folder: Path) -> dict[str, Path]:
    """Image files of a folder by their stems, which must be unique."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and found.setdefault(path.stem, path) != path:
            raise DataError(
                f"File names in a folder must differ without their extension, got {path} and {found[path.stem]}."
            )
    return found


def _read(image_path: Path, mask_path: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Reads an image and its mask and resizes both. The mask may have another resolution, but the same aspect ratio."""
    with open_image(image_path) as image:
        width, height, orientation = image.width, image.height, _orientation(image)
        resized = to_upright_rgb(image).resize(size[::-1], Image.Resampling.BILINEAR)
    with open_image(mask_path) as mask:
        if mask.mode not in ("L", "P"):
            raise DataError(f"a mask must have one channel with labels from 0 to 254, got mode {mask.mode}")
        if abs(width * mask.height - height * mask.width) > max(width, height):  # more than rounding to a pixel
            raise DataError(
                f"a mask must have the aspect ratio of its image, got {mask.width} x {mask.height} pixels, and "
                f"{width} x {height} in '{image_path}'"
            )
        if _orientation(mask) != orientation:
            raise DataError(
                f"a mask must have the EXIF orientation of its image, got {_orientation(mask)}, and {orientation} in "
                f"'{image_path}'. Save both files upright"
            )
        labels = ImageOps.exif_transpose(mask).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1), torch.from_numpy(np.array(labels)).long()


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _label_names(folder: Path, num_labels: int) -> tuple[str, ...]:
    path = folder / "labels.txt"
    names = (
        path.read_text(encoding="utf-8").split("\n") if path.is_file() else [str(label) for label in range(num_labels)]
    )
    names = [name.strip() for name in names if name.strip()]
    if len(names) < num_labels:
        raise DataError(f"'{path}' must contain {num_labels} label names, one per line, got {len(names)}.")
    return tuple(names)


def digit_scenes(digits: Sequence[int], num_images: int, seed: int) -> SegmentationSet:
    """Synthetic scenes: four coloured handwritten digits on a noisy background.

    Label 0 is the background, followed by ``digits`` in order. Blurred edges of digits are VOID.
    """
    scans, random = load_digits(), np.random.default_rng(seed)
    images = np.empty((num_images, SCENE, SCENE, 3), dtype=np.uint8)
    masks = np.zeros((num_images, SCENE, SCENE), dtype=np.int64)
    for image, mask in zip(images, masks, strict=True):
        background = random.uniform(0, 150, 3)
        image[:] = np.clip(background + random.normal(0, 20, image.shape), 0, 255)
        for corner in range(4):  # one per quadrant, without overlaps
            label = int(random.integers(len(digits)))
            scan = scans.images[random.choice(np.flatnonzero(scans.target == digits[label]))] / 16
            ink = np.array(Image.fromarray(scan.astype(np.float32)).resize((DIGIT, DIGIT), Image.Resampling.BILINEAR))
            top, left = random.integers(0, SCENE // 2 - DIGIT, 2) + SCENE // 2 * np.array(divmod(corner, 2))
            region = np.s_[top : top + DIGIT, left : left + DIGIT]
            image[region] = image[region] * (1 - ink[..., None]) + random.uniform(150, 255, 3) * ink[..., None]
            mask[region] = np.where(ink > 0.4, label + 1, np.where(ink > 0.2, VOID, 0))
    names = ("background", *map(str, digits))
    return SegmentationSet(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks), names)


@dataclass(frozen=True)
class Scores:
    """Segmentation metrics from 0 to 1. ``iou``, by label, is NaN for labels in neither masks nor predictions."""

    mean_iou: float
    pixel_accuracy: float
    iou: tuple[float, ...]


def score(predictions: Tensor, masks: Tensor, num_labels: int) -> Scores:
    """Computes the IoU of each label, mean IoU and pixel accuracy.

    VOID pixels are ignored, and labels in neither masks nor predictions are left out of the mean.

    Args:
        predictions, masks: labels, of equal shape.
    """
    labelled = masks != VOID
    pairs = masks[labelled] * num_labels + predictions[labelled]
    confusion = torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels).double()
    correct = confusion.diagonal()
    iou = correct / (confusion.sum(0) + confusion.sum(1) - correct)
    return Scores(iou.nanmean().item(), (correct.sum() / confusion.sum()).item(), tuple(iou.tolist()))


def draw_predictions(
    images: Tensor, masks: Tensor, predictions: Tensor, num_labels: int, scale: int = 2
) -> Image.Image:
    """One row per image: the image, its mask and the prediction. Each label has a colour; VOID is black."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    for label in range(num_labels):
        colour = colorsys.hsv_to_rgb(label * 0.618 % 1, (0.9, 0.55)[label % 2], (1.0, 0.75, 0.5)[label % 3])
        palette[label] = torch.tensor([round(255 * part) for part in colour])
    columns = [images.permute(0, 2, 3, 1), palette[masks], palette[predictions]]
    rows = torch.cat(columns, dim=2).flatten(0, 1)
    drawn = Image.fromarray(rows.numpy())
    return drawn.resize((drawn.width * scale, drawn.height * scale), Image.Resampling.NEAREST)
