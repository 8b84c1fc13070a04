"""A dataset without downloads: small backbones are pretrained on the digits 0 to 4 and fine-tuned on 5 to 9."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import ImageSet, Preprocessing
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from training import DEVICE, METHODS, Method, Settings, accuracy, predict, train
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

SIZE = 32
OLD, NEW = range(5), range(5, 10)  # classes of pretraining and of fine-tuning
PRETRAINING_EPOCHS = 15
EPOCHS = 25  # of fine-tuning; the dataset is small

# The defaults are for pretrained models of common widths; heads of narrow backbones need larger learning rates.
HEAD_LEARNING_RATES = {
    "linear": 1e-1, "vpt-shallow": 3e-2, "vpt-deep": 3e-2, "vpt-prefix": 3e-2, "vpt-prefix-bias": 3e-2,
}  # fmt: skip
SMALL_METHODS = {name: replace(METHODS[name], head_learning_rate=rate) for name, rate in HEAD_LEARNING_RATES.items()}


def load(size: int = SIZE) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, scans of 8 x 8 pixels, resized to ``size``."""
    digits, preprocessing = load_digits(), Preprocessing(size)
    scans = [Image.fromarray((scan * (255 / 16)).astype(np.uint8)) for scan in digits.images]
    images = torch.stack([preprocessing.load(scan) for scan in scans])
    return ImageSet(images, torch.from_numpy(digits.target).long(), tuple("0123456789"), preprocessing)


def new_task(seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images of the digits 5 to 9."""
    return load().select_classes(NEW).split(0.3, seed)


def small_backbone(kind: str) -> Any:
    """A randomly initialised ``"vit"`` or ``"swin"`` for the digits 0 to 4 that can be pretrained in seconds."""
    common: dict[str, Any] = {
        "image_size": SIZE,
        "num_labels": len(OLD),
        "initializer_range": 0.1,  # the default of 0.02 is for wider models
    }
    if kind == "swin":
        stages: dict[str, Any] = {
            "embed_dim": 32,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 2,
            "mlp_ratio": 2,
        }
        return SwinForImageClassification(SwinConfig(**common, **stages, patch_size=4))
    shape: dict[str, Any] = {
        "hidden_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    }
    return ViTForImageClassification(ViTConfig(**common, **shape, patch_size=8))


def pretrain(kind: str, folder: Path, epochs: int, seed: int) -> float:
    """Trains a small backbone from scratch and saves it. Returns its test accuracy in percent.

    Sets torch to one thread: more are no faster for such small models, and much slower on a busy machine.
    """
    torch.set_num_threads(1)
    train_set, test_set = load().select_classes(OLD).split(0.8, seed)
    torch.manual_seed(seed)
    model = small_backbone(kind).to(DEVICE)
    train(model, train_set, Settings(epochs), Method("Pretraining", None, 1e-3), seed)
    model.save_pretrained(folder)
    return accuracy(predict(model, test_set), test_set)
