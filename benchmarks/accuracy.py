"""Accuracy of a linear head, VPT-Shallow, VPT-Deep and full fine-tuning on small image sets, as a Markdown table.

    python benchmarks/accuracy.py --model google/vit-base-patch16-224-in21k --data flowers scenes --output flowers.json
    python benchmarks/accuracy.py --backbone swin       # a small Swin, pretrained on the spot on handwritten digits

Each method has one fixed setting for all image sets, chosen with ``--validation``, which tests on a fifth of the
training images and leaves the test images alone. Each finished run is written to the output at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import digits
from images import DataError, ImageSet, Preprocessing, load_images
from training import METHODS, Method, Result, Settings, be_quiet, load_backbone, table, tune

HEADING = ("Data", "Method", "Accuracy", "Trained parameters", "Of the backbone", "Saved", "Training")


@dataclass(frozen=True)
class Task:
    """What to tune to what. ``backbone`` is a checkpoint's name or folder; ``model`` and ``data`` are for the table."""

    model: str
    backbone: str
    data: str
    train_set: ImageSet
    test_set: ImageSet


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="a checkpoint's name on the Hub or its folder; left out, a small one is pretrained on the spot")
    add("--data", nargs="+", default=[], help="folders of class folders (see examples/quickstart.py), or Hub datasets")
    add("--backbone", choices=("vit", "swin"), default="vit", help="what to pretrain on the spot (default: vit)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0], help="one run each; a seed sets everything that is random")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=Settings.batch_size, help="default: %(default)s")
    add("--learning-rate", type=float, help="in place of each method's own")
    add("--num-tokens", type=int, help="prompt length, in place of each method's own")
    add("--flip", action="store_true", help="mirror half of the images; only where a mirrored image keeps its class")
    add("--validation", action="store_true", help="train on 80 %% of the training images, test on the other 20 %%")
    add("--output", type=Path, default=Path("runs/accuracy.json"), help="default: %(default)s")
    add("--resume", action="store_true", help="keep what the output holds and leave out runs that it has")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together: give both, or neither for the handwritten digits.")
    if args.output.exists() and not args.resume:
        parser.error(f"{args.output} exists. Add --resume to go on with it, or choose another --output.")
    return args


def tasks(args: argparse.Namespace, seed: int, folder: Path) -> Iterator[Task]:
    """The tasks that the command line asks for; what is pretrained on the spot is kept in ``folder``."""
    if not args.model:
        digits.pretrain(args.backbone, folder, digits.PRETRAINING_EPOCHS, seed)
        yield Task(f"small {args.backbone}, digits 0-4", str(folder), "digits 5-9", *digits.new_task(seed))
    for data in args.data:
        images = load_images(data, Preprocessing.of(args.model), seed)
        yield Task(_name(args.model), args.model, _name(data), *images)


def _name(source: str) -> str:
    """The name of a folder, without where it lies on this machine; a name on the Hub stays as it is."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def methods(args: argparse.Namespace) -> dict[str, Method]:
    """The chosen methods with what the command line changes about them."""
    chosen = {}
    for name in args.methods:
        method = METHODS[name]
        if args.learning_rate is not None:
            method = dataclasses.replace(method, learning_rate=args.learning_rate, head_learning_rate=None)
        if args.num_tokens is not None and method.config is not None and method.config.num_tokens:
            method = dataclasses.replace(method, config=method.config.replace(num_tokens=args.num_tokens))
        chosen[name] = method
    return chosen


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains what the command line asks for and the output does not hold yet. Returns the runs that were asked for."""
    settings = Settings(args.epochs, args.batch_size, flip=args.flip)
    known: list[dict[str, Any]] = json.loads(args.output.read_text()) if args.output.exists() else []
    asked = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for task in tasks(args, seed, Path(folder) / "backbone"):
                images = task.train_set.split(0.8, seed) if args.validation else (task.train_set, task.test_set)
                for name, method in methods(args).items():
                    key = {
                        "model": task.model, "data": task.data, "method": name, "seed": seed,
                        **dataclasses.asdict(settings), "learning_rate": method.learning_rate,
                        "head_learning_rate": method.head_learning_rate,
                        "num_tokens": method.config.num_tokens if method.config else 0,
                        "train_images": len(images[0]), "test_images": len(images[1]), "validation": args.validation,
                    }  # fmt: skip
                    done = next((one for one in known if key.items() <= one.items()), None)
                    if done is None:
                        print(f"{task.data}, seed {seed}", file=sys.stderr)
                        model = load_backbone(task.backbone, task.train_set.class_names, seed)
                        result = tune(model, method, images, settings, seed, Path(folder) / f"{task.data}-{name}")
                        done = key | measured(result)
                        known.append(done)
                        args.output.parent.mkdir(parents=True, exist_ok=True)
                        args.output.write_text(json.dumps(known, indent=1) + "\n")
                    asked.append(done)
    return asked


def measured(result: Result) -> dict[str, float]:
    """What is kept of a result."""
    return {
        "accuracy": round(result.accuracy, 2), "parameters": result.parameters, "share": round(result.share, 3),
        "bytes": result.size, "seconds": round(result.seconds, 1),
    }  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> str:
    """One row for each image set and method: the mean over the seeds, ± the standard deviation if there are several."""
    rows = [HEADING]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["data"], one["method"]), []).append(one)
    for (data, name), group in groups.items():
        accuracies = [one["accuracy"] for one in group]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(group) > 1 else ""
        rows.append((
            data, METHODS[name].title, f"{statistics.mean(accuracies):.1f} %{spread}", f"{group[0]['parameters']:,}",
            f"{group[0]['share']:.2f} %", f"{group[0]['bytes'] / 1000:,.0f} kB",
            f"{statistics.mean(one['seconds'] for one in group):,.0f} s",
        ))  # fmt: skip
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    args = arguments(argv)
    be_quiet()
    try:
        runs = run(args)
    except DataError as error:
        sys.exit(str(error))
    print(summary(runs))


if __name__ == "__main__":
    main()
