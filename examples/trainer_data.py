"""Image data sets for ``transformers.Trainer``: a local folder, one of the Hub or the handwritten digits, prepared by a
checkpoint's own image processor."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import transformers
from augmentation import RandomCropAndFlip
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature
from images import TEST_SPLITS, DataError, ImageSet, image_size_of, processor_settings, reading, upright
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessorPil
from transformers.image_processing_base import ImageProcessingMixin

IMAGE, LABEL = "image", "label"


# -- image processors -----------------------------------------------------------------------------------------------


def load_image_processor(model_name: str) -> Any:
    """The checkpoint's own image processor; where it comes without one, 0.5 for mean and deviation.

    Raises:
        DataError: there is no such checkpoint, it is not for images, or its image processor cannot be read.
    """
    height, width = image_size_of(model_name)
    size = {"size": {"height": height, "width": width}}
    if not processor_settings(model_name):
        return ViTImageProcessorPil(**size)
    try:
        processor = _from_pretrained(model_name)
        if processed_size(processor) == (height, width):
            return processor
        return _from_pretrained(model_name, do_center_crop=False, **size)  # the backbone takes its own size only
    except (OSError, ValueError) as error:
        raise DataError(f"'{model_name}' must have an image processor that transformers knows: {error}") from error


def _from_pretrained(model_name: str, **changes: Any) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(model_name, **changes)
    except ImportError:  # some versions of transformers cannot do this without torchvision
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model_name)
        name = str(settings.get("image_processor_type", "ViTImageProcessor")).removesuffix("Fast")
        return getattr(transformers, f"{name}Pil")(**{**settings, **changes})


def processed_size(processor: Any) -> tuple[int, int]:
    """``(height, width)`` of what an image processor makes of an image."""
    crops = getattr(processor, "do_center_crop", False)
    size = dict(processor.crop_size if crops else processor.size)
    side = size.get("shortest_edge")
    return (size.get("height") or side, size.get("width") or side)


# -- data sets ------------------------------------------------------------------------------------------------------


def load_data(source: str, seed: int, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Splits ``train`` and ``test`` with the columns ``image`` and ``label``.

    Args:
        source: a folder that holds one folder of images for each class, or ``train`` and ``test`` (or ``validation``)
            with such folders; or the name of an image data set on the Hub.
        seed: where there is no test split, one image in five of each class is drawn for it at random.
        image_column, label_column: where they are, if their types do not tell.

    Raises:
        DataError: nothing usable is there.
    """
    try:
        local = os.path.isdir(source)
        splits = load_dataset("imagefolder", data_dir=source) if local else load_dataset(source)
    except (OSError, ValueError) as error:
        raise DataError(
            f"The data must be a folder with a folder of images for each class, or the name of an image data set on "
            f"the Hub, got '{source}': {error}"
        ) from error
    if "train" not in splits:
        raise DataError(f"'{source}' must have a split named train, got {', '.join(splits)}.")
    train = with_columns(splits["train"], source, image_column, label_column)
    test = next((name for name in TEST_SPLITS if name in splits), None)
    if test is None:
        return split(train, 0.2, seed)
    held_out = with_columns(splits[test], source, image_column, label_column, train.features[LABEL])
    _check_trained(source, train, held_out)
    return DatasetDict(train=train, test=held_out)


def with_columns(
    rows: Dataset, source: str, image: str | None, label: str | None, classes: ClassLabel | None = None
) -> Dataset:
    """The rows with two columns, ``image`` and ``label``, found by their types where they are not named.

    Args:
        classes: those of the training images; None: these are the training images.
    """
    image = image or _column(rows, source, IMAGE, "Image")
    label = label or _column(rows, source, LABEL, "ClassLabel")
    if image == label:
        raise DataError(f"Images and labels must be two columns, got {image} for both. Name another of them.")
    missing = [name for name in (image, label) if name not in rows.features]
    if missing:
        raise DataError(f"'{source}' must have the column {missing[0]}, got {', '.join(rows.features)}.")
    if not isinstance(rows.features[image], ImageFeature) or isinstance(rows.features[label], ImageFeature):
        kinds = [f"{name} ({type(rows.features[name]).__name__})" for name in (image, label)]
        raise DataError(f"'{source}' must have a column of images and one of classes, got {' and '.join(kinds)}.")
    rows = rows.select_columns([image, label])
    for old, new in ((image, IMAGE), (label, LABEL)):
        rows = rows if old == new else rows.rename_column(old, new)
    if not isinstance(rows.features[LABEL], ClassLabel):  # words or numbers, each a class of its own
        words = rows.cast_column(LABEL, Value("string"))
        found = sorted(words.unique(LABEL))
        classes = classes or ClassLabel(names=found)
        _check_classes(source, classes.names, set(found) <= set(classes.names), found)
        return words.cast_column(LABEL, classes)
    classes = classes or rows.features[LABEL]
    found = rows.features[LABEL].names
    _check_classes(source, classes.names, found == classes.names, found)
    return rows


def _check_classes(source: str, known: list[str], fits: bool, found: list[str]) -> None:
    if len(known) < 2:
        raise DataError(f"'{source}' must have at least two classes, got {known}.")
    if not fits:
        raise DataError(f"The test images of '{source}' must have the classes {known}, got {found}.")


def _check_trained(source: str, train: Dataset, test: Dataset) -> None:
    """Raises DataError for classes that are tested and not trained, which a folder's splits are not asked about."""
    unknown = set(test.unique(LABEL)) - set(train.unique(LABEL))
    if unknown:
        known = dict(enumerate(train.features[LABEL].names))
        names = sorted(str(known.get(label, label)) for label in unknown)
        raise DataError(
            f"The test images of '{source}' must have the classes of its training images, but have {', '.join(names)} "
            "besides."
        )


def _column(rows: Dataset, source: str, name: str, kind: str) -> str:
    found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    if name in found or len(found) == 1:
        return name if name in found else found[0]
    if os.path.isdir(source) and not found:
        raise DataError(
            f"'{source}' must hold a folder of images for each class, two or more and none within another, or a "
            f"column of its metadata must be named by --{name}-column; got the columns {', '.join(rows.features)}."
        )
    raise DataError(
        f"'{source}' must have one column of type {kind}, got {len(found)} among {dict(rows.features)}. "
        f"Name it by --{name}-column."
    )


def split(rows: Dataset, share: float, seed: int) -> DatasetDict:
    """``train`` and ``test``, with a share of each class's images in ``test``."""
    try:
        return rows.train_test_split(share, seed=seed, stratify_by_column=LABEL)
    except ValueError:  # too few images of some class for that
        return rows.train_test_split(share, seed=seed)


def from_images(images: ImageSet) -> Dataset:
    """Images in memory as a data set."""
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images.images]
    features = Features({IMAGE: ImageFeature(), LABEL: ClassLabel(names=list(images.class_names))})
    return Dataset.from_dict({IMAGE: pictures, LABEL: images.labels.tolist()}, features=features)


def prepared(rows: Dataset, processor: Any, augmentation: RandomCropAndFlip | None = None) -> Dataset:
    """The rows as a model reads them, made when they are asked for: ``pixel_values`` and ``labels``.

    Args:
        augmentation: in place of the processor's own resizing and cropping, for training.
    """
    mode = rows.features[IMAGE].mode
    stored = rows.cast_column(IMAGE, ImageFeature(mode, decode=False))
    return stored.with_transform(_Transform(processor, augmentation, ImageFeature(mode)))


class _Transform:
    """A batch of rows to what a model reads; a class, so that worker processes can be sent it."""

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
        """An image as the data set stores it, decoded by the data set's own means."""
        with reading(f"'{stored['path']}'" if stored["path"] else "An image of the data set"):
            return upright(self.feature.decode_example(stored))
