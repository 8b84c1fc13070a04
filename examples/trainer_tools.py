"""Shared by the examples with ``transformers.Trainer``: settings, progress, accuracy, throughput and memory."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from images import DataError, display_name
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

PRECISIONS = ("fp32", "bf16", "fp16")


def training_arguments(kind: Any = TrainingArguments, **values: Any) -> Any:
    """Settings of Trainer: cosine schedule with 10 % warmup, evaluation after each epoch, no reporting integrations.

    Args:
        kind: :class:`TrainingArguments` or a subclass.
        values: further settings, with ``gradient_checkpointing`` and ``precision`` for all versions.
    """
    precision = values.pop("precision", "fp32")
    if values.pop("gradient_checkpointing", False):
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        # The new name in newer versions of transformers.
        new_name, old_name = "activation_checkpointing", "gradient_checkpointing"
        values[new_name if new_name in names else old_name] = True
    common = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # below 1: a fraction of all steps
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": False,
        "remove_unused_columns": False,  # pixel_values are computed from images on access
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # required for several processes on a CPU
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    return kind(**{**common, **values})


def option_values(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Values of options. Of the folders of model and data, only the names, without paths of this machine."""
    values = {name: getattr(args, name) for name in names}
    return values | {name: values[name] and display_name(values[name]) for name in ("model", "data")}


def check_same_settings(source: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Checks that a run is continued with its original settings.

    Args:
        source: what the settings were saved with, as the subject of the error message.

    Raises:
        DataError: a setting differs.
    """
    changed = [f"{name} {saved.get(name)}, not {value}" for name, value in current.items() if saved.get(name) != value]
    if changed:
        raise DataError(f"{source} had {'; '.join(changed)}. Use the same settings, or choose another --output.")


def compute_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy in percent, for ``compute_metrics``."""
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Progress(ProgressCallback):
    """Trainer's progress bar, with one short line per epoch instead of dictionaries."""

    def __init__(self, title: str = "") -> None:
        super().__init__()
        self.title, self.loss = title, float("nan")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        self.loss = float(logs.get("loss", self.loss))
        if self.training_bar is not None and "eval_accuracy" in logs:
            epoch = f"epoch {logs['epoch']:.0f} of {args.num_train_epochs:.0f}"
            metrics = f"loss {self.loss:.3f}, accuracy {logs['eval_accuracy']:.1f} %"
            self.training_bar.write(f"{epoch}: {metrics}", file=sys.stderr)


class Throughput(TrainerCallback):
    """Measures training throughput without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self._start, self._first = 0.0, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start, self._first = time.perf_counter(), state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += state.global_step - self._first

    def images_per_second(self, num_images: int, steps_per_epoch: float) -> float:
        """Images per second, given the number of images and steps in an epoch."""
        return num_images * self.steps / steps_per_epoch / self.seconds if self.seconds else 0.0


def use_short_progress(trainer: Trainer, title: str) -> Trainer:
    """Replaces the trainer's progress bar by :class:`Progress`."""
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(Progress(title))
    return trainer


def peak_memory() -> tuple[float, str]:
    """Peak memory in MiB so far, and of what: tensors on the GPU, or the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20, "GPU"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "process"


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in an output folder of Trainer."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
