"""Shared by the benchmarks: a training loop on images in memory, and evaluation.

Recorded results come from this loop, so its arithmetic must not change: shifts as augmentation, weight decay of all
parameters, and a schedule whose first step is not 0. The methods are those of the command ``vpt-peft``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from image_sets import ImageSet, augment
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from vpt_peft import VPTModel
from vpt_peft.recipes.training.methods import Method

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Settings:
    """Training settings. The optimizer is AdamW, with linear warmup over a tenth of the steps and cosine decay.

    Attributes:
        flip: random horizontal flips, for classes that do not depend on orientation.
        precision: "float32", or "bfloat16" for automatic mixed precision; weights are float32 in both cases.
    """

    epochs: int = 15
    batch_size: int = 16
    weight_decay: float = 0.01
    flip: bool = False
    precision: str = "float32"


@dataclass(frozen=True)
class Result:
    """Result of fine-tuning by one method.

    Attributes:
        accuracy: test accuracy in percent.
        parameters: number of trained parameters.
        share: trained parameters in percent of the bare backbone's parameters.
        size: bytes of the saved folder.
        seconds: training time.
        logits: of the test images, ``(num_images, num_classes)``.
    """

    method: Method
    accuracy: float
    parameters: int
    share: float
    size: int
    seconds: float
    logits: Tensor


def learning_rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate at a step, counted from 0: linear warmup, then cosine decay to 0."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def head_parameters(model: Any) -> set[nn.Parameter]:
    """Parameters of the classification head: the active adapter's, or the trainable ones of a PEFT or plain model."""
    if isinstance(model, VPTModel):
        return set(model.adapters[model.active_adapter].head.parameters())
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {parameter for parameter in bare.classifier.parameters() if parameter.requires_grad}


def optimizer_groups(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer, with the method's learning rates: head, biases of an adapter, and the rest."""
    head = head_parameters(model)
    biases = set(model.adapters[model.active_adapter].bias.parameters()) if isinstance(model, VPTModel) else set()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = (
        ([parameter for parameter in trained if parameter not in head | biases], method.learning_rate),
        (list(biases), method.bias_learning_rate),
        (list(head), method.head_learning_rate),
    )
    return [
        {"params": parameters, "lr": method.learning_rate if rate is None else rate}
        for parameters, rate in groups
        if parameters
    ]


def size_kwargs(model: Any, pixel_values: Tensor) -> dict[str, bool]:
    """Forward arguments: position embeddings are interpolated if the image size differs from the pretraining's."""
    size = model.config.image_size
    expected = (size, size) if isinstance(size, int) else tuple(size)
    return {} if tuple(pixel_values.shape[-2:]) == expected else {"interpolate_pos_encoding": True}


def autocast_to(precision: str) -> torch.autocast:
    """Autocast context for a precision, see :class:`Settings`."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bfloat16")


def train(model: nn.Module, images: ImageSet, settings: Settings, method: Method, seed: int) -> float:
    """Trains all parameters that require gradients, with a progress bar. Returns the training time in seconds."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(optimizer_groups(model, method), weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(images) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    model.train()
    start = time.perf_counter()
    with tqdm(total=steps, desc=method.title, unit="step") as bar:
        for _ in range(settings.epochs):
            for indices in torch.randperm(len(images), generator=generator).split(settings.batch_size):
                batch = images.pixel_values(augment(images.images[indices], generator, settings.flip))
                labels = images.labels[indices].to(DEVICE)
                optimizer.zero_grad()
                with autocast_to(settings.precision):
                    loss = model(pixel_values=batch.to(DEVICE), labels=labels, **size_kwargs(model, batch)).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
    return time.perf_counter() - start


@torch.inference_mode()
def predict(model: nn.Module, images: ImageSet, batch_size: int = 64, precision: str = "float32") -> Tensor:
    """Logits of shape ``(num_images, num_classes)``."""
    model.eval()
    logits = []
    for batch in tqdm(images.images.split(batch_size), desc="Testing", unit="batch", leave=False):
        pixel_values = images.pixel_values(batch).to(DEVICE)
        with autocast_to(precision):
            logits.append(model(pixel_values=pixel_values, **size_kwargs(model, pixel_values)).logits.float().cpu())
    return torch.cat(logits)


def accuracy(logits: Tensor, images: ImageSet) -> float:
    """Top-1 accuracy in percent."""
    return 100 * (logits.argmax(dim=-1) == images.labels).float().mean().item()


def load_backbone(name: str, class_names: Sequence[str], seed: int, precision: str = "float32") -> Any:
    """Loads a checkpoint in float32 onto :data:`DEVICE`, with a new, randomly initialised head for these classes.

    Args:
        precision: see :class:`Settings`; selects the attention implementation, weights are float32 in any case.
    """
    torch.manual_seed(seed)
    # In bfloat16 on a CPU, training with PyTorch's fused attention takes 1.3 times as long.
    attention = "eager" if precision == "bfloat16" and DEVICE.type == "cpu" else None
    model = AutoModelForImageClassification.from_pretrained(
        name,
        num_labels=len(class_names),
        id2label=dict(enumerate(class_names)),
        label2id={label: index for index, label in enumerate(class_names)},
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        attn_implementation=attention,
    )
    if isinstance(getattr(model, "classifier", None), nn.Linear):
        model.classifier.reset_parameters()  # also if the checkpoint's head has as many classes
    return model.to(DEVICE)


def tune(
    model: Any, method: Method, images: tuple[ImageSet, ImageSet], settings: Settings, seed: int, folder: Path
) -> Result:
    """Fine-tunes a backbone by one method, evaluates it, and saves the adapter (full fine-tuning: the model).

    Args:
        model: from :func:`load_backbone`. Only full fine-tuning changes it.
        images: training and test images.
        folder: where to save to.
    """
    train_set, test_set = images
    backbone_size = model.base_model.num_parameters()
    torch.manual_seed(seed)
    tuned = method.attach(model)
    seconds = train(tuned, train_set, settings, method, seed)
    logits = predict(tuned, test_set, precision=settings.precision)
    parameters = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    test_accuracy, processor = accuracy(logits, test_set), train_set.preprocessing.image_processor()
    if tuned is model:
        tuned.save_pretrained(folder)
        processor.save_pretrained(folder)
    else:
        tuned.save_pretrained(
            folder,
            image_processor=processor,
            metrics={f"accuracy, % of {len(test_set)} test images": test_accuracy},
            hyperparameters={
                **method.rates,
                **{name.replace("_", " "): value for name, value in dataclasses.asdict(settings).items()},
                "seed": seed,
            },
        )
        tuned.unload()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    share = 100 * parameters / backbone_size
    return Result(method, test_accuracy, parameters, share, size, seconds, logits)


def check_minimum(parser: argparse.ArgumentParser, args: argparse.Namespace, **minimums: int) -> None:
    """Exits with an error message if an option, or one of its values, is below its minimum. None is accepted."""
    for name, minimum in minimums.items():
        given = getattr(args, name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        if any(value < minimum for value in values):
            got = " ".join(map(str, values))
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}, got {got}.")


def learning_rate(text: str) -> float:
    """Parses a learning rate on the command line."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value
