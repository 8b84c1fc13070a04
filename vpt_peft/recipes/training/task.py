"""What is fine-tuned on what: a backbone and a dataset, of classification or segmentation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict

from ..data import digits
from ..data.folders import LABEL, first_per_class, load_data, split
from ..data.masks import VOID, load_masks
from ..data.transforms import RandomCropAndFlip, Size, load_image_processor, processed_size, to_inputs
from ..errors import RecipeError
from ..report.metrics import Metric
from ..sources import check_source
from .methods import METHODS, SEGMENTATION_METHODS, SMALL_METHODS, Method
from .models import (
    fit_to_size,
    gets_upernet,
    labels_of,
    load_classifier,
    load_segmenter,
    save_upernet,
    say,
    stored_dtype,
)
from .pretraining import pretrain_classifier, pretrain_segmenter
from .trainer import Settings, drops_last

SMALL_BACKBONES = {"vit": "small ViT", "swin": "small Swin"}
SMALL_DATA = {"classification": "handwritten digits 5 to 9", "segmentation": "scenes with the digits 5 to 9"}
MIN_CROPS = {"classification": 0.08, "segmentation": 0.5}
SMALL_MIN_CROPS = {"classification": 0.7, "segmentation": 1.0}  # small crops of a digit are unrecognisable
BATCH_SIZES = {"classification": Settings.batch_size, "segmentation": 8}
TASK_TYPES = {"classification": "IMAGE_CLASSIFICATION", "segmentation": "SEMANTIC_SEGMENTATION"}
WITH_HEAD = ("ForImageClassification", "ForImageClassificationWithTeacher", "ForSemanticSegmentation")
SMALL_EPOCHS = {"classification": 25, "segmentation": 15}  # the datasets are small


@dataclass(frozen=True)
class Task:
    """A backbone and the dataset to fine-tune it on.

    Attributes:
        kind: "classification" or "segmentation".
        backbone: the checkpoint's name or folder.
        model, data: their names for reports, without paths of this machine.
        training_data: the dataset's name for the model card, where a folder must not look like a dataset on the Hub.
        processor: the checkpoint's image processor, for the size of the images.
        splits: ``train``, ``test`` and possibly ``validation``.
        label_names: by label.
        augmentation: of training images.
        ignore_index: value of unlabelled pixels in masks.
        is_small: the backbone was pretrained by us.
    """

    kind: str
    backbone: str
    model: str
    data: str
    training_data: str
    processor: Any
    splits: DatasetDict
    label_names: list[str]
    augmentation: RandomCropAndFlip
    ignore_index: int = VOID
    is_small: bool = False

    @classmethod
    def load(cls, args: argparse.Namespace, settings: Settings, seed: int) -> Task:
        """Loads backbone and dataset. With several processes, the main one pretrains and downloads first.

        Raises:
            RecipeError: the model or the dataset cannot be used.
        """
        has_data = args.model is not None
        if has_data:
            check_source(args.model)
        source = args.data if has_data else str(args.output / "data")
        with settings.process_state().main_process_first():
            if not has_data:
                _write_digits(args, Path(source), seed)
            splits, names = _load_splits(args, source, seed)
        if args.max_train_samples is not None:
            splits["train"] = first_per_class(splits["train"], args.max_train_samples, seed)
        backbone, model = _prepare_backbone(args, names, settings, seed)
        processor = load_image_processor(backbone, None if args.image_size is None else _size(args.image_size))
        name = display_name(source) if has_data else SMALL_DATA[args.task]
        return cls(
            kind=args.task,
            backbone=backbone,
            model=model,
            data=name,
            training_data=f"{name} (a folder)" if has_data and Path(source).is_dir() else name,
            processor=processor,
            splits=splits,
            label_names=names,
            augmentation=RandomCropAndFlip(processed_size(processor), args.min_crop, args.flip, processor.resample),
            ignore_index=getattr(args, "ignore_index", VOID),
            is_small=not has_data,
        )

    @property
    def name(self) -> str:
        """Model and dataset."""
        return f"{self.model}, {self.data}"

    @property
    def is_on_hub(self) -> bool:
        """Whether the checkpoint is on the Hub; else it is a local folder."""
        return not Path(self.backbone).is_dir()

    @property
    def contents(self) -> dict[str, Any]:
        """Properties that distinguish datasets of the same name."""
        counts = {f"{name} images": len(rows) for name, rows in self.splits.items()}
        return {**counts, "classes": self.label_names}

    @property
    def methods(self) -> dict[str, Method]:
        """The methods with their default settings for this task."""
        if self.kind == "segmentation":
            return SEGMENTATION_METHODS
        return SMALL_METHODS if self.is_small else METHODS

    @property
    def size(self) -> Size:
        """Height and width of the model's input."""
        return processed_size(self.processor)

    def with_validation(self, share: float, seed: int) -> Task:
        """The task with a share of the training images held out, unless it has a validation split."""
        if "validation" in self.splits:
            return self
        parts = split(self.splits["train"], share, seed)
        held_out = DatasetDict(train=parts["train"], validation=parts["test"], test=self.splits["test"])
        return replace(self, splits=held_out)

    def load_backbone(self, seed: int, settings: Settings) -> Any:
        """The backbone in float32 with a new head, on the device."""
        if self.kind == "segmentation":
            model = load_segmenter(self.backbone, self.label_names, seed)
        else:
            model = load_classifier(self.backbone, self.label_names, seed, settings.precision)
        return model.to(settings.device)

    def attach(self, method: Method, model: Any) -> Any:
        """The model to train, see :meth:`Method.attach`, for images of this size."""
        has_head = type(model).__name__.endswith(WITH_HEAD)
        if self.kind == "segmentation" and type(method) is not Method:
            raise RecipeError(f"{method.title} is for classification only. Choose another --method.")
        tuned = method.attach(model, TASK_TYPES[self.kind], **({} if has_head else labels_of(self.label_names)))
        fit_to_size(tuned, self.size)
        return tuned

    def drops_last(self, settings: Settings) -> bool:
        """Whether the last batch of an epoch is left out."""
        return self.kind == "segmentation" and drops_last(len(self.splits["train"]), settings.batch_size)

    def steps(self, settings: Settings) -> int:
        """Optimizer steps of a run."""
        num_images = len(self.splits["train"]) - self.drops_last(settings)
        return settings.steps(num_images, PartialState().num_processes)

    def metric(self) -> Metric:
        """Collects the scores of an evaluation."""
        return Metric(len(self.label_names), self.kind)

    def for_training(self, rows: Dataset) -> Dataset:
        """Model inputs with augmentation."""
        return to_inputs(rows, self.processor, self.augmentation, self.ignore_index)

    def for_testing(self, rows: Dataset) -> Dataset:
        """Model inputs without augmentation."""
        return to_inputs(rows, self.processor, ignore_index=self.ignore_index)

    def say_precision(self, settings: Settings) -> None:
        """Says in which precision is trained."""
        stored = stored_dtype(self.backbone)
        weights = "weights in float32" + (f" (stored in {stored})" if stored != "float32" else "")
        computing = "" if settings.precision == "fp32" else f", computing in {settings.precision}"
        say(f"Training on {settings.device.type}: {weights}{computing}.")


def display_name(source: str) -> str:
    """The last component of a folder's path, without the rest of the path; a name on the Hub is returned unchanged."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def set_defaults(args: argparse.Namespace) -> None:
    """Sets the options whose defaults depend on the task, and checks those that depend on each other.

    Raises:
        RecipeError: they do not fit together.
    """
    if bool(args.model) != bool(args.data):
        raise RecipeError("--model and --data must be given together, or neither of them for handwritten digits.")
    has_data = args.model is not None
    if args.epochs is None:
        args.epochs = Settings.epochs if has_data else SMALL_EPOCHS[args.task]
    if args.min_crop is None:
        args.min_crop = (MIN_CROPS if has_data else SMALL_MIN_CROPS)[args.task]
    if args.batch_size is None:
        args.batch_size = BATCH_SIZES[args.task]
    args.flip = has_data if args.flip is None else args.flip
    if args.task == "segmentation" and args.batch_size < 2:
        raise RecipeError(
            "--batch-size must be at least 2 for segmentation, whose decode heads have batch norms, got 1."
        )
    if getattr(args, "augmentations", None) is not None and not args.cache_features:
        raise RecipeError("--augmentations is for cached features. Add --cache-features, or leave it out.")
    if args.image_size is not None and len(args.image_size) > 2:
        raise RecipeError(f"--image-size must be one or two numbers, height and width, got {len(args.image_size)}.")


def _size(values: Sequence[int]) -> Size:
    return values[0], values[-1]


def _write_digits(args: argparse.Namespace, folder: Path, seed: int) -> None:
    if args.task == "segmentation":
        digits.write_scenes(folder, digits.NEW, {"train": digits.SCENES, "test": digits.SCENES}, seed + 1)
    else:
        digits.write_digits(folder, digits.NEW, 0.3, seed)


def _load_splits(args: argparse.Namespace, source: str, seed: int) -> tuple[DatasetDict, list[str]]:
    """The splits, and the names of the labels."""
    if args.task == "segmentation":
        return load_masks(Path(source), args.ignore_index)
    splits = load_data(source, seed, args.image_column, args.label_column)
    return splits, splits["train"].features[LABEL].names


def _prepare_backbone(
    args: argparse.Namespace, label_names: list[str], settings: Settings, seed: int
) -> tuple[str, str]:
    """The backbone's name or folder, and its name for reports. One that is not on the Hub is made in the output folder,
    unless it is there already."""
    folder, state = args.output / "backbone", settings.process_state()
    exists = (folder / "model.safetensors").is_file()
    if args.model is None:
        name = "small UperNet" if args.task == "segmentation" else SMALL_BACKBONES[args.backbone]
        if not exists:
            if state.is_main_process:
                print(f"Pretraining a {name} on the handwritten digits 0 to 4.", flush=True)
            if args.task == "segmentation":
                pretrain_segmenter(folder, label_names, settings, seed)
            else:
                accuracy = pretrain_classifier(args.backbone, folder, settings, seed)
                if state.is_main_process:
                    print(f"Its test accuracy is {accuracy:.1f} %.", flush=True)
        return str(folder), name
    if args.task == "segmentation" and gets_upernet(args.model):
        with state.main_process_first():
            if not (folder / "model.safetensors").is_file():
                save_upernet(args.model, folder, label_names, load_image_processor(args.model), seed)
        return str(folder), f"{display_name(args.model)} with UperNet"
    return args.model, display_name(args.model)
