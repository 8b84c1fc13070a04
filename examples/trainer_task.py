"""What to tune to what, for the examples with ``transformers.Trainer``: the options that say so, and what they load."""

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
from images import public_name
from training import Settings, check_least

DIGITS_MIN_CROP, MIN_CROP = 0.7, 0.08  # a small part of a digit is no digit
KINDS = {"vit": "small ViT", "swin": "small Swin"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options for the model, the data and what is done to images."""
    add = parser.add_argument
    add("--model", help="a checkpoint's name on the Hub or its folder; left out, a small one is pretrained on digits")
    add("--data", help="your images: a folder of class folders, with or without train/ and test/, or a Hub data set")
    add("--image-column", help="of the data set; default: the one that holds images")
    add("--label-column", help="of the data set; default: the one that holds classes")
    add("--backbone", choices=KINDS, default="vit", help="what to pretrain on digits (default: vit)")
    add("--min-crop", type=float, help=f"smallest part of an image (default: {MIN_CROP}, digits: {DIGITS_MIN_CROP})")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror half of them (default: yes, but not the digits)")
    add("--epochs", type=int, help=f"default: {Settings.epochs}, digits: {digits.EPOCHS}")
    add("--batch-size", type=int, default=Settings.batch_size, help="of each device (default: %(default)s)")


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The command line with the defaults that depend on the data."""
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together: give both, or neither for the handwritten digits.")
    own = args.model is not None
    if args.epochs is None:
        args.epochs = Settings.epochs if own else digits.EPOCHS
    if args.min_crop is None:
        args.min_crop = MIN_CROP if own else DIGITS_MIN_CROP
    args.flip = own if args.flip is None else args.flip
    check_least(parser, args, epochs=1, batch_size=1)
    if not 0 < args.min_crop <= 1:
        parser.error(f"--min-crop must be above 0 and at most 1, got {args.min_crop:g}.")
    return args


@dataclass(frozen=True)
class Task:
    """A backbone and images to tune it to.

    Attributes:
        backbone: the checkpoint's name or folder.
        model, data: what to call them elsewhere, without where they lie on this machine.
        training_data: the data for a model card, where a folder's name must not pass for a data set of the Hub.
        processor: the checkpoint's image processor.
        splits: ``train`` and ``test``, with the columns ``image`` and ``label``.
        augmentation: for training images.
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
        """What the command line asks for. Of several processes, one pretrains and reads first.

        Raises:
            DataError: nothing usable is there.
        """
        state = PartialState(cpu=not torch.accelerator.is_available())  # as training_arguments has it
        if args.model:
            with state.main_process_first():
                splits = data.load_data(args.data, seed, args.image_column, args.label_column)
            backbone, model, name = args.model, public_name(args.model), public_name(args.data)
            training_data = f"{name} (a folder)" if Path(args.data).is_dir() else name
        else:
            backbone, model, name = str(args.output / "backbone"), KINDS[args.backbone], "handwritten digits 5 to 9"
            training_data = name
            if state.is_main_process and not Path(backbone, "model.safetensors").is_file():
                print(f"Pretraining a {model} on the handwritten digits 0 to 4.")
                digits.pretrain(args.backbone, Path(backbone), digits.PRETRAINING_EPOCHS, seed)
            state.wait_for_everyone()
            train_set, test_set = (data.from_images(images) for images in digits.new_task(seed))
            splits = data.DatasetDict(train=train_set, test=test_set)
        processor = data.load_image_processor(backbone)
        size = data.processed_size(processor)
        augmentation = RandomCropAndFlip(size, args.min_crop, args.flip, processor.resample)
        return cls(backbone, model, name, training_data, processor, splits, augmentation)

    @property
    def name(self) -> str:
        """What is tuned to what."""
        return f"{self.model}, {self.data}"

    @property
    def base_model(self) -> str | None:
        """The checkpoint's name on the Hub; None: it is not from there."""
        return None if Path(self.backbone).is_dir() else self.backbone

    @property
    def contents(self) -> dict[str, Any]:
        """What tells these images from others of the same name."""
        numbers = {f"{name} images": len(rows) for name, rows in self.splits.items()}
        return {**numbers, "classes": self.class_names}

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return self.splits["train"].features[data.LABEL].names

    def for_training(self, rows: data.Dataset) -> data.Dataset:
        """The rows as a model reads them, cropped at random."""
        return data.prepared(rows, self.processor, self.augmentation)

    def for_testing(self, rows: data.Dataset) -> data.Dataset:
        """The rows as a model reads them, resized by the image processor."""
        return data.prepared(rows, self.processor)
