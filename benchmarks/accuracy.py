"""Accuracy of a linear head, BitFit, LoRA, VPT-Shallow, VPT-Deep and full fine-tuning on small image sets, as a table.

    python benchmarks/accuracy.py --model google/vit-base-patch16-224-in21k --data flowers scenes --output flowers.json
    python benchmarks/accuracy.py --backbone swin       # a small Swin, pretrained on the spot on handwritten digits

Each method has one default setting for all image sets. ``--sweep`` tries others, listed in ``settings.py``, with
``--validation``, which tests on a fifth of the training images and leaves the test images alone; ``--tuned-by`` its
output then adds runs with the setting that did best there on each image set. Each finished run is written to the output
at once, and ``--resume`` leaves out what is there; ``--report`` trains nothing. ``--readme`` puts tables into a text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import digits
from accuracy_tables import comparison, insert, settings_table, summary, sweep_table
from images import DataError, ImageSet, Preprocessing, load_images, public_name
from settings import ALL_METHODS, Run, best, candidates, find, settings_of, variant
from training import Method, Result, Settings, be_quiet, load_backbone, tune


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
    add(
        "--image-size",
        type=int,
        help="pixels to read images at (default: the checkpoint's); positions are interpolated",
    )
    add("--methods", nargs="+", choices=ALL_METHODS, default=list(ALL_METHODS), help="default: all; lora needs peft")
    add("--seeds", nargs="+", type=int, default=[0], help="one run each; a seed sets everything that is random")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=Settings.batch_size, help="default: %(default)s")
    add("--precision", choices=("float32", "bfloat16"), default=Settings.precision, help="default: %(default)s")
    add("--learning-rate", type=float, help="in place of each method's own")
    add("--head-learning-rate", type=float, help="in place of each method's own (default: --learning-rate, if given)")
    add("--num-tokens", type=int, help="prompt length, in place of each method's own")
    add("--flip", action="store_true", help="mirror half of the images; only where a mirrored image keeps its class")
    add("--validation", action="store_true", help="train on 80 %% of the training images, test on the other 20 %%")
    add("--sweep", action="store_true", help="try the settings of benchmarks/settings.py, with --validation")
    add("--tuned-by", type=Path, help="output of --sweep: run with each image set's best setting besides the defaults")
    add("--output", type=Path, default=Path("runs/accuracy.json"), help="default: %(default)s")
    add("--resume", action="store_true", help="keep what the output holds and leave out runs that it has")
    add("--report", action="store_true", help="train nothing: tables of what the output holds")
    add(
        "--readme", type=Path, help="a text with <!-- accuracy --> and <!-- /accuracy -->, to write tables between them"
    )
    add("--mark", default="accuracy", help="the name in those marks (default: %(default)s), but for other tables")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data belong together: give both, or neither for the handwritten digits.")
    if args.image_size and not args.model:
        parser.error("--image-size is for --model and --data; the handwritten digits have 32 pixels.")
    if args.sweep and args.tuned_by:
        parser.error("--sweep comes first; then give its output to --tuned-by.")
    if args.mark in ("settings", "sweep") or (args.sweep and args.mark != "accuracy"):
        parser.error(f"--mark is for tables of accuracy, under a name of their own, got {args.mark}.")
    if args.output.exists() and not args.resume and not args.report:
        parser.error(f"{args.output} exists. Add --resume to go on with it, or choose another --output.")
    args.validation |= args.sweep
    return args


def tasks(args: argparse.Namespace, seed: int, folder: Path) -> Iterator[Task]:
    """The tasks that the command line asks for; what is pretrained on the spot is kept in ``folder``."""
    if not args.model:
        digits.pretrain(args.backbone, folder, digits.PRETRAINING_EPOCHS, seed)
        yield Task(f"small {args.backbone}, digits 0-4", str(folder), "digits 5-9", *digits.new_task(seed))
    for data in args.data:
        images = load_images(data, Preprocessing.of(args.model, args.image_size), seed)
        yield Task(public_name(args.model), args.model, public_name(data), *images)


def methods(args: argparse.Namespace, data: str) -> Iterator[tuple[str, Method]]:
    """The chosen methods with all settings that the command line asks for on an image set."""
    for name in args.methods:
        own = variant(ALL_METHODS[name], args.learning_rate, args.head_learning_rate, args.num_tokens)
        chosen = candidates(name) if args.sweep else [own]
        if args.tuned_by:
            chosen.append(best(read(args.tuned_by), name, data))
        yield from ((name, one) for one in dict.fromkeys(chosen))


def read(output: Path) -> list[Run]:
    """The runs that an output holds."""
    return json.loads(output.read_text()) if output.exists() else []


def write(output: Path, runs: Sequence[Run]) -> None:
    """Replaces an output as a whole, so that it is never half a file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(runs, indent=1) + "\n")
    os.replace(part, output)


def run(args: argparse.Namespace) -> list[Run]:
    """Trains what the command line asks for and the output does not hold yet. Returns the runs that were asked for."""
    settings = Settings(args.epochs, args.batch_size, flip=args.flip, precision=args.precision)
    asked = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for task in tasks(args, seed, Path(folder) / "backbone"):
                images = task.train_set.split(0.8, seed) if args.validation else (task.train_set, task.test_set)
                for name, method in methods(args, task.data):
                    key = {
                        "model": task.model, "data": task.data, "seed": seed, **settings_of(name, method),
                        **dataclasses.asdict(settings), "image_size": images[0].images.shape[-1],
                        "train_images": len(images[0]), "test_images": len(images[1]), "validation": args.validation,
                    }  # fmt: skip
                    done = find(read(args.output), key)
                    if not done and not args.report:
                        print(f"{task.data}, seed {seed}, {settings_of(name, method)}", file=sys.stderr)
                        model = load_backbone(task.backbone, task.train_set.class_names, seed, settings.precision)
                        result = tune(model, method, images, settings, seed, Path(folder) / f"{task.data}-{name}")
                        done = [key | measured(result)]
                        write(args.output, read(args.output) + done)  # what another process wrote meanwhile is kept
                    asked += done
    return asked


def measured(result: Result) -> Run:
    """What is kept of a result."""
    return {
        "accuracy": round(result.accuracy, 2), "parameters": result.parameters, "share": round(result.share, 3),
        "bytes": result.size, "seconds": round(result.seconds, 1),
    }  # fmt: skip


def report(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, str]:
    """The tables that the command line asks for, each under the mark of its place in a text."""
    if not runs:
        raise DataError(f"{args.output} must hold such runs to report on, but has none. Run it without --report first.")
    if args.sweep:
        return {"sweep": sweep_table(runs)}
    if args.tuned_by:
        return {"settings": settings_table(args.methods), args.mark: comparison(runs, read(args.tuned_by))}
    return {args.mark: summary(runs)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    args = arguments(argv)
    be_quiet()
    try:
        tables = report(args, run(args))
        if args.readme:
            for mark, text in tables.items():
                insert(args.readme, mark, text)
    except DataError as error:
        sys.exit(str(error))
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
