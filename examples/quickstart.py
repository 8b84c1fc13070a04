"""Fine-tune a vision transformer on new classes with a linear head, VPT-Shallow and VPT-Deep, and compare them.

    python examples/quickstart.py                                   # handwritten digits, no download
    python examples/quickstart.py --backbone swin
    python examples/quickstart.py --model google/vit-base-patch16-224-in21k --data my-images

``my-images`` contains one folder of images per class, or ``train`` and ``test`` with such folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import digits
import torch
from images import DataError, ImageSet, Preprocessing, load_images
from training import (
    DEVICE,
    METHODS,
    Result,
    Settings,
    accuracy,
    load_backbone,
    predict,
    silence_transformers,
    table,
    tune,
)
from transformers import AutoModelForImageClassification

from vpt_peft import VPTError, VPTModel

NAMES = ("linear", "vpt-shallow", "vpt-deep", "vpt-prefix-bias")
BACKBONES = {"vit": "ViT", "swin": "Swin"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, default="vit", help="backbone to pretrain on digits (default: vit)")
    add("--model", help="a vision checkpoint instead, by its name on the Hugging Face Hub or its folder")
    add("--data", help="a folder with one folder per class, with or without train/ and test/, or a dataset on the Hub")
    add("--flip", action="store_true", help="random horizontal flips")
    add("--epochs", type=int, help=f"default: {Settings.epochs}, digits: {digits.EPOCHS}")
    add("--pretraining-epochs", type=int, default=digits.PRETRAINING_EPOCHS, help="default: %(default)s")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, help="output folder (default: runs/quickstart or runs/quickstart-...)")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data must be given together, or neither of them for the handwritten digits.")
    if args.epochs is None:
        args.epochs = Settings.epochs if args.model else digits.EPOCHS
    if args.output is None:
        kind = f"{Path(args.model).name}-{Path(args.data).name}" if args.model else args.backbone
        args.output = Path("runs", "quickstart" if kind == "vit" else f"quickstart-{kind}")
    return args


def prepare(args: argparse.Namespace) -> tuple[str, ImageSet, ImageSet]:
    """The backbone's name or folder, training images and test images."""
    if args.model:
        return args.model, *load_images(args.data, Preprocessing.from_checkpoint(args.model), args.seed)
    folder = args.output / "backbone"
    print(f"1. Pretraining a small {BACKBONES[args.backbone]} on the handwritten digits 0 to 4.")
    test_accuracy = digits.pretrain(args.backbone, folder, args.pretraining_epochs, args.seed)
    print(f"   Test accuracy {test_accuracy:.1f} %. Saved in {folder}.\n")
    return str(folder), *digits.new_task(args.seed)


def compare(backbone: str, train_set: ImageSet, test_set: ImageSet, args: argparse.Namespace) -> dict[str, Result]:
    """Fine-tunes the same frozen backbone by each method. Each adapter is saved in a folder named after the method."""
    names = ", ".join(train_set.class_names[:10]) + (", ..." if len(train_set.class_names) > 10 else "")
    print(f"2. Fine-tuning the frozen backbone on the classes {names}:")
    print(f"   {len(train_set)} training images, {len(test_set)} test images, {args.epochs} epochs.")
    settings, methods = Settings(args.epochs, flip=args.flip), METHODS if args.model else digits.SMALL_METHODS
    model = load_backbone(backbone, train_set.class_names, args.seed)
    results = {}
    for name in NAMES:
        results[name] = tune(model, methods[name], (train_set, test_set), settings, args.seed, args.output / name)
    return results


def print_table(results: dict[str, Result]) -> None:
    """Prints accuracy and cost of each method."""
    rows = [("Method", "Accuracy", "Trained parameters", "Share of backbone", "Bytes on disk", "Seconds")]
    for result in results.values():
        rows.append((
            result.method.title, f"{result.accuracy:.1f} %", f"{result.parameters:,}", f"{result.share:.2f} %",
            f"{result.size:,}", f"{result.seconds:.1f}",
        ))  # fmt: skip
    print(f"\n{table(rows)}\n")


def check_reloaded(backbone: str, folder: Path, test_set: ImageSet, expected: torch.Tensor) -> None:
    """Loads the saved adapter onto a fresh backbone and compares its logits with those before saving."""
    fresh = AutoModelForImageClassification.from_pretrained(backbone, dtype=torch.float32).to(DEVICE)
    logits = predict(VPTModel.from_pretrained(fresh, folder), test_set)
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max()
        sys.exit(f"Logits of the reloaded adapter differ by up to {difference} from those before saving.")
    print(f"   Reloaded onto a fresh backbone: logits of all {len(logits)} test images are bit-identical", end=" ")
    print(f"(accuracy {accuracy(logits, test_set):.1f} %).")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    try:
        backbone, train_set, test_set = prepare(args)
        results = compare(backbone, train_set, test_set, args)
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    print_table(results)
    best = max(results, key=lambda name: results[name].accuracy)
    print(f"3. Saved the best adapter, {results[best].method.title}, in {args.output / best}.")
    check_reloaded(backbone, args.output / best, test_set, results[best].logits)


if __name__ == "__main__":
    main()
