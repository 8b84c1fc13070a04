"""Image datasets for ``transformers.Trainer``: local folders, the Hub or handwritten digits, preprocessed by the image
processor of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import transformers
from augmentation import RandomCropAndFlip
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from images import TEST_SPLITS, DataError, ImageSet, get_image_size, image_errors, processor_settings, to_upright_rgb
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin

IMAGE, LABEL = "image", "label"


# -- image processors -----------------------------------------------------------------------------------------------


def load_image_processor(model_name: str) -> Any:
    """The image processor of a checkpoint; if it has none, one with mean 0.5 and standard deviation 0.5.

    Raises:
        DataError: the checkpoint does not exist or is not a vision model, or its image processor cannot be read.
    """
    height, width = get_image_size(model_name)
    size = {"size": {"height": height, "width": width}}
    if not processor_settings(model_name):
        return ViTImageProcessorPil(**size)
    try:
        processor = _from_pretrained(model_name)
        if processed_size(processor) == (height, width):
            return processor
        return _from_pretrained(model_name, do_center_crop=False, **size)  # the backbone requires its own size
    except (OSError, ValueError) as error:
        raise DataError(f"'{model_name}' must have an image processor of transformers: {error}") from error


def _from_pretrained(model_name: str, **changes: Any) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(model_name, **changes)
    except ImportError:  # some versions of transformers require torchvision for this
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model_name)
        name = str(settings.get("image_processor_type", "ViTImageProcessor")).removesuffix("Fast")
        return getattr(transformers, f"{name}Pil")(**{**settings, **changes})


def processed_size(processor: Any) -> tuple[int, int]:
    """``(height, width)`` of an image processor's output."""
    crops = getattr(processor, "do_center_crop", False)
    size = dict(processor.crop_size if crops else processor.size)
    side = size.get("shortest_edge")
    return (size.get("height") or side, size.get("width") or side)


# -- datasets -------------------------------------------------------------------------------------------------------


def load_data(source: str, seed: int, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Loads the splits ``train`` and ``test`` with the columns ``image`` and ``label``.

    Args:
        source: a folder with one folder of images per class, or with ``train`` and ``test`` (or ``validation``) of this
            structure; or the name of an image dataset on the Hub.
        seed: for the random split if there is no test split: one image in five of each class is held out.
        image_column, label_column: names of the columns, if they cannot be determined by their types.

    Raises:
        DataError: the source is not a usable dataset.
    """
    try:
        local = os.path.isdir(source)
        splits = load_dataset("imagefolder", data_dir=source) if local else load_dataset(source)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The data must be a folder with one folder of images per class, or the name of an image dataset on the "
            f"Hub, got '{source}': {error}"
        ) from error
    if "train" not in splits:
        raise DataError(f"'{source}' must have a split named train, got {', '.join(splits)}.")
    train = select_columns(splits["train"], source, image_column, label_column)
    test = next((name for name in TEST_SPLITS if name in splits), None)
    if test is None:
        return split(train, 0.2, seed)
    held_out = select_columns(splits[test], source, image_column, label_column, train.features[LABEL])
    _check_test_classes(source, train, held_out)
    return DatasetDict(train=train, test=held_out)


def select_columns(
    rows: Dataset, source: str, image: str | None, label: str | None, classes: ClassLabel | None = None
) -> Dataset:
    """The rows with the columns ``image`` and ``label`` only. Columns that are not named are found by their types.

    Args:
        classes: of the training split; None: this is the training split.
    """
    image = image or _column(rows, source, IMAGE, "Image")
    label = label or _column(rows, source, LABEL, "ClassLabel")
    if image == label:
        raise DataError(f"Images and labels must be different columns, got {image} for both.")
    missing = [name for name in (image, label) if name not in rows.features]
    if missing:
        raise DataError(f"'{source}' must have the column {missing[0]}, got {', '.join(rows.features)}.")
    if not isinstance(rows.features[image], ImageFeature) or isinstance(rows.features[label], ImageFeature):
        kinds = [f"{name} ({type(rows.features[name]).__name__})" for name in (image, label)]
        raise DataError(f"'{source}' must have a column of images and one of labels, got {' and '.join(kinds)}.")
    rows = rows.select_columns([image, label])
    for old, new in ((image, IMAGE), (label, LABEL)):
        rows = rows if old == new else rows.rename_column(old, new)
    if not isinstance(rows.features[LABEL], ClassLabel):  # strings or numbers: each value is a class
        strings = rows.cast_column(LABEL, Value("string"))
        found = sorted(strings.unique(LABEL))
        classes = classes or ClassLabel(names=found)
        _check_classes(source, classes.names, set(found) <= set(classes.names), found)
        return strings.cast_column(LABEL, classes)
    classes = classes or rows.features[LABEL]
    found = rows.features[LABEL].names
    _check_classes(source, classes.names, found == classes.names, found)
    return rows


def _check_classes(source: str, expected: list[str], matches: bool, found: list[str]) -> None:
    if len(expected) < 2:
        raise DataError(f"'{source}' must have at least two classes, got {expected}.")
    if not matches:
        raise DataError(f"The test images of '{source}' must have the classes {expected}, got {found}.")


def _check_test_classes(source: str, train: Dataset, test: Dataset) -> None:
    """Raises DataError if the test split has classes without training images, as can happen in folders."""
    unknown = set(test.unique(LABEL)) - set(train.unique(LABEL))
    if unknown:
        known = dict(enumerate(train.features[LABEL].names))
        names = sorted(str(known.get(label, label)) for label in unknown)
        raise DataError(
            f"The test images of '{source}' must have only classes of its training images, but also have "
            f"{', '.join(names)}."
        )


def _column(rows: Dataset, source: str, name: str, kind: str) -> str:
    found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    if name in found or len(found) == 1:
        return name if name in found else found[0]
    if os.path.isdir(source) and not found:
        raise DataError(
            f"'{source}' must contain one folder of images per class, at least two and not nested, or metadata with a "
            f"column given by --{name}-column; got the columns {', '.join(rows.features)}."
        )
    raise DataError(
        f"'{source}' must have one column of type {kind}, got {len(found)} among {dict(rows.features)}. "
        f"Select it by --{name}-column."
    )


def split(rows: Dataset, share: float, seed: int) -> DatasetDict:
    """Splits off a share of the images as ``test``, stratified by class if possible."""
    try:
        return rows.train_test_split(share, seed=seed, stratify_by_column=LABEL)
    except ValueError:  # too few images of a class
        return rows.train_test_split(share, seed=seed)


def to_dataset(images: ImageSet) -> Dataset:
    """Converts images in memory to a dataset."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.images]
    features = Features({IMAGE: ImageFeature(), LABEL: ClassLabel(names=list(images.class_names))})
    return Dataset.from_dict({IMAGE: pictures, LABEL: images.labels.tolist()}, features=features)


def with_preprocessing(rows: Dataset, processor: Any, augmentation: RandomCropAndFlip | None = None) -> Dataset:
    """The rows with ``pixel_values`` and ``labels``, computed on access.

    Args:
        augmentation: for training, replaces the processor's resizing and cropping.
    """
    mode = rows.features[IMAGE].mode
    stored = rows.cast_column(IMAGE, ImageFeature(mode, decode=False))
    return stored.with_transform(_Transform(processor, augmentation, ImageFeature(mode)))


class _Transform:
    """Maps a batch of rows to model inputs. A class, so that it can be pickled for worker processes."""

    def __init__(
        self, processor: Any, augmentation: Callable[[Image.Image], Image.Image] | None, feature: ImageFeature
    ) -> None:
        self.processor, self.augmentation, self.feature = processor, augmentation, feature

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [self._decoded(stored) for stored in rows[IMAGE]]
        kwargs = {"return_tensors": "pt"}
        if self.augmentation is not None:
            pictures = [self.augmentation(picture) for picture in pictures]
            kwargs |= {"do_resize": False, "do_center_crop": False}
        return {"pixel_values": self.processor(pictures, **kwargs)["pixel_values"], "labels": rows[LABEL]}

    def _decoded(self, stored: dict[str, Any]) -> Image.Image:
        """Decodes a stored image by the dataset's feature."""
        with image_errors(f"'{stored['path']}'" if stored["path"] else "An image of the dataset"):
            return to_upright_rgb(self.feature.decode_example(stored))
