"""Images with masks: read from folders or made from digits, scored by mean IoU, and shown as a picture."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from images import SUFFIXES, DataError, opened, upright
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor

VOID = 255  # the label of pixels that have none: what transformers' losses ignore by default
SCENE, DIGIT = 64, 28  # pixels a side


@dataclass(frozen=True)
class SegmentationSet:
    """Images and their masks in memory.

    Attributes:
        images: ``(num_images, 3, height, width)`` bytes; masks: ``(num_images, height, width)`` labels, or VOID.
        label_names: one for each label.
    """

    images: Tensor
    masks: Tensor
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def load_folder(
    folder: Path, ignore_index: int, size: tuple[int, int] | None
) -> tuple[SegmentationSet, SegmentationSet]:
    """The images to train on and to test on.

    Args:
        folder: with ``train/images``, ``train/masks``, ``test/images`` and ``test/masks``, or ``images/train`` and so
            on. A mask has its image's name, one channel, and labels as values. ``labels.txt``, if it is there, names
            the labels, one a line.
        ignore_index: the value in the masks of pixels without label.
        size: ``(height, width)`` to bring all to; None: that of the first image.

    Raises:
        DataError: something is missing or does not fit.
    """
    splits = []
    for split in ("train", "test"):
        pairs = _pairs(folder, split)
        if size is None:
            with opened(pairs[0][0]) as first:
                size = upright(first).size[::-1]
        images, masks = (torch.stack(both) for both in zip(*(_read(*pair, size) for pair in pairs), strict=True))
        splits.append((images, masks.masked_fill(masks == ignore_index, VOID)))
    if len(splits[0][0]) < 2:
        raise DataError(f"There must be at least 2 training images in '{folder}', got {len(splits[0][0])}.")
    used = torch.cat([masks[masks != VOID].unique() for _, masks in splits])
    if not len(used):
        raise DataError(f"The masks in '{folder}' must have labels other than {ignore_index}, but have none.")
    names = _label_names(folder, int(used.max()) + 1)
    if len(names) < 2:
        raise DataError(
            f"The masks in '{folder}' must have two labels or more, got 0 alone besides {ignore_index}, which counts "
            f"as no label. If it is one, change it in the masks, or choose another --ignore-index."
        )
    train, test = (SegmentationSet(images, masks, names) for images, masks in splits)
    return train, test


def _pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """The images of a split with their masks."""
    both = [[folder / split / kind, folder / kind / split] for kind in ("images", "masks")]
    found = [next((path for path in paths if path.is_dir()), None) for paths in both]
    if found[0] is None or found[1] is None:
        missing = both[0 if found[0] is None else 1]
        raise DataError(f"Expected a folder '{missing[0]}' or '{missing[1]}', found neither.")
    images, masks = (_by_name(one) for one in found if one)
    if not images or images.keys() != masks.keys():
        odd = sorted(images.keys() ^ masks.keys())[:5]
        raise DataError(
            f"Each image in '{found[0]}' needs a mask of its name in '{found[1]}', got {len(images)} images and "
            f"{len(masks)} masks; without the other: {', '.join(odd) or 'none'}."
        )
    return [(images[name], masks[name]) for name in images]


def _by_name(folder: Path) -> dict[str, Path]:
    """A folder's images by their names without endings, of which no two may be the same."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and found.setdefault(path.stem, path) != path:
            raise DataError(f"Images of a folder must differ in more than their endings, got {path} and another.")
    return found


def _read(image_path: Path, mask_path: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """An image and its mask, brought to a size. The mask may be coarser than the image, but not of another shape."""
    with opened(image_path) as image:
        width, height, turn = image.width, image.height, _turn(image)
        resized = upright(image).resize(size[::-1], Image.Resampling.BILINEAR)
    with opened(mask_path) as mask:
        if mask.mode not in ("L", "P"):
            raise DataError(f"a mask must have one channel with labels from 0 to 254, got mode {mask.mode}")
        if abs(width * mask.height - height * mask.width) > max(width, height):  # more than a pixel's rounding
            raise DataError(
                f"a mask must be of its image's shape, got {mask.width} x {mask.height} pixels for {width} x {height} "
                f"in '{image_path}'"
            )
        if _turn(mask) != turn:
            raise DataError(
                f"a mask must be turned as its image, got orientation {_turn(mask)} and {turn} in '{image_path}', as "
                "its camera noted. Save both as they are to be looked at"
            )
        labels = ImageOps.exif_transpose(mask).resize(size[::-1], Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1), torch.from_numpy(np.array(labels)).long()


def _turn(image: Image.Image) -> int:
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def _label_names(folder: Path, number: int) -> tuple[str, ...]:
    path = folder / "labels.txt"
    names = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [str(n) for n in range(number)]
    names = [name.strip() for name in names if name.strip()]
    if len(names) < number:
        raise DataError(f"'{path}' must name {number} labels, one a line, got {len(names)}.")
    return tuple(names)


def digit_scenes(digits: Sequence[int], number: int, seed: int) -> SegmentationSet:
    """Scenes made on the spot: four handwritten digits in colours on noise of another colour.

    Labels are the background and one for each of ``digits``, in order; a digit's blurred edge is VOID.
    """
    scans, random = load_digits(), np.random.default_rng(seed)
    images = np.empty((number, SCENE, SCENE, 3), dtype=np.uint8)
    masks = np.zeros((number, SCENE, SCENE), dtype=np.int64)
    for image, mask in zip(images, masks, strict=True):
        ground = random.uniform(0, 150, 3)
        image[:] = np.clip(ground + random.normal(0, 20, image.shape), 0, 255)
        for corner in range(4):  # one somewhere in each quarter, so that none covers another
            label = int(random.integers(len(digits)))
            scan = scans.images[random.choice(np.flatnonzero(scans.target == digits[label]))] / 16
            ink = np.array(Image.fromarray(scan.astype(np.float32)).resize((DIGIT, DIGIT), Image.Resampling.BILINEAR))
            top, left = random.integers(0, SCENE // 2 - DIGIT, 2) + SCENE // 2 * np.array(divmod(corner, 2))
            place = np.s_[top : top + DIGIT, left : left + DIGIT]
            image[place] = image[place] * (1 - ink[..., None]) + random.uniform(150, 255, 3) * ink[..., None]
            mask[place] = np.where(ink > 0.4, label + 1, np.where(ink > 0.2, VOID, 0))
    names = ("background", *map(str, digits))
    return SegmentationSet(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks), names)


@dataclass(frozen=True)
class Scores:
    """How well masks were predicted, each from 0 to 1; ``iou`` has NaN for labels in neither masks nor predictions."""

    mean_iou: float
    pixel_accuracy: float
    iou: tuple[float, ...]


def score(predictions: Tensor, masks: Tensor, num_labels: int) -> Scores:
    """Intersection over union of each label, their mean, and the share of pixels that are right.

    Pixels whose mask is VOID do not count, and labels in neither masks nor predictions are left out of the mean.

    Args:
        predictions, masks: labels, of equal shape.
    """
    counts = masks != VOID
    pairs = masks[counts] * num_labels + predictions[counts]
    confusion = torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels).double()
    right = confusion.diagonal()
    iou = right / (confusion.sum(0) + confusion.sum(1) - right)
    return Scores(iou.nanmean().item(), (right.sum() / confusion.sum()).item(), tuple(iou.tolist()))


def picture(images: Tensor, masks: Tensor, predictions: Tensor, num_labels: int, scale: int = 2) -> Image.Image:
    """A row for each image: the image, its mask and the prediction. Each label has a colour, VOID is black."""
    palette = torch.zeros(256, 3, dtype=torch.uint8)
    for label in range(num_labels):
        colour = colorsys.hsv_to_rgb(label * 0.618 % 1, (0.9, 0.55)[label % 2], (1.0, 0.75, 0.5)[label % 3])
        palette[label] = torch.tensor([round(255 * part) for part in colour])
    columns = [images.permute(0, 2, 3, 1), palette[masks], palette[predictions]]
    rows = torch.cat(columns, dim=2).flatten(0, 1)
    whole = Image.fromarray(rows.numpy())
    return whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)
