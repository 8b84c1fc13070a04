"""Test accuracy of a linear head, BitFit, LoRA, VPT-Shallow, VPT-Deep and full fine-tuning on small datasets.

    python benchmarks/accuracy.py --model google/vit-base-patch16-224-in21k --data flowers scenes --output flowers.json
    python benchmarks/accuracy.py --backbone swin       # a small Swin, pretrained on digits

Each method has one default setting for all datasets. ``--sweep`` runs the grid of ``settings.py`` with
``--validation``: a fifth of the training images is held out, and the test images are not used. ``--tuned-by``, given
the output of the sweep, adds runs with the best setting for each dataset. Each finished run is written to the output
immediately; ``--resume`` skips runs that are there, ``--report`` only prints tables, and ``--readme`` inserts them into
a file.
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

import digit_sets
import torch
from accuracy_tables import comparison, insert_table, settings_table, summary, sweep_table
from harness import DEVICE, Result, Settings, load_backbone, tune
from image_sets import ImageSet, Preprocessing, load_images
from settings import ALL_METHODS, Run, best_candidate, candidates, find_runs, settings_of, with_settings

from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.runtime import silence_transformers
from vpt_peft.recipes.training.methods import Method
from vpt_peft.recipes.training.task import display_name


@dataclass(frozen=True)
class Task:
    """A backbone (name or folder of a checkpoint) and a dataset; ``model`` and ``data`` are their names in tables."""

    model: str
    backbone: str
    data: str
    train_set: ImageSet
    test_set: ImageSet


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="a checkpoint's name on the Hub or its folder (default: a small one is pretrained on digits)")
    add(
        "--data",
        nargs="+",
        default=[],
        help="folders with class folders (see vpt-peft train), or datasets on the Hub",
    )
    add("--backbone", choices=("vit", "swin"), default="vit", help="backbone to pretrain on digits (default: vit)")
    add(
        "--image-size",
        type=int,
        help="image size in pixels (default: the checkpoint's); position embeddings are interpolated",
    )
    add("--methods", nargs="+", choices=ALL_METHODS, default=list(ALL_METHODS), help="default: all; lora requires peft")
    add("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: 0)")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=Settings.batch_size, help="default: %(default)s")
    add("--precision", choices=("float32", "bfloat16"), default=Settings.precision, help="default: %(default)s")
    add("--learning-rate", type=float, help="default: each method's")
    add("--head-learning-rate", type=float, help="default: --learning-rate if given, else each method's")
    add("--num-tokens", type=int, help="prompt length (default: each method's)")
    add("--flip", action="store_true", help="random horizontal flips")
    add("--validation", action="store_true", help="train on 80 %% of the training images, evaluate on the other 20 %%")
    add("--sweep", action="store_true", help="run the grid of benchmarks/settings.py, with --validation")
    add("--tuned-by", type=Path, help="output of --sweep: also run the best setting for each dataset")
    add("--compare", action="store_true", help="tables of methods and datasets, and of the differences to LoRA")
    add("--output", type=Path, default=Path("runs/accuracy.json"), help="default: %(default)s")
    add("--resume", action="store_true", help="keep the runs of the output, and skip them")
    add("--report", action="store_true", help="no training: print tables of the output's runs")
    add(
        "--readme",
        type=Path,
        help="a file with <!-- accuracy --> and <!-- /accuracy -->, to insert the tables",
    )
    add("--mark", default="accuracy", help="name in these marks (default: %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data must be given together, or neither of them for the handwritten digit_sets.")
    if args.image_size and not args.model:
        parser.error("--image-size requires --model and --data; the handwritten digits have 32 pixels.")
    if args.sweep and args.tuned_by:
        parser.error(
            "--sweep and --tuned-by exclude each other: run --sweep first, then pass its output to --tuned-by."
        )
    if args.mark in ("settings", "sweep") or (args.sweep and args.mark != "accuracy"):
        parser.error(f"--mark is for tables of accuracy and must not be the mark of another table, got {args.mark}.")
    if args.output.exists() and not args.resume and not args.report:
        parser.error(f"{args.output} exists. Add --resume to continue it, or choose another --output.")
    args.validation |= args.sweep
    return args


def tasks(args: argparse.Namespace, seed: int, folder: Path) -> Iterator[Task]:
    """The tasks of the command line. A backbone that is pretrained is saved in ``folder``."""
    if not args.model:
        digit_sets.pretrain(args.backbone, folder, digit_sets.PRETRAINING_EPOCHS, seed)
        yield Task(f"small {args.backbone}, digits 0-4", str(folder), "digits 5-9", *digit_sets.new_task(seed))
    for data in args.data:
        images = load_images(data, Preprocessing.from_checkpoint(args.model, args.image_size), seed)
        yield Task(display_name(args.model), args.model, display_name(data), *images)


def methods(args: argparse.Namespace, data: str) -> Iterator[tuple[str, Method]]:
    """The methods with all settings to run on a dataset."""
    for name in args.methods:
        default = with_settings(ALL_METHODS[name], args.learning_rate, args.head_learning_rate, args.num_tokens)
        variants = candidates(name) if args.sweep else [default]
        if args.tuned_by:
            variants.append(best_candidate(read(args.tuned_by), name, data))
        yield from ((name, method) for method in dict.fromkeys(variants))


def read(output: Path) -> list[Run]:
    """The runs in an output file."""
    return json.loads(output.read_text()) if output.exists() else []


def write(output: Path, runs: Sequence[Run]) -> None:
    """Replaces an output file atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(runs, indent=1) + "\n")
    os.replace(part, output)


def run(args: argparse.Namespace) -> list[Run]:
    """Trains all requested runs that the output does not contain yet. Returns the requested runs."""
    settings = Settings(args.epochs, args.batch_size, flip=args.flip, precision=args.precision)
    requested = []
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
                    done = find_runs(read(args.output), key)
                    if not done and not args.report:
                        print(f"{task.data}, seed {seed}, {settings_of(name, method)}", file=sys.stderr)
                        model = load_backbone(task.backbone, task.train_set.class_names, seed, settings.precision)
                        result = tune(model, method, images, settings, seed, Path(folder) / f"{task.data}-{name}")
                        done = [key | result_fields(result)]
                        write(args.output, read(args.output) + done)  # other processes may have written meanwhile
                    requested += done
    return requested


def device_name() -> str:
    """The name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"


def result_fields(result: Result) -> Run:
    """The fields of a result in the output file."""
    return {
        "accuracy": round(result.accuracy, 2), "parameters": result.parameters, "share": round(result.share, 3),
        "bytes": result.size, "seconds": round(result.seconds, 1), "device": device_name(),
    }  # fmt: skip


def report(args: argparse.Namespace, runs: Sequence[Run]) -> dict[str, str]:
    """The requested tables, by the mark of their place in a file."""
    if not runs:
        raise RecipeError(f"{args.output} contains none of the requested runs. Run without --report first.")
    if args.sweep:
        return {"sweep": sweep_table(runs)}
    if args.tuned_by:
        return {"settings": settings_table(args.methods), args.mark: comparison(runs, read(args.tuned_by))}
    if args.compare:
        return {"settings": settings_table(args.methods), args.mark: comparison(runs)}
    return {args.mark: summary(runs)}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    args = arguments(argv)
    silence_transformers()
    try:
        tables = report(args, run(args))
        if args.readme:
            for mark, text in tables.items():
                insert_table(args.readme, mark, text)
    except RecipeError as error:
        sys.exit(str(error))
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
