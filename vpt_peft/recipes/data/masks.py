"""Semantic segmentation datasets: folders of images and of masks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from ...errors import ImageError
from ...images.files import is_image, open_image, orientation
from ..errors import RecipeError
from .folders import IMAGE, find_split
from .images import check_all, check_image

MASK = "mask"
VOID = 255  # label of unlabelled pixels; transformers' losses ignore it by default


def load_masks(folder: Path, ignore_index: int) -> tuple[DatasetDict, list[str]]:
    """Loads the splits ``train``, ``test`` and, if there is one, ``validation``, with the columns ``image`` and
    ``mask``. Also returns the names of the labels.

    Args:
        folder: with ``train/images``, ``train/masks``, ``test/images`` and ``test/masks``, or ``images/train`` and so
            on. A mask has the name of its image, one channel, and labels as values. An optional ``labels.txt`` names
            the labels, one per line.
        ignore_index: value of unlabelled pixels in the masks.

    Raises:
        RecipeError: files are missing or inconsistent.
    """
    if not folder.is_dir():
        raise RecipeError(f"--data must be a folder with images and masks, got '{folder}', which is not a folder.")
    pairs = {name: _pairs(folder, name) for name in ("train", "test")}
    if any(_find(folder, kind, "validation") for kind in ("images", "masks")):
        pairs["validation"] = _pairs(folder, "validation")
    if len(pairs["train"]) < 2:
        raise RecipeError(f"'{folder}' must contain at least 2 training images, got {len(pairs['train'])}.")
    both = [pair for found in pairs.values() for pair in found]
    check_all(check_image, [image for image, _ in both], "Checking images")
    images = {mask: image for image, mask in both}
    check = functools.partial(labels_in_mask, images=images, ignore_index=ignore_index)
    used = set().union(*check_all(check, list(images), "Checking masks"))
    if not used:
        raise RecipeError(f"The masks in '{folder}' must have labels other than {ignore_index}, got no others.")
    names = _label_names(folder, max(used) + 1)
    if len(names) < 2:
        raise RecipeError(
            f"The masks in '{folder}' must have at least two labels, got only 0 and {ignore_index}, which is ignored. "
            f"If {ignore_index} is a label, choose another --ignore-index, or another value in the masks."
        )
    features = Features({IMAGE: ImageFeature(), MASK: ImageFeature()})
    splits = {
        name: Dataset.from_dict({IMAGE: [image for image, _ in found], MASK: [mask for _, mask in found]}, features)
        for name, found in pairs.items()
    }
    return DatasetDict(splits), names


def read_mask(mask: Image.Image, ignore_index: int) -> Image.Image:
    """A mask, upright, with :data:`VOID` for unlabelled pixels, mode "L"."""
    labels = np.array(ImageOps.exif_transpose(mask))
    return Image.fromarray(np.where(labels == ignore_index, VOID, labels).astype(np.uint8))


def labels_in_mask(file: str, images: dict[str, str], ignore_index: int) -> set[int]:
    """The labels in a mask file, after checking that it fits its image.

    Args:
        images: the image file of each mask.
    """
    with open_image(images[file]) as image:
        width, height, turned = image.width, image.height, orientation(image)
    with open_image(file) as mask:
        if mask.mode not in ("L", "P"):
            raise ImageError(f"a mask must have one channel with labels from 0 to 254, got mode {mask.mode}")
        if abs(width * mask.height - height * mask.width) > max(width, height):  # more than rounding to a pixel
            raise ImageError(
                f"a mask must have the aspect ratio of its image, got {mask.width} x {mask.height} pixels, and "
                f"{width} x {height} in '{images[file]}'"
            )
        if orientation(mask) != turned:
            raise ImageError(
                f"a mask must have the EXIF orientation of its image, got {orientation(mask)}, and {turned} in "
                f"'{images[file]}'. Save both files upright"
            )
        return set(np.unique(np.array(mask)).tolist()) - {ignore_index}


def _find(folder: Path, kind: str, split: str) -> Path | None:
    """The folder of a split's images or masks."""
    for outer in (path for path in sorted(folder.iterdir()) if path.is_dir()):
        if find_split(outer.name) == split and (outer / kind).is_dir():
            return outer / kind
        if outer.name == kind:
            return next((path for path in sorted(outer.iterdir()) if find_split(path.name) == split), None)
    return None


def _pairs(folder: Path, split: str) -> list[tuple[str, str]]:
    """The image and mask files of a split."""
    found = [_find(folder, kind, split) for kind in ("images", "masks")]
    if found[0] is None or found[1] is None:
        kind = "images" if found[0] is None else "masks"
        raise RecipeError(
            f"Expected a folder '{folder / split / kind}' or '{folder / kind / split}', found neither. A folder for "
            "segmentation contains images and masks for train and test."
        )
    images, masks = (_by_name(path) for path in found if path)
    if not images or images.keys() != masks.keys():
        unpaired = sorted(images.keys() ^ masks.keys())[:5]
        raise RecipeError(
            f"Each image in '{found[0]}' needs a mask of the same name in '{found[1]}', got {len(images)} images and "
            f"{len(masks)} masks; unpaired: {', '.join(unpaired) or 'none'}."
        )
    return [(images[name], masks[name]) for name in images]


def _by_name(folder: Path) -> dict[str, str]:
    """Image files of a folder by their stems, which must be unique."""
    found: dict[str, str] = {}
    for path in sorted(filter(is_image, folder.iterdir())):
        if found.setdefault(path.stem, str(path)) != str(path):
            raise RecipeError(
                f"File names in a folder must differ without their extension, got {path} and {found[path.stem]}."
            )
    return found


def _label_names(folder: Path, num_labels: int) -> list[str]:
    path = folder / "labels.txt"
    lines: Sequence[str] = list(map(str, range(num_labels)))
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
    names = [name.strip() for name in lines if name.strip()]
    if len(names) < num_labels:
        raise RecipeError(f"'{path}' must contain {num_labels} label names, one per line, got {len(names)}.")
    return names
