"""Accuracy of prompts in the last layers only, trained on cached features.

    python benchmarks/last_layers.py --model deit-tiny --data flowers17 rsscn7 --image-size 112 --epochs 8 \\
        --augmentations 4 --batch-size 8 --seeds 0 1 --output benchmarks/results/last_layers.json

For each dataset, the features in front of the lowest of those layers are computed once, in several augmentations, and
serve all methods, numbers of layers and seeds. Each adapter is tested on pixels. Settings, augmentation and schedule
are those of ``accuracy.py``, so that its results for prompts in all layers can be compared. Each finished run is
written to the output immediately; runs that are there are skipped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablations import with_layers
from harness import (
    Settings,
    accuracy,
    check_minimum,
    learning_rate_factor,
    load_backbone,
    optimizer_groups,
    predict,
    size_kwargs,
)
from image_sets import ImageSet, Preprocessing, augment, load_images
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from vpt_peft import VPTModel, get_vpt_model
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers
from vpt_peft.recipes.training.methods import METHODS, Method
from vpt_peft.recipes.training.task import display_name
from vpt_peft.training import CachedFeatures, cache_features

BASES = ("vpt-deep", "vpt-prefix")

Run = dict[str, Any]


class Augmented(Dataset[dict[str, Tensor]]):
    """An image set with random augmentation by the default generator."""

    def __init__(self, images: ImageSet, flip: bool) -> None:
        self.images, self.flip = images, flip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = augment(self.images.images[index : index + 1], torch.default_generator, self.flip)
        return {"pixel_values": self.images.pixel_values(image)[0], "labels": self.images.labels[index]}


def train(vpt: VPTModel, features: CachedFeatures, settings: Settings, method: Method, seed: int, **size: bool) -> None:
    """Trains as ``harness.train``, on features."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(optimizer_groups(vpt, method), weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(features) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    features.set_epoch(0)
    vpt.train()
    for _ in range(settings.epochs):
        for indices in torch.randperm(len(features), generator=generator).split(settings.batch_size):
            optimizer.zero_grad()
            vpt(**default_collate([features[index] for index in indices.tolist()]), **size).loss.backward()
            optimizer.step()
            schedule.step()


def measure(data: str, args: argparse.Namespace, runs: list[Run]) -> None:
    """Trains all methods that are missing in the runs on one dataset, and adds them."""
    settings = Settings(epochs=args.epochs, batch_size=args.batch_size)
    described = {
        "model": display_name(args.model), "data": display_name(data), "image_size": args.image_size,
        "epochs": args.epochs, "batch_size": args.batch_size, "augmentations": args.augmentations or args.epochs,
    }  # fmt: skip
    wanted = [
        {**described, "method": name, "layers": number, "seed": seed}
        for seed in args.seeds
        for name in args.methods
        for number in args.layers
    ]
    missing = [run for run in wanted if not any(run.items() <= done.items() for done in runs)]
    if not missing:
        return
    preprocessing = Preprocessing.from_checkpoint(args.model, args.image_size)
    train_set, test_set = load_images(data, preprocessing, 0)
    size = size_kwargs(
        load_backbone(args.model, train_set.class_names, 0), train_set.pixel_values(train_set.images[:1])
    )
    folder = args.features / display_name(data)
    for run in missing:
        model = load_backbone(args.model, train_set.class_names, run["seed"])
        depth = model.config.num_hidden_layers
        methods = {
            number: with_layers(METHODS[run["method"]], range(depth - number, depth), depth)
            for number in (run["layers"], max(args.layers))
        }
        config = methods[run["layers"]].config
        lowest = methods[max(args.layers)].config
        assert config is not None and lowest is not None
        torch.manual_seed(run["seed"])
        vpt = get_vpt_model(model, config)
        vpt.add_adapter("lowest", lowest)
        vpt.set_adapter("lowest")
        start = time.process_time()
        features = cache_features(vpt, Augmented(train_set, False), folder, run["augmentations"], **size)
        caching = time.process_time() - start
        vpt.set_adapter("default")
        vpt.delete_adapter("lowest")
        start = time.process_time()
        train(vpt, features, settings, methods[run["layers"]], run["seed"], **size)
        run["cpu_seconds"] = round(time.process_time() - start, 1)
        run["caching_cpu_seconds"] = round(caching, 1)
        run["accuracy"] = round(accuracy(predict(vpt, test_set), test_set), 2)
        print(run, flush=True)
        runs.append(run)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")


def make_table(runs: Sequence[Run]) -> str:
    """Mean test accuracy by method, number of layers and dataset."""
    names = sorted({run["data"] for run in runs})
    rows = [["Prompts", "Layers", *names]]
    for method, number in sorted({(run["method"], run["layers"]) for run in runs}):
        cells = []
        for data in names:
            found = [
                run["accuracy"] for run in runs if (run["method"], run["layers"], run["data"]) == (method, number, data)
            ]
            cells.append(f"{sum(found) / len(found):.1f}" if found else "")
        rows.append([METHODS[method].title, f"last {number}", *cells])
    return table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a ViT checkpoint's name on the Hub or its folder")
    add("--data", nargs="+", required=True, help="folders with class folders, or datasets on the Hub")
    add("--image-size", type=int, default=224, help="in pixels (default: %(default)s)")
    add("--methods", nargs="+", choices=BASES, default=BASES, help="default: both")
    add("--layers", nargs="+", type=int, default=[3, 6], help="numbers of last layers (default: 3 6)")
    add("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: 0)")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--augmentations", type=int, help="of each image (default: the number of epochs)")
    add("--batch-size", type=int, default=Settings.batch_size, help="default: %(default)s")
    add("--features", type=Path, help="folder for the features (default: one that is deleted)")
    add("--output", type=Path, default=Path("runs/last_layers.json"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    check_minimum(parser, args, layers=1, epochs=1, augmentations=1, batch_size=1, image_size=1)
    silence_transformers()
    runs: list[Run] = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else []
    try:
        with tempfile.TemporaryDirectory() as temporary:
            args.features = args.features or Path(temporary)
            for data in args.data:
                measure(data, args, runs)
    except RecipeError as error:
        sys.exit(str(error))
    print(make_table(runs))


if __name__ == "__main__":
    main()
