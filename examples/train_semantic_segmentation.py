"""Tune a vision transformer to semantic segmentation by its decode head alone, prompts, or in full, and compare.

    python examples/train_semantic_segmentation.py                     # digits in scenes, nothing to download
    python examples/train_semantic_segmentation.py --model microsoft/swin-tiny-patch4-window7-224 --data my-scenes

``my-scenes`` holds ``train/images``, ``train/masks``, ``test/images`` and ``test/masks`` (or ``images/train`` and so
on); a mask has its image's name, one channel, and labels as values; ``labels.txt`` may name them, one a line.
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
from images import HALF, DataError, mean_and_std, normalised
from segmentation import Scores, SegmentationSet, digit_scenes, load_folder, picture, score
from torch import Tensor, nn
from tqdm import tqdm
from training import DEVICE, be_quiet, check_least, learning_rate, table
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    SwinBackbone,
    SwinConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from vpt_peft import PromptConfig, VPTError, VPTModel, get_vpt_model, parameter_groups

OLD, NEW = range(5), range(5, 10)  # digits to pretrain on and to tune to
METHODS = {
    "linear": ("Decode head only", PromptConfig(num_tokens=0)),
    "vpt-shallow": ("VPT-Shallow", PromptConfig(num_tokens=10, deep=False)),
    "vpt-deep": ("VPT-Deep", PromptConfig(num_tokens=10)),
    "full": ("Full fine-tuning", None),
}


@dataclass(frozen=True)
class Result:
    """What a method reached, its trained parameters, bytes of the saved folder, and seconds of training."""

    scores: Scores
    parameters: int
    size: int
    seconds: float
    predictions: Tensor


@dataclass(frozen=True)
class Loop:
    """Trains and asks models on images normalised by ``mean`` and ``std``."""

    batch_size: int
    seed: int
    flip: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF

    def pixel_values(self, images: Tensor) -> Tensor:
        return normalised(images, self.mean, self.std).to(DEVICE)

    def batches(self, order: Tensor) -> list[Tensor]:
        """The positions in ``order``, batch by batch. A last one of a single image is left out: batch norm over one
        value is none."""
        return [indices for indices in order.split(self.batch_size) if len(indices) > 1]

    def train(
        self, model: nn.Module, data: SegmentationSet, epochs: int, rates: tuple[float, float], name: str
    ) -> float:
        """Trains what requires gradients, by AdamW and a cosine. Returns the seconds that it took.

        Args:
            rates: learning rates of an adapter's prompts, or of a whole model; and of an adapter's head.
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
        """The label with the largest logit at each pixel of the masks. A model must give what it gives reloaded."""
        model.eval(), reloaded.eval()
        found = []
        for images, masks in zip(data.images.split(self.batch_size), data.masks.split(self.batch_size), strict=True):
            logits, again = (one(pixel_values=self.pixel_values(images)).logits for one in (model, reloaded))
            if not torch.equal(logits, again):
                sys.exit("A reloaded model must give the same logits to the last bit, but does not.")
            found.append(nn.functional.interpolate(logits, masks.shape[-2:], mode="bilinear").argmax(1).cpu())
        return torch.cat(found)


def upernet(swin: str | SwinConfig, label_names: Sequence[str], width: int) -> Any:
    """UperNet with a new decode head on a Swin, which is a checkpoint or, given its config, random."""
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
        raise DataError(f"The model must be a Swin or one for semantic segmentation, got '{name}': {error}") from error


def prepare(args: argparse.Namespace, label_names: Sequence[str]) -> tuple[Path, Loop]:
    """Saves a backbone with a new decode head for these labels. Returns its folder, and what it takes to train it."""
    folder = args.output / "backbone"
    torch.manual_seed(args.seed)
    loop = Loop(args.batch_size, args.seed, args.flip)
    if args.model is None:
        print("1. Pretraining a small UperNet on scenes with the digits 0 to 4, and throwing its decode head away.")
        old = digit_scenes(OLD, args.pretraining_images, args.seed)
        swin = SwinConfig(image_size=64, embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4,
                          mlp_ratio=2, drop_path_rate=0.0, initializer_range=0.1)  # fmt: skip
        whole = upernet(swin, old.label_names, width=32).to(DEVICE)
        loop.train(whole, old, args.pretraining_epochs, (2e-3, 2e-3), "Pretraining")
        model = upernet(swin, label_names, width=32)
        model.backbone = whole.backbone
    else:
        print(f"1. Loading {args.model}.")
        is_swin = AutoConfig.from_pretrained(args.model).model_type == "swin"
        loop = Loop(args.batch_size, args.seed, args.flip, *mean_and_std(args.model))
        model = upernet(args.model, label_names, width=256) if is_swin else _segmenter(args.model, label_names)
    model.save_pretrained(folder)
    return folder, loop


def load(folder: Path) -> Any:
    return AutoModelForSemanticSegmentation.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def tune(backbone: Path, method: str, data: tuple[SegmentationSet, SegmentationSet], loop: Loop, args: Any) -> Result:
    """Tunes a fresh copy of the backbone by one method, saves what was trained, reloads that, and tests it."""
    title, config = METHODS[method]
    torch.manual_seed(args.seed)
    tuned = load(backbone) if config is None else get_vpt_model(load(backbone), config)
    rates = (args.full_rate, args.full_rate) if config is None else (args.prompt_rate, args.head_rate)
    seconds = loop.train(tuned, data[0], args.epochs, rates, title)
    parameters = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    folder = args.output / method
    tuned.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    reloaded = load(folder) if config is None else VPTModel.from_pretrained(load(backbone), folder)
    predictions = loop.predict(tuned, reloaded, data[1])
    return Result(score(predictions, data[1].masks, len(data[1].label_names)), parameters, size, seconds, predictions)


def show(results: dict[str, Result], label_names: Sequence[str]) -> None:
    """Prints what each method reached and cost, and its IoU for each label."""
    rows = [("Method", "Mean IoU", "Pixel accuracy", "Trained parameters", "Bytes on disk", "Seconds")]
    for method, one in results.items():
        rows.append((
            METHODS[method][0], f"{100 * one.scores.mean_iou:.1f} %", f"{100 * one.scores.pixel_accuracy:.1f} %",
            f"{one.parameters:,}", f"{one.size:,}", f"{one.seconds:.0f}",
        ))  # fmt: skip
    each = [("IoU, %", *(METHODS[method][0] for method in results))]
    for label, name in enumerate(label_names):
        found = [100 * one.scores.iou[label] for one in results.values()]
        each.append((name, *("-" if math.isnan(value) else f"{value:.1f}" for value in found)))
    print(f"\n{table(rows)}\n\n{table(each)}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--model", help="a Swin, BEiT or UperNet checkpoint, by name or folder (default: a small one, pretrained here)")
    add("--data", type=Path, help="a folder with images and masks (default: scenes with digits)")
    add("--ignore-index", type=int, default=255, help="the masks' value for pixels without label (default: 255)")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of all images (default: the first's)")
    add("--method", nargs="+", choices=METHODS, default=["linear", "vpt-shallow", "vpt-deep"], help="one or several")
    add("--flip", action="store_true", help="mirror half of the batches; only where mirrored images keep their labels")
    add("--epochs", type=int, default=15, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="default: %(default)s")
    add("--head-rate", type=learning_rate, default=3e-3, help="learning rate of decode heads (default: %(default)s)")
    add("--prompt-rate", type=learning_rate, default=3e-3, help="learning rate of prompts (default: %(default)s)")
    add("--full-rate", type=learning_rate, default=3e-4, help="of full fine-tuning (default: %(default)s)")
    add("--pretraining-epochs", type=int, default=8, help="default: %(default)s")
    add("--pretraining-images", type=int, default=400, help="default: %(default)s")
    add("--images", type=int, default=100, help="digit scenes to train on, and as many to test on (default: 100)")
    add("--seed", type=int, default=0, help="sets everything that is random (default: 0)")
    add("--output", type=Path, default=Path("runs", "segmentation"), help="default: %(default)s")
    args = parser.parse_args(argv)
    check_least(parser, args, epochs=1, pretraining_epochs=1, size=1, seed=0)
    check_least(parser, args, batch_size=2, images=2, pretraining_images=2)  # decode heads have batch norms
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Runs the example."""
    args = arguments(argv)
    be_quiet()
    try:
        if args.data is None:
            data = digit_scenes(NEW, args.images, args.seed + 1), digit_scenes(NEW, args.images, args.seed + 2)
        else:
            data = load_folder(args.data, args.ignore_index, tuple(args.size) if args.size else None)
        backbone, loop = prepare(args, data[0].label_names)
        print(f"2. Tuning it: {len(data[0])} images to train on, {len(data[1])} to test on, {args.epochs} epochs.")
        results = {method: tune(backbone, method, data, loop, args) for method in args.method}
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    show(results, data[0].label_names)
    best = max(results, key=lambda method: results[method].scores.mean_iou)
    rows = torch.linspace(0, len(data[1]) - 1, min(6, len(data[1]))).long()
    shown = [tensor[rows] for tensor in (data[1].images, data[1].masks, results[best].predictions)]
    picture(shown[0], shown[1], shown[2], len(data[0].label_names)).save(args.output / "predictions.png")
    print(f"3. All are saved in {args.output}; reloaded, each gives the same logits, identical to the last bit.")
    print(f"   predictions.png shows images, masks and predictions of the best: {METHODS[best][0]}.")
    return results


if __name__ == "__main__":
    main()
