"""The ablations of the VPT paper on one dataset: a table and a picture.

    python benchmarks/ablations.py --model deit-tiny --data rsscn7 --image-size 112 --epochs 8 --batch-size 8 \\
        --precision bfloat16 --seeds 0 1 2 --output ablations.json --plot ablations.png

Each ablation changes one thing about VPT-Deep or VPT-Prefix with 10 prompts: their number, the layers that have them,
location, pooling, initialisation, sharing or kind (Jia et al., ECCV 2022, section 4.3). With ``--image-size``, position
embeddings are interpolated once, so that the size is the backbone's own. With ``--validation``, a fifth of the training
images is held out, and the test images are not used. Each finished run is written to the output immediately;
``--resume`` skips runs that are there.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accuracy import read, result_fields, write
from accuracy_tables import format_accuracy, mean
from harness import Settings, check_minimum, load_backbone, tune
from image_sets import ImageSet, Preprocessing, load_images
from initialisation import Initialised
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from settings import Run, find_runs
from transformers import AutoModelForImageClassification

from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report.plots import BLUE
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers
from vpt_peft.recipes.training.methods import METHODS, Method
from vpt_peft.recipes.training.task import display_name

BORDER = 8  # pixels at each side; the image keeps whole patches
LENGTHS = (1, 5, 10, 20, 50)
BASES = {"VPT-Deep": METHODS["vpt-deep"], "VPT-Prefix": METHODS["vpt-prefix"]}


@dataclass(frozen=True)
class Variant:
    """One point of an ablation.

    Attributes:
        ablation, label: where it is drawn.
        margin: the image is that many pixels smaller, in height and width, than the backbone's.
    """

    ablation: str
    label: str
    method: Method
    margin: int = 0


def variants(num_layers: int) -> Iterator[Variant]:
    """All points of all ablations, for a backbone with a number of layers."""
    depths = sorted({max(1, num_layers * quarter // 4) for quarter in (1, 2, 3, 4)})
    for name, base in BASES.items():
        for length in LENGTHS:
            yield Variant(f"Length, {name}", str(length), with_config(base, num_tokens=length))
        for depth in depths:
            yield Variant(f"First layers, {name}", str(depth), with_layers(base, range(depth), num_layers))
        for depth in depths:
            layers = range(num_layers - depth, num_layers)
            yield Variant(f"Last layers, {name}", str(depth), with_layers(base, layers, num_layers))
    deep = BASES["VPT-Deep"]
    for location in ("prepend", "pixel", "add", "add-shared"):
        yield Variant("Location", location, with_config(deep, location=location))
    yield Variant("Location", "border", with_config(deep, location="border", deep=False, num_tokens=BORDER), 2 * BORDER)
    yield Variant("Location", "channel", with_config(deep, location="channel", deep=False, num_tokens=3))
    for pooling in ("default", "image", "prompt", "global"):
        yield Variant("Pooling", pooling, with_config(deep, pooling=pooling))
    for init in ("uniform", "normal"):
        yield Variant("Initialisation", init, with_config(deep, init=init))
    for init in ("sample", "kmeans", "mean"):
        yield Variant("Initialisation", init, Initialised(**vars(deep), initialisation=init))
    for name, base in BASES.items():
        yield Variant("Sharing", f"{name}, own", base)
        yield Variant("Sharing", f"{name}, shared", with_config(base, shared=True))
    for name in ("linear", "vpt-shallow", "vpt-deep", "vpt-prefix", "vpt-prefix-bias"):
        yield Variant("Kind", METHODS[name].title, METHODS[name])


def with_config(method: Method, **changes: Any) -> Method:
    """The method with other fields of its config."""
    assert method.config is not None
    return replace(method, config=method.config.replace(**changes))


def with_layers(method: Method, layers: range, num_layers: int) -> Method:
    """The method with prompts in some layers; in all of them it is the method itself."""
    return method if len(layers) == num_layers else with_config(method, layers_to_transform=list(layers))


def resize_backbone(name: str, image_size: int, folder: Path) -> None:
    """Saves a ViT for another image size, with interpolated position embeddings."""
    model = AutoModelForImageClassification.from_pretrained(name, dtype=torch.float32)
    embeddings = model.base_model.embeddings
    state, config = model.state_dict(), model.config
    num_tokens = 1 + (image_size // config.patch_size) ** 2
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(
            torch.zeros(1, num_tokens, config.hidden_size), image_size, image_size
        )
    key = f"{model.base_model_prefix}.embeddings.position_embeddings"
    config.image_size = image_size
    resized = type(model)(config)
    resized.load_state_dict({**state, key: positions})
    resized.save_pretrained(folder)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a ViT checkpoint's name on the Hub or its folder")
    add(
        "--data",
        required=True,
        help="folder with class folders (see vpt-peft train), or a dataset on the Hub",
    )
    add("--image-size", type=int, help="in pixels (default: the checkpoint's)")
    add("--ablations", nargs="+", help="start of the ablations' names, such as Length or Kind (default: all)")
    add("--seeds", nargs="+", type=int, default=[0], help="one run per seed (default: 0)")
    add("--epochs", type=int, default=Settings.epochs, help="default: %(default)s")
    add("--batch-size", type=int, default=Settings.batch_size, help="default: %(default)s")
    add("--precision", choices=("float32", "bfloat16"), default=Settings.precision, help="default: %(default)s")
    add("--validation", action="store_true", help="train on 80 %% of the training images, evaluate on the other 20 %%")
    add("--output", type=Path, default=Path("runs/ablations.json"), help="default: %(default)s")
    add("--resume", action="store_true", help="keep the runs of the output, and skip them")
    add("--report", action="store_true", help="no training: table and picture of the output's runs")
    add("--plot", type=Path, help="picture to draw, such as ablations.png")
    args = parser.parse_args(argv)
    check_minimum(parser, args, epochs=1, batch_size=1)
    if args.output.exists() and not args.resume and not args.report:
        parser.error(f"{args.output} exists. Add --resume to continue it, or choose another --output.")
    return args


def run(args: argparse.Namespace) -> list[Run]:
    """Trains all runs that the output does not contain yet. Returns the requested runs."""
    settings = Settings(args.epochs, args.batch_size, precision=args.precision)
    config = AutoModelForImageClassification.from_pretrained(args.model).config
    size = args.image_size or config.image_size
    chosen = [
        variant
        for variant in variants(config.num_hidden_layers)
        if args.ablations is None or variant.ablation.startswith(tuple(args.ablations))
    ]

    @cache
    def images(seed: int, side: int) -> tuple[ImageSet, ImageSet]:
        train_set, test_set = load_images(args.data, Preprocessing.from_checkpoint(args.model, side), seed)
        return train_set.split(0.8, seed) if args.validation else (train_set, test_set)

    requested: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        backbone = Path(folder) / "backbone"
        if not args.report:
            resize_backbone(args.model, size, backbone)
        for seed, variant in product(args.seeds, chosen):
            side = size - variant.margin
            key = {
                "model": display_name(args.model), "data": display_name(args.data), "seed": seed, "image_size": side,
                "validation": args.validation, **fields_of(variant.method), **dataclasses.asdict(settings),
            }  # fmt: skip
            found = find_runs(read(args.output), key)
            if not found and not args.report:
                print(f"seed {seed}, {variant.ablation}: {variant.label}", file=sys.stderr)
                train_set, test_set = images(seed, side)
                method = variant.method
                if isinstance(method, Initialised):
                    method = replace(method, images=train_set)
                model = load_backbone(str(backbone), train_set.class_names, seed, settings.precision)
                result = tune(model, method, (train_set, test_set), settings, seed, Path(folder) / str(len(requested)))
                found = [key | result_fields(result)]
                write(args.output, [*read(args.output), *found])
            requested += [{**done, "ablation": variant.ablation, "label": variant.label} for done in found]
    return requested


def fields_of(method: Method) -> Run:
    """What defines a run with a method."""
    config = method.config.to_dict() if method.config else {}
    named = ("num_tokens", "kind", "deep", "layers_to_transform", "shared", "init", "pooling", "location", "bias")
    return {
        **{name: config[name] for name in named}, **method.rates,
        "init": method.initialisation if isinstance(method, Initialised) else config["init"],
    }  # fmt: skip


def groups(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Runs by ablation and label, in order."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run["ablation"], {}).setdefault(run["label"], []).append(run)
    return found


def results_table(runs: Sequence[Run]) -> str:
    """One row per point of each ablation: accuracy in %, mean over the seeds ± standard deviation."""
    rows: list[tuple[str, ...]] = [("Ablation", "", "Accuracy, %", "Trained parameters", "Seeds")]
    for ablation, points in groups(runs).items():
        best = max(map(mean, points.values()))
        for label, group in points.items():
            text = format_accuracy(group)
            cells = f"**{text}**" if mean(group) == best else text, f"{group[0]['parameters']:,}", str(len(group))
            rows.append((ablation, label, *cells))
    return table(rows)


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draws one panel per ablation: the mean over the seeds, and each run as a dot."""
    found = groups(runs)
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure((4.2 * columns, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    for axis, (ablation, points) in zip(axes.flat, found.items(), strict=False):
        ordered = all(label.isdigit() for label in points)
        labels = list(points)
        axis.plot(labels, [mean(group) for group in points.values()], "o-" if ordered else "o", color=BLUE, ms=7)
        for label, group in points.items():
            values = [run["accuracy"] for run in group]
            axis.plot([label] * len(values), values, ".", color=BLUE, alpha=0.35)
        axis.set_title(ablation, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
        if not ordered:
            axis.tick_params(axis="x", rotation=30)
            axis.margins(x=0.12)
    one = runs[0]
    what = "Validation" if one["validation"] else "Test"
    figure.suptitle(f"{what} accuracy in %, {one['model']} on {one['data']}, {one['epochs']} epochs", fontsize=11)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark, prints its table and draws its picture."""
    args = arguments(argv)
    silence_transformers()
    try:
        runs = run(args)
        if not runs:
            raise RecipeError(f"{args.output} contains none of the requested runs. Run without --report first.")
    except RecipeError as error:
        sys.exit(str(error))
    print(results_table(runs))
    if args.plot:
        draw(runs, args.plot)


if __name__ == "__main__":
    main()
