"""Image classification datasets: folders with one folder of images per class, or datasets on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as ImageFeature

from ...errors import truncate_list
from ...hub import is_folder, is_repo_id
from ...images.files import SUFFIXES, is_image
from ..errors import RecipeError
from .images import check_all, check_image

IMAGE, LABEL = "image", "label"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
LAYOUT = "one folder of images per class, or train and test with such folders"
MAX_LISTED = 10


def load_data(source: str, seed: int, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """Loads the splits ``train`` and ``test``, and ``validation`` if the dataset has all three.

    A dataset without test images is tested on its validation split; without both, on a fifth of the images of each
    class, drawn by ``seed``.

    Raises:
        RecipeError: see :func:`read_splits`.
    """
    splits = read_splits(source, image_column, label_column)
    if "test" in splits:
        return splits
    if "validation" in splits:
        return DatasetDict(train=splits["train"], test=splits["validation"])
    return split(splits["train"], 0.2, seed)


def read_splits(source: str, image_column: str | None = None, label_column: str | None = None) -> DatasetDict:
    """The splits of a dataset, with the columns ``image`` and ``label``; ``train`` is one of them.

    Args:
        source: a folder with one folder of images per class, or with ``train`` and ``test``, and possibly
            ``validation``, of this structure; a folder with metadata as in ``datasets``; or a dataset on the Hub.
        image_column, label_column: names of the columns, if they cannot be determined by their types.

    Raises:
        RecipeError: the source is not a usable dataset.
    """
    if is_folder(source):
        splits = _read_folder(Path(source))
    elif is_repo_id(source):
        splits = _load_dataset(source, source)
    else:
        raise RecipeError(
            f"--data must be a folder with {LAYOUT}, or the name of an image dataset on the Hub, got '{source}', which "
            "does not exist. Check the path."
        )
    if "train" not in splits:
        raise RecipeError(f"'{source}' must have a split named train, got {', '.join(splits)}.")
    train = select_columns(splits.pop("train"), source, image_column, label_column)
    others = {
        name: select_columns(rows, source, image_column, label_column, train.features[LABEL])
        for name, rows in splits.items()
    }
    for name, rows in others.items():
        _check_known_classes(source, name, train, rows)
    return DatasetDict(train=train, **others)


def split(rows: Dataset, share: float, seed: int) -> DatasetDict:
    """Splits off a share of the images as ``test``, stratified by class if possible."""
    if len(rows) < 2:
        raise RecipeError(f"At least 2 images are needed to hold some out, got {len(rows)}.")
    try:
        return rows.train_test_split(share, seed=seed, stratify_by_column=LABEL)
    except ValueError:  # too few images of a class, or a dataset without classes
        return rows.train_test_split(share, seed=seed)


def first_per_class(rows: Dataset, number: int, seed: int) -> Dataset:
    """At most ``number`` rows, stratified by class if possible."""
    return rows if number >= len(rows) else split(rows, number, seed)["test"]


def find_split(name: str) -> str | None:
    """The split that a folder or split of this name is, such as "test" for "Testing"; None: of none."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


# -- folders ----------------------------------------------------------------------------------------------------------


def _read_folder(folder: Path) -> dict[str, Dataset]:
    parts = split_folders(folder)
    if not parts:
        if _has_metadata(folder):
            return _load_dataset("imagefolder", str(folder), data_dir=str(folder))
        parts = {"train": folder}
    elif "train" not in parts:
        raise RecipeError(f"'{folder}' must also have a folder named train, got {', '.join(sorted(parts))} only.")
    if any(map(_has_metadata, parts.values())):
        return _load_dataset("imagefolder", str(folder), data_dir=str(folder))
    classes = _class_folders(parts["train"])
    names = [path.name for path in classes]
    files: dict[str, list[tuple[str, int]]] = {}
    for name, part in parts.items():
        found = classes if part == parts["train"] else _class_folders(part, is_train=False)
        unknown = sorted({path.name for path in found} - set(names))
        if unknown:
            raise RecipeError(
                f"'{part}' must have only classes of '{parts['train']}', but also has "
                f"{truncate_list(unknown, MAX_LISTED)}."
            )
        files[name] = [(str(file), names.index(path.name)) for path in found for file in _images_in(path)]
        if not files[name]:
            raise RecipeError(f"'{part}' must contain images in folders of classes, got none.")
    check_all(check_image, [file for rows in files.values() for file, _ in rows], "Checking images")
    features = Features({IMAGE: ImageFeature(), LABEL: ClassLabel(names=names)})
    return {
        name: Dataset.from_dict({IMAGE: [file for file, _ in rows], LABEL: [label for _, label in rows]}, features)
        for name, rows in files.items()
    }


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits in a folder, named in any of the usual ways; empty if there is none."""
    found: dict[str, Path] = {}
    for path in _folders_in(folder):
        name = find_split(path.name)
        if name is not None and found.setdefault(name, path) != path:
            raise RecipeError(
                f"'{folder}' must have one folder per split, got both {found[name].name} and {path.name} for {name}."
            )
    return {name: found[name] for name in SPLITS if name in found}


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    except PermissionError as error:
        raise RecipeError(f"'{folder}' cannot be read: {error.strerror}.") from error


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_image(path) and path.is_file())


def _has_metadata(folder: Path) -> bool:
    return any((folder / name).is_file() for name in METADATA)


def _class_folders(folder: Path, is_train: bool = True) -> list[Path]:
    """The class folders in a folder. Raises RecipeError if there are none, or if some have no images."""
    folders = _folders_in(folder)
    empty = [path for path in folders if not _images_in(path)]
    deeper = [path for path in empty if any(map(_images_in, _folders_in(path)))]
    if len(folders) == 1 and (deeper or split_folders(folders[0])):
        raise RecipeError(
            f"'{folder}' must contain {LAYOUT}, which seem to be one level deeper. Use --data '{folders[0]}'."
        )
    if deeper:
        raise RecipeError(
            f"The folders of classes in '{folder}' must contain images, but these contain folders of images: "
            f"{truncate_list([path.name for path in deeper], MAX_LISTED)}. Expected {LAYOUT}."
        )
    if len(folders) < 2 and is_train:
        loose = _images_in(folder)
        got = f"{len(loose)} image{'' if len(loose) == 1 else 's'} beside " if loose else ""
        raise RecipeError(
            f"'{folder}' must contain {LAYOUT}, for at least two classes; got {got}{len(folders)} "
            f"folder{'' if len(folders) == 1 else 's'} of classes."
        )
    if empty and is_train:
        names = truncate_list([path.name for path in empty], MAX_LISTED)
        raise RecipeError(
            f"Each class in '{folder}' needs images, but these folders have none: {names}. Remove or fill them. "
            f"Supported file types: {' '.join(SUFFIXES)}."
        )
    return folders


# -- datasets ---------------------------------------------------------------------------------------------------------


def _load_dataset(name: str, source: str, **options: Any) -> dict[str, Dataset]:
    """The splits of a dataset by our names; others are left out."""
    try:
        found: Mapping[Any, Dataset] = load_dataset(name, **options)
    except (OSError, ValueError) as error:
        what = "cannot be loaded" if options else "is no folder here, and cannot be loaded from the Hub"
        raise RecipeError(f"The dataset '{source}' {what}: {error}") from error
    named = {find_split(str(part)): rows for part, rows in reversed(list(found.items()))}
    return {part: named[part] for part in SPLITS if part in named} or {str(part): found[part] for part in found}


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
        raise RecipeError(f"Images and labels must be different columns, got {image} for both.")
    missing = [name for name in (image, label) if name not in rows.features]
    if missing:
        raise RecipeError(f"'{source}' must have the column {missing[0]}, got {', '.join(rows.features)}.")
    if not isinstance(rows.features[image], ImageFeature) or isinstance(rows.features[label], ImageFeature):
        kinds = [f"{name} ({type(rows.features[name]).__name__})" for name in (image, label)]
        raise RecipeError(f"'{source}' must have a column of images and one of labels, got {' and '.join(kinds)}.")
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


def _column(rows: Dataset, source: str, name: str, kind: str) -> str:
    """The column of a type: the one with the usual name, or the only one."""
    found = [column for column, feature in rows.features.items() if type(feature).__name__ == kind]
    if name in found or len(found) == 1:
        return name if name in found else found[0]
    raise RecipeError(
        f"'{source}' must have one column of type {kind}, got {len(found)} among {', '.join(rows.features)}. Select it "
        f"by --{name}-column."
    )


def _check_classes(source: str, expected: list[str], matches: bool, found: list[str]) -> None:
    if len(expected) < 2:
        raise RecipeError(f"'{source}' must have at least two classes, got {expected}.")
    if not matches:
        raise RecipeError(
            f"All splits of '{source}' must have the classes {truncate_list(expected, MAX_LISTED)}, got "
            f"{truncate_list(found, MAX_LISTED)}."
        )


def _check_known_classes(source: str, name: str, train: Dataset, rows: Dataset) -> None:
    """Raises RecipeError if a split has classes without training images."""
    unknown = set(rows.unique(LABEL)) - set(train.unique(LABEL))
    if unknown:
        known = dict(enumerate(train.features[LABEL].names))
        names = sorted(str(known.get(label, label)) for label in unknown)
        raise RecipeError(
            f"The {name} images of '{source}' must have only classes of its training images, but also have "
            f"{truncate_list(names, MAX_LISTED)}."
        )
