"""Fine-tune a vision transformer for semantic segmentation: decode head only, with prompts, or in full.

    python examples/train_semantic_segmentation.py                     # synthetic scenes with digits, no download
    python examples/train_semantic_segmentation.py --model microsoft/swin-tiny-patch4-window7-224 --data my-scenes

``my-scenes`` contains ``train/images``, ``train/masks``, ``test/images`` and ``test/masks`` (or ``images/train`` and so
on). A mask has the name of its image, one channel, and labels as values. An optional ``labels.txt`` names the labels,
one per line.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from images import HALF, DataError, mean_and_std, normalize
from segmentation import Scores, SegmentationSet, digit_scenes, draw_predictions, load_folder, score
from torch import Tensor, nn
from tqdm import tqdm
from training import DEVICE, check_minimum, learning_rate, silence_transformers, table
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    SwinBackbone,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTImageProcessorPil,
)

from vpt_peft import PromptConfig, VPTError, VPTModel, get_vpt_model, parameter_groups
from vpt_peft.hub import check_model_name

OLD, NEW = range(5), range(5, 10)  # digits of pretraining and of fine-tuning
METHODS = {
    "linear": ("Decode head only", PromptConfig(num_tokens=0)),
    "vpt-shallow": ("VPT-Shallow", PromptConfig(num_tokens=10, deep=False)),
    "vpt-deep": ("VPT-Deep", PromptConfig(num_tokens=10)),
    "full": ("Full fine-tuning", None),
}


@dataclass(frozen=True)
class Result:
    """Result of fine-tuning by one method.

    Attributes:
        parameters: number of trained parameters.
        size: bytes of the saved folder.
        seconds: training time.
        predictions: labels of the test images, ``(num_images, height, width)``.
    """

    scores: Scores
    parameters: int
    size: int
    seconds: float
    predictions: Tensor


@dataclass(frozen=True)
class Loop:
    """Trains and evaluates models on images normalised by ``mean`` and ``std``."""

    batch_size: int
    seed: int
    flip: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    def pixel_values(self, images: Tensor) -> Tensor:
        return normalize(images, self.mean, self.std).to(DEVICE)

    def image_processor(self, data: SegmentationSet) -> Any:
        """An image processor with the preprocessing of these images, to be saved with a model."""
        height, width = data.images.shape[-2:]
        return ViTImageProcessorPil(
            size={"height": height, "width": width}, image_mean=list(self.mean), image_std=list(self.std)
        )

    def batches(self, order: Tensor) -> list[Tensor]:
        """Splits indices into batches. A last batch of a single image, too few for batch norm, is dropped."""
        return [indices for indices in order.split(self.batch_size) if len(indices) > 1]

    def train(
        self, model: nn.Module, data: SegmentationSet, epochs: int, rates: tuple[float, float], name: str
    ) -> float:
        """Trains with AdamW and a cosine schedule. Returns the training time in seconds.

        Args:
            rates: learning rates of prompts (or of the whole model) and of the head.
        """
        optimizer = torch.optim.AdamW(parameter_groups(model, *rates))
        steps = epochs * len(self.batches(torch.arange(len(data))))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        )
        generator, start = torch.Generator().manual_seed(self.seed), time.perf_counter()
        model.train()
        with tqdm(total=steps, desc=name, unit="step") as bar:
            for _ in range(epochs):
                for indices in self.batches(torch.randperm(len(data), generator=generator)):
                    images, masks = data.images[indices], data.masks[indices]
                    if self.flip and torch.rand((), generator=generator) < 0.5:
                        images, masks = images.flip(-1), masks.flip(-1)
                    loss = model(pixel_values=self.pixel_values(images), labels=masks.to(DEVICE)).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                    bar.update()
        return time.perf_counter() - start

    @torch.inference_mode()
    def predict(self, model: nn.Module, reloaded: nn.Module, data: SegmentationSet) -> Tensor:
        """Predicted labels at the resolution of the masks. Exits if the reloaded model's logits are not identical."""
        model.eval(), reloaded.eval()
        predictions = []
        for images, masks in zip(data.images.split(self.batch_size), data.masks.split(self.batch_size), strict=True):
            logits, expected = (net(pixel_values=self.pixel_values(images)).logits for net in (reloaded, model))
            if not torch.equal(logits, expected):
                sys.exit("Logits of the reloaded model differ from those before saving.")
            predictions.append(nn.functional.interpolate(logits, masks.shape[-2:], mode="bilinear").argmax(1).cpu())
        return torch.cat(predictions)


def upernet(swin: str | SwinConfig, label_names: Sequence[str], width: int) -> Any:
    """UperNet with a new decode head on a pretrained Swin or, given a config, a randomly initialised one."""
    config = SwinConfig.from_pretrained(swin) if isinstance(swin, str) else swin
    config.out_features = [f"stage{stage + 1}" for stage in range(len(config.depths))]
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=width, auxiliary_channels=width, **_labels(label_names))
    )
    if isinstance(swin, str):
        model.backbone = SwinBackbone.from_pretrained(swin, config=config, dtype=torch.float32)
    return model


def _labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def _segmenter(name: str, label_names: Sequence[str]) -> Any:
    try:
        return AutoModelForSemanticSegmentation.from_pretrained(
            name, ignore_mismatched_sizes=True, dtype=torch.float32, **_labels(label_names)
        )
    except ValueError as error:
        raise DataError(
            f"The model must be a Swin or a semantic segmentation checkpoint, got '{name}': {error}"
        ) from error


def prepare(args: argparse.Namespace, label_names: Sequence[str]) -> tuple[Path, Loop]:
    """Saves a backbone with a new decode head for these labels. Returns its folder and the training loop."""
    folder = args.output / "backbone"
    torch.manual_seed(args.seed)
    loop = Loop(args.batch_size, args.seed, args.flip)
    if args.model is None:
        print("1. Pretraining a small UperNet on scenes with the digits 0 to 4, and discarding its decode head.")
        old = digit_scenes(OLD, args.pretraining_images, args.seed)
        swin = SwinConfig(image_size=64, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4,
                          mlp_ratio=2, drop_path_rate=0.0, initializer_range=0.1)  # fmt: skip
        pretrained = upernet(swin, old.label_names, width=32).to(DEVICE)
        loop.train(pretrained, old, args.pretraining_epochs, (2e-3, 2e-3), "Pretraining")
        model = upernet(swin, label_names, width=32)
        model.backbone = pretrained.backbone
    else:
        print(f"1. Loading {args.model}.")
        check_model_name(args.model)
        is_swin = AutoConfig.from_pretrained(args.model).model_type == "swin"
        loop = Loop(args.batch_size, args.seed, args.flip, *mean_and_std(args.model))
        model = upernet(args.model, label_names, width=256) if is_swin else _segmenter(args.model, label_names)
    model.save_pretrained(folder)
    return folder, loop


def load(folder: Path) -> Any:
    return AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def tune(backbone: Path, method: str, data: tuple[SegmentationSet, SegmentationSet], loop: Loop, args: Any) -> Result:
    """Fine-tunes a fresh copy of the backbone by one method, saves and reloads it, and evaluates it."""
    title, config = METHODS[method]
    torch.manual_seed(args.seed)
    tuned = load(backbone) if config is None else get_vpt_model(load(backbone), config)
    rates = (args.full_rate, args.full_rate) if config is None else (args.prompt_rate, args.head_rate)
    seconds = loop.train(tuned, data[0], args.epochs, rates, title)
    parameters = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    folder = args.output / method
    processor = loop.image_processor(data[0])
    if config is None:
        tuned.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        hyperparameters = {
            "learning rate": rates[0],
            "head learning rate": rates[1],
            **{name.replace("_", " "): getattr(args, name) for name in ("epochs", "batch_size", "flip", "seed")},
        }
        tuned.save_pretrained(folder, image_processor=processor, hyperparameters=hyperparameters)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    reloaded = load(folder) if config is None else VPTModel.from_pretrained(load(backbone), folder)
    predictions = loop.predict(tuned, reloaded, data[1])
    return Result(score(predictions, data[1].masks, len(data[1].label_names)), parameters, size, seconds, predictions)


def print_tables(results: dict[str, Result], label_names: Sequence[str]) -> None:
    """Prints metrics and cost of each method, and the IoU of each label."""
    rows = [("Method", "Mean IoU", "Pixel accuracy", "Trained parameters", "Bytes on disk", "Seconds")]
    for method, result in results.items():
        rows.append((
            METHODS[method][0], f"{100 * result.scores.mean_iou:.1f} %", f"{100 * result.scores.pixel_accuracy:.1f} %",
            f"{result.parameters:,}", f"{result.size:,}", f"{result.seconds:.0f}",
        ))  # fmt: skip
    by_label = [("IoU, %", *(METHODS[method][0] for method in results))]
    for label, name in enumerate(label_names):
        iou = [100 * result.scores.iou[label] for result in results.values()]
        by_label.append((name, *("-" if math.isnan(value) else f"{value:.1f}" for value in iou)))
    print(f"\n{table(rows)}\n\n{table(by_label)}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="a Swin, BEiT or UperNet checkpoint, by name or folder (default: a small one is pretrained)")
    add("--data", type=Path, help="a folder with images and masks (default: synthetic scenes with digits)")
    add("--ignore-index", type=int, default=255, help="value of unlabelled pixels in the masks (default: 255)")
    add(
        "--size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="resize images to this size (default: the first's)",
    )
    add("--method", nargs="+", choices=METHODS, default=["linear", "vpt-shallow", "vpt-deep"], help="one or more")
    add("--flip", action="store_true", help="random horizontal flips, per batch")
    add("--epochs", type=int, default=15, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="default: %(default)s")
    add("--head-rate", type=learning_rate, default=3e-3, help="learning rate of the decode head (default: %(default)s)")
    add("--prompt-rate", type=learning_rate, default=3e-3, help="learning rate of prompts (default: %(default)s)")
    add("--full-rate", type=learning_rate, default=3e-4, help="for full fine-tuning (default: %(default)s)")
    add("--pretraining-epochs", type=int, default=8, help="default: %(default)s")
    add("--pretraining-images", type=int, default=400, help="default: %(default)s")
    add("--images", type=int, default=100, help="synthetic scenes for training, and as many for testing (default: 100)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs", "segmentation"), help="default: %(default)s")
    args = parser.parse_args(argv)
    check_minimum(parser, args, epochs=1, pretraining_epochs=1, size=1, seed=0)
    check_minimum(parser, args, batch_size=2, images=2, pretraining_images=2)  # for batch norm in decode heads
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    try:
        if args.data is None:
            data = digit_scenes(NEW, args.images, args.seed + 1), digit_scenes(NEW, args.images, args.seed + 2)
        else:
            data = load_folder(args.data, args.ignore_index, tuple(args.size) if args.size else None)
        backbone, loop = prepare(args, data[0].label_names)
        print(f"2. Fine-tuning: {len(data[0])} training images, {len(data[1])} test images, {args.epochs} epochs.")
        results = {method: tune(backbone, method, data, loop, args) for method in args.method}
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    print_tables(results, data[0].label_names)
    best = max(results, key=lambda method: results[method].scores.mean_iou)
    rows = torch.linspace(0, len(data[1]) - 1, min(6, len(data[1]))).long()
    images, masks, predictions = (tensor[rows] for tensor in (data[1].images, data[1].masks, results[best].predictions))
    drawn = draw_predictions(images, masks, predictions, len(data[0].label_names))
    drawn.save(args.output / "predictions.png")
    print(f"3. Saved all models in {args.output}. Reloaded, each has bit-identical logits.")
    print(f"   predictions.png shows images, masks and predictions of the best method, {METHODS[best][0]}.")
    return results


if __name__ == "__main__":
    main()
