"""Backbone and dataset of the examples with ``transformers.Trainer``, and the command-line options for them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import torch
import trainer_data as data
from accelerate import PartialState
from augmentation import RandomCropAndFlip
from images import display_name
from training import Settings, check_minimum

DIGITS_MIN_CROP, MIN_CROP = 0.7, 0.08  # small crops of a digit are unrecognisable
KINDS = {"vit": "small ViT", "swin": "small Swin"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds options for the model, the dataset and the augmentation."""
    add = parser.add_argument
    add(
        "--model",
        help="a checkpoint's name on the Hub or its folder (default: a small one is pretrained on digits)",
    )
    add("--data", help="a folder with one folder per class, with or without train/ and test/, or a dataset on the Hub")
    add("--image-column", help="default: the column with images")
    add("--label-column", help="default: the column with classes")
    add("--backbone", choices=KINDS, default="vit", help="backbone to pretrain on digits (default: vit)")
    add("--min-crop", type=float, help=f"minimum area of random crops (default: {MIN_CROP}, digits: {DIGITS_MIN_CROP})")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (default: yes, digits: no)")
    add("--epochs", type=int, help=f"default: {Settings.epochs}, digits: {digits.EPOCHS}")
    add("--batch-size", type=int, default=Settings.batch_size, help="per device (default: %(default)s)")


def set_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Checks the options and sets defaults that depend on the dataset."""
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data must be given together, or neither of them for the handwritten digits.")
    has_data = args.model is not None
    if args.epochs is None:
        args.epochs = Settings.epochs if has_data else digits.EPOCHS
    if args.min_crop is None:
        args.min_crop = MIN_CROP if has_data else DIGITS_MIN_CROP
    args.flip = has_data if args.flip is None else args.flip
    check_minimum(parser, args, epochs=1, batch_size=1)
    if not 0 < args.min_crop <= 1:
        parser.error(f"--min-crop must be above 0 and at most 1, got {args.min_crop:g}.")
    return args


@dataclass(frozen=True)
class Task:
    """A backbone and the dataset to fine-tune it on.

    Attributes:
        backbone: the checkpoint's name or folder.
        model, data: their names for reports, without paths of this machine.
        training_data: the dataset's name for the model card, where a folder must not look like a dataset on the Hub.
        processor: the checkpoint's image processor.
        splits: ``train`` and ``test``, with the columns ``image`` and ``label``.
        augmentation: of training images.
    """

    backbone: str
    model: str
    data: str
    training_data: str
    processor: Any
    splits: data.DatasetDict
    augmentation: RandomCropAndFlip

    @classmethod
    def load(cls, args: argparse.Namespace, seed: int) -> Task:
        """Loads backbone and dataset. With several processes, the main one pretrains and downloads first.

        Raises:
            DataError: the model or the dataset cannot be used.
        """
        state = PartialState(cpu=not torch.accelerator.is_available())  # as in training_arguments
        if args.model:
            with state.main_process_first():
                splits = data.load_data(args.data, seed, args.image_column, args.label_column)
            backbone, model, name = args.model, display_name(args.model), display_name(args.data)
            training_data = f"{name} (a folder)" if Path(args.data).is_dir() else name
        else:
            backbone, model, name = str(args.output / "backbone"), KINDS[args.backbone], "handwritten digits 5 to 9"
            training_data = name
            if state.is_main_process and not Path(backbone, "model.safetensors").is_file():
                print(f"Pretraining a {model} on the handwritten digits 0 to 4.")
                digits.pretrain(args.backbone, Path(backbone), digits.PRETRAINING_EPOCHS, seed)
            state.wait_for_everyone()
            train_set, test_set = (data.to_dataset(images) for images in digits.new_task(seed))
            splits = data.DatasetDict(train=train_set, test=test_set)
        processor = data.load_image_processor(backbone)
        size = data.processed_size(processor)
        augmentation = RandomCropAndFlip(size, args.min_crop, args.flip, processor.resample)
        return cls(backbone, model, name, training_data, processor, splits, augmentation)

    @property
    def name(self) -> str:
        """Model and dataset."""
        return f"{self.model}, {self.data}"

    @property
    def base_model(self) -> str | None:
        """The checkpoint's name on the Hub; None: a local folder."""
        return None if Path(self.backbone).is_dir() else self.backbone

    @property
    def contents(self) -> dict[str, Any]:
        """Properties that distinguish datasets of the same name."""
        counts = {f"{name} images": len(rows) for name, rows in self.splits.items()}
        return {**counts, "classes": self.class_names}

    @property
    def class_names(self) -> list[str]:
        """Class names by label."""
        return self.splits["train"].features[data.LABEL].names

    def for_training(self, rows: data.Dataset) -> data.Dataset:
        """Model inputs with augmentation."""
        return data.with_preprocessing(rows, self.processor, self.augmentation)

    def for_testing(self, rows: data.Dataset) -> data.Dataset:
        """Model inputs without augmentation."""
        return data.with_preprocessing(rows, self.processor)
