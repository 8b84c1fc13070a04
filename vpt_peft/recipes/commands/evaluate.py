"""``vpt-peft evaluate``: the scores of an adapter, or of a full model, on a dataset."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm

from ...errors import truncate_list
from ..data.folders import LABEL, read_splits
from ..data.masks import load_masks
from ..data.transforms import to_inputs
from ..errors import RecipeError
from ..report.metrics import Metric, Scores, predicted_labels
from ..report.tables import label_table
from ..runtime import choose_device, silence_transformers
from ..training.models import Tuned


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    device = choose_device(args.device)
    tuned = Tuned.load(args.adapter, device)
    tuned.check_task("evaluate")
    rows, split = _rows(args, tuned)
    scores = evaluate(tuned, rows, args.batch_size, device, args.ignore_index)
    labels = scores.by_label(tuned.label_names)
    shown = [label for label in labels if label["support"] or label["recall"] is not None or label["precision"]]
    print(label_table(shown))
    unit = "labelled pixels" if tuned.task == "segmentation" else "images"
    mean_iou = f"mean IoU {scores.mean_iou:.1f} %, pixel " if tuned.task == "segmentation" else ""
    print(f"\n{split}: {mean_iou}accuracy {scores.accuracy:.1f} % of {scores.total:,} {unit}.")
    if args.output is not None:
        _write(args.output, scores, labels)


def evaluate(tuned: Tuned, rows: Dataset, batch_size: int, device: torch.device, ignore_index: int = 255) -> Scores:
    """The scores of a model on images.

    Args:
        rows: with the columns ``image`` and ``label``, or ``image`` and ``mask``; labels are the model's.
    """
    metric = Metric(len(tuned.label_names), tuned.task)
    batches: DataLoader[dict[str, list[torch.Tensor]]] = DataLoader(
        to_inputs(rows, tuned.processor, ignore_index=ignore_index),
        batch_size,
    )
    with torch.no_grad():
        for index, batch in enumerate(tqdm(batches, desc="Evaluating", unit="batch", leave=False)):
            logits = tuned.model(pixel_values=batch["pixel_values"].to(device)).logits.cpu()
            predictions = predicted_labels(logits, batch["labels"])
            result = SimpleNamespace(predictions=predictions, label_ids=batch["labels"])
            metric(result, compute_result=index == len(batches) - 1)
    return metric.scores


def _rows(args: argparse.Namespace, tuned: Tuned) -> tuple[Dataset, str]:
    """The images to evaluate, with the model's labels, and the name of their split."""
    if tuned.task == "segmentation":
        splits, names = load_masks(Path(args.data), args.ignore_index)
        if len(names) > len(tuned.label_names):
            raise RecipeError(
                f"The masks must have the {len(tuned.label_names)} labels of the adapter, got {len(names)} labels."
            )
    else:
        splits = read_splits(args.data, args.image_column, args.label_column)
    split = args.split or next((name for name in ("test", "validation") if name in splits), "train")
    if split not in splits:
        raise RecipeError(f"'{args.data}' must have the split {split}, got {', '.join(splits)}.")
    rows = splits[split]
    if tuned.task == "segmentation":
        return rows, split.capitalize()
    names = rows.features[LABEL].names
    unknown = [name for name in names if name not in tuned.label_names]
    if unknown:
        raise RecipeError(
            f"The classes of '{args.data}' must be among those of the adapter, {truncate_list(tuned.label_names, 10)}; "
            f"got also {truncate_list(unknown, 10)}."
        )
    labels = [tuned.label_names.index(names[label]) for label in rows[LABEL]]
    rows = rows.remove_columns(LABEL).add_column(LABEL, labels)
    return rows, "All images" if len(splits) == 1 else split.capitalize()


def _write(file: Path, scores: Scores, labels: list[dict[str, object]]) -> None:
    values = {"accuracy": scores.accuracy, "images": scores.total}
    if scores.kind == "segmentation":
        values = {"mean_iou": scores.mean_iou, "accuracy": scores.accuracy, "pixels": scores.total}
    text = json.dumps({**values, "labels": labels, "confusion": scores.confusion.tolist()}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
