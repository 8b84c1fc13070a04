"""Tune a vision transformer to new classes with a linear head, VPT-Shallow and VPT-Deep, and compare them.

    python examples/quickstart.py                                   # handwritten digits, nothing to download
    python examples/quickstart.py --backbone swin
    python examples/quickstart.py --model google/vit-base-patch16-224-in21k --data my-images

``my-images`` holds one folder of images for each class, or ``train`` and ``test`` with such folders.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import digits
import torch
from images import DataError, ImageSet, Preprocessing, load_images
from training import DEVICE, METHODS, Result, Settings, accuracy, be_quiet, load_backbone, predict, table, tune
from transformers import AutoModelForImageClassification

from vpt_peft import VPTError, VPTModel

NAMES = ("linear", "vpt-shallow", "vpt-deep")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and completed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--backbone", choices=("vit", "swin"), default="vit", help="what to pretrain on digits (default: vit)")
    add("--model", help="in place of that, a checkpoint for images: its name on the Hugging Face Hub or its folder")
    add("--data", help="your images: a folder of class folders, with or without train/ and test/, or a Hub dataset")
    add("--flip", action="store_true", help="mirror half of the images; only where a mirrored image keeps its class")
    add("--epochs", type=int, help=f"default: {Settings.epochs}, for the digits {digits.EPOCHS}")
    add("--pretraining-epochs", type=int, default=digits.PRETRAINING_EPOCHS, help="default: %(default)s")
    add("--seed", type=int, default=0, help="sets everything that is random (default: 0)")
    add("--output", type=Path, help="where to save the adapters (default: runs/quickstart, or a folder beside it)")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together: give both, or neither for the handwritten digits.")
    if args.epochs is None:
        args.epochs = Settings.epochs if args.model else digits.EPOCHS
    if args.output is None:
        kind = f"{Path(args.model).name}-{Path(args.data).name}" if args.model else args.backbone
        args.output = Path("runs", "quickstart" if kind == "vit" else f"quickstart-{kind}")
    return args


def prepare(args: argparse.Namespace) -> tuple[str, ImageSet, ImageSet]:
    """The backbone's name or folder, and the images to train on and to test on."""
    if args.model:
        return args.model, *load_images(args.data, Preprocessing.of(args.model), args.seed)
    folder = args.output / "backbone"
    print(f"1. Pretraining a small {args.backbone} on the handwritten digits 0 to 4.")
    reached = digits.pretrain(args.backbone, folder, args.pretraining_epochs, args.seed)
    print(f"   It names {reached:.1f} % of the test images of these digits. Saved in {folder}.\n")
    return str(folder), *digits.new_task(args.seed)


def compare(backbone: str, train_set: ImageSet, test_set: ImageSet, args: argparse.Namespace) -> dict[str, Result]:
    """Tunes the same frozen backbone by each method; the adapters are saved in folders named after them."""
    names = ", ".join(train_set.class_names[:10]) + (", ..." if len(train_set.class_names) > 10 else "")
    print(f"2. Freezing it and tuning it to the classes {names}:")
    print(f"   {len(train_set)} images to train on, {len(test_set)} to test on, {args.epochs} epochs.")
    settings, methods = Settings(args.epochs, flip=args.flip), METHODS if args.model else digits.SMALL_METHODS
    model = load_backbone(backbone, train_set.class_names, args.seed)
    results = {}
    for name in NAMES:
        results[name] = tune(model, methods[name], (train_set, test_set), settings, args.seed, args.output / name)
    return results


def show(results: dict[str, Result]) -> None:
    """Prints what each method reached and what it cost."""
    rows = [("Method", "Accuracy", "Trained parameters", "Of the backbone", "Bytes on disk", "Seconds")]
    for result in results.values():
        rows.append((
            result.method.title, f"{result.accuracy:.1f} %", f"{result.parameters:,}", f"{result.share:.2f} %",
            f"{result.size:,}", f"{result.seconds:.1f}",
        ))  # fmt: skip
    print(f"\n{table(rows)}\n")


def check_reloaded(backbone: str, folder: Path, test_set: ImageSet, expected: torch.Tensor) -> None:
    """Loads the saved adapter into a fresh backbone and compares its predictions with those made before saving."""
    fresh = AutoModelForImageClassification.from_pretrained(backbone, dtype=torch.float32).to(DEVICE)
    logits = predict(VPTModel.from_pretrained(fresh, folder), test_set)
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max()
        sys.exit(f"The reloaded adapter must predict the same, but its logits differ by up to {difference}.")
    print(f"   Reloaded into a fresh backbone, it gives the same {len(logits)} predictions, identical to the last bit")
    print(f"   ({accuracy(logits, test_set):.1f} % are right).")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    be_quiet()
    try:
        backbone, train_set, test_set = prepare(args)
        results = compare(backbone, train_set, test_set, args)
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    show(results)
    best = max(results, key=lambda name: results[name].accuracy)
    print(f"3. The best adapter, {results[best].method.title}, is saved in {args.output / best}.")
    check_reloaded(backbone, args.output / best, test_set, results[best].logits)


if __name__ == "__main__":
    main()
