"""Small backbones, pretrained in seconds, for recipes without a model and data of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import ViTImageProcessorPil

from ..data import digits
from ..data.folders import LABEL, load_data
from ..data.masks import VOID, load_masks
from ..data.transforms import RandomCropAndFlip, to_inputs
from ..report.metrics import Metric
from .methods import Method
from .models import upernet
from .trainer import RecipeTrainer, Settings

EPOCHS, SEGMENTATION_EPOCHS = 10, 8
LEARNING_RATE, SEGMENTATION_LEARNING_RATE = 1e-3, 2e-3
UPERNET_WIDTH = 32


def pretrain_classifier(kind: str, folder: Path, settings: Settings, seed: int) -> float:
    """Trains a small ``"vit"`` or ``"swin"`` on the handwritten digits 0 to 4, and saves it with its image processor.

    Returns:
        Its test accuracy in percent.
    """
    with PartialState().main_process_first():
        data = digits.write_digits(folder.with_name("pretraining"), digits.OLD, 0.8, seed)
        splits = load_data(str(data), seed)
    processor = ViTImageProcessorPil(size={"height": digits.SIZE, "width": digits.SIZE})
    torch.manual_seed(seed)
    model = digits.small_classifier(kind)
    augmentation = RandomCropAndFlip((digits.SIZE, digits.SIZE), 0.7, flip=False)
    trainer = _trainer(
        model, to_inputs(splits["train"], processor, augmentation), Metric(len(splits["train"].features[LABEL].names)),
        LEARNING_RATE, EPOCHS, settings, folder, seed,
    )  # fmt: skip
    trainer.train()
    accuracy = trainer.evaluate(to_inputs(splits["test"], processor))["eval_accuracy"]
    _save(trainer, model, folder, processor)
    return accuracy


def pretrain_segmenter(folder: Path, label_names: list[str], settings: Settings, seed: int) -> None:
    """Trains a small UperNet on scenes with the digits 0 to 4, and saves its Swin with a new decode head for the labels
    of another task."""
    scenes = {"train": digits.PRETRAINING_SCENES, "test": 1}
    with PartialState().main_process_first():
        scenes_folder = digits.write_scenes(folder.with_name("pretraining"), digits.OLD, scenes, seed)
        data, old_names = load_masks(scenes_folder, VOID)
    processor = ViTImageProcessorPil(size={"height": digits.SCENE, "width": digits.SCENE})
    torch.manual_seed(seed)
    swin = digits.small_segmenter_backbone()
    model = upernet(swin, old_names, UPERNET_WIDTH)
    trainer = _trainer(
        model, to_inputs(data["train"], processor), Metric(len(old_names), "segmentation"),
        SEGMENTATION_LEARNING_RATE, SEGMENTATION_EPOCHS, settings, folder, seed,
    )  # fmt: skip
    trainer.train()
    tuned = upernet(swin, label_names, UPERNET_WIDTH)
    tuned.backbone = model.backbone
    _save(trainer, tuned, folder, processor)


def _trainer(
    model: Any, rows: Any, metric: Metric, rate: float, epochs: int, settings: Settings, folder: Path, seed: int
) -> RecipeTrainer:
    method = Method("Pretraining", None, rate)
    plain = Settings(epochs, batch_size=8 if metric.kind == "segmentation" else 16, device=settings.device)
    never = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no"}
    return RecipeTrainer(
        model,
        plain.arguments(folder.with_name("pretraining"), seed, **never),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": method.parameter_groups(model, plain.weight_decay)}),
        metric=metric,
        title=method.title,
    )


def _save(trainer: RecipeTrainer, model: Any, folder: Path, processor: Any) -> None:
    if trainer.is_world_process_zero():
        processor.save_pretrained(folder)
        model.save_pretrained(folder)  # last: its presence says that the backbone is complete
    trainer.accelerator.wait_for_everyone()
