"""Data without downloads: scikit-learn's handwritten digits as folders of images, and as scenes with masks.

Small backbones are pretrained on the digits 0 to 4, and fine-tuned on 5 to 9.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

SIZE = 32
OLD, NEW = range(5), range(5, 10)  # classes of pretraining and of fine-tuning
SCENE, DIGIT = 64, 28  # side length of a scene and of a digit in it, in pixels
VOID = 255
SCENES = 100  # for training, and as many for testing
PRETRAINING_SCENES = 400

SCANS = Image.Resampling.BICUBIC


def write_digits(folder: Path, digits: Sequence[int], train_share: float, seed: int) -> Path:
    """Writes scikit-learn's 1,797 handwritten digits, scans of 8 x 8 pixels, as images of 32 x 32.

    Args:
        folder: gets ``train`` and ``test`` with one folder per digit. An existing one is kept.
        train_share: fraction of each digit's images for training; the others are for testing.
    """
    if folder.is_dir():
        return folder
    scans = load_digits()
    chosen = np.flatnonzero(np.isin(scans.target, list(digits)))
    train, test = train_test_split(
        chosen, train_size=train_share, random_state=seed, stratify=scans.target[chosen]
    )  # fmt: skip
    part = folder.with_name(f"{folder.name}.part")
    for split, indices in (("train", train), ("test", test)):
        for index in indices:
            file = part / split / str(scans.target[index]) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            scan = Image.fromarray((scans.images[index] * (255 / 16)).astype(np.uint8))
            scan.resize((SIZE, SIZE), SCANS).save(file)
    part.rename(folder)
    return folder


def write_scenes(folder: Path, digits: Sequence[int], sizes: dict[str, int], seed: int) -> Path:
    """Writes synthetic scenes: four coloured handwritten digits on a noisy background.

    Label 0 is the background, followed by ``digits`` in order. Blurred edges of digits are unlabelled.

    Args:
        folder: gets ``images`` and ``masks`` for each split, and ``labels.txt``. An existing one is kept.
        sizes: number of scenes by split.
    """
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    for offset, (split, number) in enumerate(sizes.items()):
        images, masks = draw_scenes(digits, number, seed + offset)
        for kind, arrays in (("images", images), ("masks", masks)):
            (part / split / kind).mkdir(parents=True, exist_ok=True)
            for index, array in enumerate(arrays):
                Image.fromarray(array).save(part / split / kind / f"{index}.png")
    (part / "labels.txt").write_text("\n".join(["background", *map(str, digits)]) + "\n", encoding="utf-8")
    part.rename(folder)
    return folder


def draw_scenes(digits: Sequence[int], number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scenes, uint8 ``(number, 64, 64, 3)``, and their labels, uint8 ``(number, 64, 64)``."""
    scans, random = load_digits(), np.random.default_rng(seed)
    images = np.empty((number, SCENE, SCENE, 3), dtype=np.uint8)
    masks = np.zeros((number, SCENE, SCENE), dtype=np.uint8)
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
    return images, masks


def small_classifier(kind: str) -> Any:
    """A randomly initialised ``"vit"`` or ``"swin"`` for the digits 0 to 4 that can be pretrained in seconds."""
    from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

    common: dict[str, Any] = {
        "image_size": SIZE,
        "num_labels": len(OLD),
        "initializer_range": 0.1,  # the default of 0.02 is for wider models
    }
    if kind == "swin":
        stages: dict[str, Any] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2}
        return SwinForImageClassification(SwinConfig(**common, **stages, mlp_ratio=2, patch_size=4))
    shape: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(**common, **shape, intermediate_size=192, patch_size=8))


def small_segmenter_backbone() -> Any:
    """The config of a small Swin for scenes."""
    from transformers import SwinConfig

    return SwinConfig(
        image_size=SCENE, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4, mlp_ratio=2,
        drop_path_rate=0.0, initializer_range=0.1,
    )  # fmt: skip
