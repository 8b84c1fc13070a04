"""``vpt-peft predict``: labels of images, by one adapter or by several of one backbone in mixed batches."""

from __future__ import annotations

import argparse
import csv
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...hub import is_folder, is_repo_id, pulled_adapter, similar_folder
from ...images.files import SUFFIXES, is_image, read_image
from ...model import VPTModel
from ..errors import RecipeError
from ..report.tables import table
from ..runtime import choose_device, silence_transformers
from ..sources import check_source
from ..training.models import ADAPTER_CONFIG, Tuned, processor_of_adapter

INPUT = ("size", "crop_size", "do_center_crop", "do_normalize", "image_mean", "image_std", "rescale_factor", "resample")


@dataclass(frozen=True)
class Prediction:
    """The most likely labels of an image by one adapter, with scores from 0 to 1 (segmentation: shares of pixels)."""

    image: str
    adapter: str
    labels: list[tuple[str, float]]


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    adapters, patterns = split_sources(args.sources)
    files = find_images(patterns)
    device = choose_device(args.device)
    first = Tuned.load(adapters[0], device)
    first.check_task("predict")
    if len(adapters) > 1:
        load_others(first, adapters[1:])
    names = short_names(adapters)
    predictions = []
    for start in tqdm(range(0, len(files), args.batch_size), desc="Predicting", unit="batch", leave=False):
        batch = files[start : start + args.batch_size]
        predictions += predict(first, names, batch, args, device)
    FORMATS[args.format](predictions, len(adapters) > 1)


# -- the command line -------------------------------------------------------------------------------------------------


def split_sources(sources: Sequence[str]) -> tuple[list[str], list[str]]:
    """Adapters, which come first, and images.

    Raises:
        RecipeError: there are none of one kind.
    """
    number = next((index for index, source in enumerate(sources) if not _is_model(source)), len(sources))
    adapters, patterns = list(sources[:number]), list(sources[number:])
    if not adapters:
        raise RecipeError(
            f"The first argument must be an adapter, a folder with {ADAPTER_CONFIG} or a repository on the Hub, got "
            f"'{sources[0]}'.{'' if Path(sources[0]).exists() else similar_folder(sources[0])}"
        )
    if not patterns:
        raise RecipeError(
            f"Expected images after the adapter{'s' if number > 1 else ''} {', '.join(adapters)}, got none."
        )
    return adapters, patterns


def _is_model(source: str) -> bool:
    if is_folder(source):
        folder = Path(source)
        inside = [*folder.glob(ADAPTER_CONFIG), *folder.glob(f"*/{ADAPTER_CONFIG}"), *folder.glob("config.json")]
        return bool(inside)
    is_file = Path(source).exists() or source.lower().endswith(SUFFIXES) or glob.has_magic(source)
    return not is_file and is_repo_id(source)


def find_images(patterns: Sequence[str]) -> list[str]:
    """Image files: those named, those in folders at any depth, and those that match patterns.

    Raises:
        RecipeError: one of them does not exist, or has no images.
    """
    files: list[str] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = [str(file) for file in sorted(path.rglob("*")) if is_image(file)]
        elif path.exists():
            found = [pattern]
        else:
            matches = map(Path, sorted(glob.glob(pattern, recursive=True)))
            found = [str(file) for file in matches if file.is_file() and is_image(file)]
        if not found:
            what = "has no images" if path.is_dir() else "does not exist"
            raise RecipeError(
                f"Expected an image file, a folder of images or a pattern, got '{pattern}', which {what}. Supported "
                f"file types: {' '.join(SUFFIXES)}."
            )
        files += found
    return list(dict.fromkeys(files))


def short_names(adapters: Sequence[str]) -> dict[str, str]:
    """The name of each adapter in the model, and the one to show. Of folders it is the last part, if they differ."""
    shown = [Path(name).resolve().name if is_folder(name) else name for name in adapters]
    if len(set(shown)) < len(shown):
        shown = list(adapters)
    return {"default" if index == 0 else f"task{index}": name for index, name in enumerate(shown)}


def load_others(first: Tuned, others: Sequence[str]) -> None:
    """Loads further adapters onto the backbone of the first one."""
    if not isinstance(first.model, VPTModel):
        raise RecipeError("Several adapters can be mixed only if they are adapters of this library, on one backbone.")
    for index, name in enumerate(others, 1):
        check_source(name)
        with pulled_adapter(name, with_processor=True) as folder:
            first.model.load_adapter(folder, f"task{index}")
            processor = processor_of_adapter(first.model, folder).to_dict()
        differing = [key for key in INPUT if processor.get(key) != first.processor.to_dict().get(key)]
        if differing:
            raise RecipeError(
                f"Adapters in one call must prepare images in the same way, but '{name}' differs in "
                f"{', '.join(differing)}. Predict by one after the other."
            )
    first.model.train(False)


# -- predictions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(
    tuned: Tuned, names: dict[str, str], files: Sequence[str], args: argparse.Namespace, device: torch.device
) -> list[Prediction]:
    """Predictions of one batch of images by each adapter, in one pass."""
    images = [read_image(file) for file in files]
    pixel_values = tuned.processor(images, return_tensors="pt")["pixel_values"].to(device)
    if len(names) == 1:
        return list(_read(tuned, names["default"], tuned.model(pixel_values=pixel_values).logits, files, images, args))
    order = [name for name in names for _ in files]
    output = tuned.model(pixel_values.repeat(len(names), 1, 1, 1), adapter_names=order)
    found = []
    for index, (name, shown) in enumerate(names.items()):
        part = slice(index * len(files), (index + 1) * len(files))
        tuned.model.set_adapter(name)  # for its labels
        config = tuned.model.config
        own = Tuned(tuned.model, tuned.processor, [config.id2label[i] for i in range(config.num_labels)], tuned.task)
        logits = output.logits[part][:, : config.num_labels]
        found.append(list(_read(own, shown, logits, files, images, args)))
    return [prediction for of_image in zip(*found, strict=True) for prediction in of_image]


def _read(
    tuned: Tuned, name: str, logits: Tensor, files: Sequence[str], images: Sequence[Image.Image], args: Any
) -> Iterator[Prediction]:
    if tuned.task == "segmentation":
        for file, image, scores in zip(files, images, logits, strict=True):
            size = (image.height, image.width)
            mask = torch.nn.functional.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0].argmax(
                0
            )
            shares = torch.bincount(mask.flatten(), minlength=len(tuned.label_names)) / mask.numel()
            present = [(label, share) for label, share in enumerate(shares.tolist()) if share > 0]
            ranked = sorted(present, key=lambda pair: -pair[1])[: args.top_k]
            yield Prediction(file, name, [(tuned.label_names[label], share) for label, share in ranked])
            if args.masks is not None:
                args.masks.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(mask.cpu().numpy().astype(np.uint8))
                picture.save(args.masks / f"{Path(file).stem}.png")
        return
    for file, row in zip(files, _scores(tuned, logits), strict=True):
        top = row.topk(min(args.top_k, len(row)))
        labels = [tuned.label_names[label] for label in top.indices.tolist()]
        yield Prediction(file, name, list(zip(labels, top.values.tolist(), strict=True)))


def _scores(tuned: Tuned, logits: Tensor) -> Tensor:
    """Probabilities of classes; of several independent labels, the probability of each; of regression, the values."""
    problem = tuned.model.config.problem_type
    if problem == "multi_label_classification":
        return logits.float().sigmoid()
    if problem == "regression" or logits.shape[1] == 1:
        return logits.float()
    return logits.float().softmax(-1)


# -- formats ----------------------------------------------------------------------------------------------------------


def print_table(predictions: Sequence[Prediction], mixed: bool) -> None:
    """Prints one row per image (and adapter) with its labels."""
    columns = max(len(prediction.labels) for prediction in predictions)
    header = ["Image", *(["Adapter"] if mixed else []), *(f"Top {rank + 1}" for rank in range(columns))]
    rows = [header]
    for prediction in predictions:
        cells = [f"{label} {100 * score:.1f} %" for label, score in prediction.labels]
        cells += [""] * (columns - len(cells))
        rows.append([prediction.image, *([prediction.adapter] if mixed else []), *cells])
    print(table(rows))


def print_csv(predictions: Sequence[Prediction], mixed: bool) -> None:
    """Prints one line per label, with the scores from 0 to 1."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["image", "adapter", "rank", "label", "score"])
    for prediction in predictions:
        for rank, (label, score) in enumerate(prediction.labels, 1):
            writer.writerow([prediction.image, prediction.adapter, rank, label, f"{score:.6f}"])


def print_json(predictions: Sequence[Prediction], mixed: bool) -> None:
    """Prints a list with one entry per image and adapter; labels are in the format of transformers' pipelines."""
    entries = [
        {
            "image": prediction.image,
            "adapter": prediction.adapter,
            "labels": [{"label": label, "score": score} for label, score in prediction.labels],
        }
        for prediction in predictions
    ]
    print(json.dumps(entries, indent=1, ensure_ascii=False))


FORMATS = {"table": print_table, "csv": print_csv, "json": print_json}
