"""Handwritten digits in memory: small backbones are pretrained on the digits 0 to 4 and fine-tuned on 5 to 9."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from harness import DEVICE, Settings, accuracy, predict, train
from image_sets import ImageSet, Preprocessing
from PIL import Image
from sklearn.datasets import load_digits  # type: ignore[import-untyped]

from vpt_peft.recipes.data.digits import NEW, OLD, SIZE, small_classifier
from vpt_peft.recipes.training.methods import Method

PRETRAINING_EPOCHS = 15
EPOCHS = 25  # of fine-tuning; the dataset is small


def load(size: int = SIZE) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits, scans of 8 x 8 pixels, resized to ``size``."""
    digits, preprocessing = load_digits(), Preprocessing(size)
    scans = [Image.fromarray((scan * (255 / 16)).astype(np.uint8)) for scan in digits.images]
    images = torch.stack([preprocessing.load(scan) for scan in scans])
    return ImageSet(images, torch.from_numpy(digits.target).long(), tuple("0123456789"), preprocessing)


def new_task(seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and test images of the digits 5 to 9."""
    return load().select_classes(NEW).split(0.3, seed)


def pretrain(kind: str, folder: Path, epochs: int, seed: int) -> float:
    """Trains a small backbone from scratch and saves it. Returns its test accuracy in percent.

    Sets torch to one thread: more are no faster for such small models, and much slower on a busy machine.
    """
    torch.set_num_threads(1)
    train_set, test_set = load().select_classes(OLD).split(0.8, seed)
    torch.manual_seed(seed)
    model = small_classifier(kind).to(DEVICE)
    train(model, train_set, Settings(epochs), Method("Pretraining", None, 1e-3), seed)
    model.save_pretrained(folder)
    return accuracy(predict(model, test_set), test_set)
