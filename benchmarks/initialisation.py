"""Test accuracy of prompts by how they start: random, or as tokens of training images (``VPTModel.init_prompts``).

    python benchmarks/initialisation.py                             # a small ViT, handwritten digits, no download
    python benchmarks/initialisation.py --seeds 0 1 2 --output initialisation.json --resume
    python benchmarks/initialisation.py --data flowers scenes --image-size 64

A small ViT is pretrained as a masked autoencoder (MAE), and another one with labels, both on the handwritten digits 0
to 4. Then VPT-Shallow and VPT-Deep are trained on the digits 5 to 9 with each initialisation. With ``--data``, the MAE
is pretrained on the training images of all these folders, without labels, and prompts are trained on each folder's
classes. Each finished run is written to the output immediately; ``--resume`` skips runs that are there.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import digit_sets
import torch
from accuracy import read, result_fields, write
from accuracy_tables import format_accuracy
from harness import (
    DEVICE,
    Settings,
    check_minimum,
    learning_rate,
    learning_rate_factor,
    load_backbone,
    size_kwargs,
    tune,
)
from image_sets import ImageSet, Preprocessing, augment, load_images
from settings import Run, find_runs, settings_of
from torch import Tensor, nn
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from vpt_peft import VPTModel
from vpt_peft.recipes.data.digits import small_classifier
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report.tables import table
from vpt_peft.recipes.runtime import silence_transformers
from vpt_peft.recipes.training.methods import SMALL_METHODS, Method
from vpt_peft.recipes.training.task import display_name

METHODS = ("vpt-shallow", "vpt-deep")
INITIALISATIONS = ("uniform", "sample", "kmeans", "mean")
PRETRAININGS = {"mae": "MAE", "supervised": "supervised"}
ROW = ("pretraining", "data", "method", "learning_rate")  # what a row of the table has in common
MAE_LEARNING_RATE = 1e-3
DECODER = {
    "decoder_hidden_size": 48, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 96,
}  # fmt: skip


@dataclass(frozen=True)
class Initialised(Method):
    """A method whose prompts start as tokens of the training images, or "uniform"."""

    initialisation: str = "uniform"
    images: ImageSet | None = None

    def attach(self, model: Any, task_type: str = "IMAGE_CLASSIFICATION", **labels: Any) -> VPTModel:
        """The backbone with the adapter and its initial prompts."""
        vpt: VPTModel = super().attach(model, task_type, **labels)
        if self.initialisation != "uniform":
            assert self.images is not None
            order = torch.randperm(len(self.images)).split(64)
            batches = (self.images.pixel_values(self.images.images[indices]) for indices in order)
            first = self.images.pixel_values(self.images.images[:1])
            vpt.init_prompts(batches, self.initialisation, **size_kwargs(vpt, first))
        return vpt


def small_vit(image_size: int) -> Any:
    """The ViT of ``digit_sets.py`` for another image size, with random weights."""
    shape = small_classifier("vit").config.to_dict()
    return ViTForImageClassification(ViTConfig(**shape | {"image_size": image_size}))


def sine_positions(num_patches: int, width: int) -> Tensor:
    """The fixed position embeddings of a masked autoencoder: sines and cosines of a patch's column, then of its row.

    Returns:
        ``(1 + num_patches, width)``, with zeros for ``[CLS]``.
    """
    side = math.isqrt(num_patches)
    frequencies = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], dim=1), (0, 0, 1, 0))


def pretrain_mae(image_sets: Sequence[ImageSet], folder: Path, epochs: int, seed: int) -> float:
    """Pretrains a small ViT as a masked autoencoder, and saves it as a classifier. Returns the last epoch's loss."""
    torch.manual_seed(seed)
    images = torch.cat([image_set.images for image_set in image_sets])
    vit = small_vit(images.shape[-1])
    shape = {name: getattr(vit.config, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
        "initializer_range",
    )}  # fmt: skip
    mae = ViTMAEForPreTraining(ViTMAEConfig(**shape, **DECODER, norm_pix_loss=True)).to(DEVICE).train()
    positions = mae.vit.embeddings.position_embeddings, mae.decoder.decoder_pos_embed
    for embeddings in positions:  # frozen; some versions of transformers leave them at zero
        embeddings.data = sine_positions(embeddings.shape[1] - 1, embeddings.shape[2])[None].to(DEVICE)
    parameters = [parameter for parameter in mae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, MAE_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    steps = epochs * math.ceil(len(images) / Settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for _ in tqdm(range(epochs), desc="Pretraining MAE", unit="epoch"):
        losses = []
        for indices in torch.randperm(len(images), generator=generator).split(Settings.batch_size):
            batch = image_sets[0].pixel_values(augment(images[indices], generator)).to(DEVICE)
            loss = mae(pixel_values=batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    vit.vit.load_state_dict(mae.vit.state_dict())  # strict: ViT and ViTMAE have the same encoder
    vit.save_pretrained(folder)
    check_encoder(mae.vit.state_dict(), folder)
    return sum(losses) / len(losses)


def check_encoder(expected: dict[str, Tensor], folder: Path) -> None:
    """Checks that a checkpoint, loaded for fine-tuning, has exactly these encoder weights and no random ones.

    Raises:
        RecipeError: names the tensors that differ.
    """
    loaded = load_backbone(str(folder), ["one", "two"], seed=0).vit.state_dict()
    names = sorted(expected.keys() | loaded.keys())
    other = [name for name in names if name not in expected or name not in loaded]
    other += [name for name in names if name not in other and not torch.equal(expected[name], loaded[name])]
    if other:
        raise RecipeError(f"The encoder must be loaded as it was pretrained, but these differ: {', '.join(other)}.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add(
        "--data",
        nargs="+",
        default=[],
        help="folders with class folders, or datasets on the Hub",
    )
    add("--image-size", type=int, default=digit_sets.SIZE, help="of --data, a multiple of 8 (default: %(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--initialisations", nargs="+", choices=INITIALISATIONS, default=list(INITIALISATIONS), help="default: all")
    add("--seeds", nargs="+", type=int, default=[0], help="one pretraining and its runs per seed (default: 0)")
    add(
        "--learning-rate-factors",
        nargs="+",
        type=learning_rate,
        default=[1.0],
        help="factors of each method's learning rate of prompts; one row per factor (default: 1)",
    )
    add("--epochs", type=int, default=10, help="of prompt tuning (default: %(default)s)")
    add("--mae-epochs", type=int, default=40, help="default: %(default)s")
    add(
        "--pretraining-epochs",
        type=int,
        default=digit_sets.PRETRAINING_EPOCHS,
        help="with labels (default: %(default)s)",
    )
    add("--output", type=Path, default=Path("runs/initialisation.json"), help="default: %(default)s")
    add("--resume", action="store_true", help="keep the runs of the output, and skip them")
    args = parser.parse_args(argv)
    check_minimum(parser, args, image_size=8, epochs=1, mae_epochs=1, pretraining_epochs=1)
    if args.image_size % 8 or (args.image_size != digit_sets.SIZE and not args.data):
        parser.error(f"--image-size must be a multiple of 8, and is for --data only, got {args.image_size}.")
    if args.output.exists() and not args.resume:
        parser.error(f"{args.output} exists. Add --resume to continue it, or choose another --output.")
    return args


def tasks(args: argparse.Namespace, seed: int) -> dict[str, tuple[ImageSet, ImageSet]]:
    """Training and test images to tune prompts on, by name."""
    if not args.data:
        return {"digits 5-9": digit_sets.new_task(seed)}
    preprocessing = Preprocessing(args.image_size)
    return {display_name(data): load_images(data, preprocessing, seed) for data in args.data}


def backbones(
    args: argparse.Namespace, train_sets: Sequence[ImageSet], seed: int, folder: Path
) -> Iterator[tuple[str, Path]]:
    """Pretrained backbones: how, and the folder."""
    if not args.data:
        digit_sets.pretrain("vit", folder / "supervised", args.pretraining_epochs, seed)
        yield "supervised", folder / "supervised"
        train_sets = [digit_sets.load().select_classes(digit_sets.OLD).split(0.8, seed)[0]]
    loss = pretrain_mae(train_sets, folder / "mae", args.mae_epochs, seed)
    print(f"MAE, seed {seed}: loss {loss:.3f} in the last epoch", file=sys.stderr)
    yield "mae", folder / "mae"


def methods(args: argparse.Namespace) -> list[tuple[str, Method]]:
    """The methods with all learning rates of the command line."""
    defaults = [(name, SMALL_METHODS[name]) for name in args.methods]
    return [
        (name, replace(method, learning_rate=factor * method.learning_rate))
        for name, method in defaults
        for factor in args.learning_rate_factors
    ]


def run(args: argparse.Namespace) -> list[Run]:
    """Trains all requested runs that the output does not contain yet. Returns the requested runs."""
    settings, requested = Settings(args.epochs), []
    for seed in args.seeds:
        sets = tasks(args, seed)
        wanted = [
            ({
                "pretraining": pretraining, "data": data, **settings_of(name, method),
                "initialisation": initialisation, "seed": seed, **asdict(settings),
                "image_size": train_set.images.shape[-1], "mae_epochs": args.mae_epochs,
                "pretraining_epochs": args.pretraining_epochs, "train_images": len(train_set),
                "test_images": len(test_set),
            }, Initialised(**vars(method), initialisation=initialisation, images=train_set))
            for pretraining in (["mae"] if args.data else PRETRAININGS)
            for data, (train_set, test_set) in sets.items()
            for name, method in methods(args)
            for initialisation in args.initialisations
        ]  # fmt: skip
        if not all(find_runs(read(args.output), key) for key, _ in wanted):
            with tempfile.TemporaryDirectory() as folder:
                for pretraining, backbone in backbones(args, [pair[0] for pair in sets.values()], seed, Path(folder)):
                    on_this = [(key, method) for key, method in wanted if key["pretraining"] == pretraining]
                    train_missing(on_this, backbone, sets, args)
        requested += [run for key, _ in wanted for run in find_runs(read(args.output), key)]
    return requested


def train_missing(
    wanted: Sequence[tuple[Run, Initialised]],
    backbone: Path,
    sets: dict[str, tuple[ImageSet, ImageSet]],
    args: argparse.Namespace,
) -> None:
    """Trains prompts on one backbone, for each run that the output does not contain yet."""
    for key, method in wanted:
        if find_runs(read(args.output), key):
            continue
        print(*(key[name] for name in ROW), method.initialisation, sep=", ", file=sys.stderr)
        images, seed = sets[key["data"]], key["seed"]
        model = load_backbone(str(backbone), images[0].class_names, seed)
        with tempfile.TemporaryDirectory() as folder:
            result = tune(model, method, images, Settings(args.epochs), seed, Path(folder))
        write(args.output, [*read(args.output), key | result_fields(result)])


def results_table(runs: Sequence[Run], initialisations: Sequence[str]) -> str:
    """Test accuracy in %, mean over the seeds ± standard deviation, one column per initialisation. The best is bold."""
    rows: list[tuple[str, ...]] = [("Pretraining", "Data", "Method", "Learning rate", *initialisations)]
    for key in dict.fromkeys(tuple(run[name] for name in ROW) for run in runs):
        row = find_runs(runs, dict(zip(ROW, key, strict=True)))
        groups = [find_runs(row, {"initialisation": name}) for name in initialisations]
        means = [sum(run["accuracy"] for run in group) / len(group) for group in groups]
        cells = [
            f"**{format_accuracy(group)}**" if mean == max(means) else format_accuracy(group)
            for group, mean in zip(groups, means, strict=True)
        ]
        pretraining, data, method, rate = key
        rows.append((PRETRAININGS[pretraining], data, SMALL_METHODS[method].title, f"{rate:g}", *cells))
    return table(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark and prints its table."""
    args = arguments(argv)
    silence_transformers()
    torch.set_num_threads(1)  # more are no faster for such small models
    try:
        runs = run(args)
    except RecipeError as error:
        sys.exit(str(error))
    print(results_table(runs, args.initialisations))


if __name__ == "__main__":
    main()
