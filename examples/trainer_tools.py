"""What the examples with ``transformers.Trainer`` share: settings, progress, accuracy, speed and memory."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from images import DataError, public_name
from transformers import EvalPrediction, Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

PRECISIONS = ("fp32", "bf16", "fp16")


def training_arguments(kind: Any = TrainingArguments, **values: Any) -> Any:
    """Trainer's settings: a cosine schedule behind 10 % of warm-up, an evaluation an epoch, nothing reported elsewhere.

    Args:
        kind: :class:`TrainingArguments` or a class of your own below it.
        values: further ones, and ``gradient_checkpointing`` and ``precision``.
    """
    precision = values.pop("precision", "fp32")
    if values.pop("gradient_checkpointing", False):
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        # Newer versions of transformers have a new name for it.
        new = "activation_checkpointing" in names
        values["activation_checkpointing" if new else "gradient_checkpointing"] = True
    common = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,  # below 1: as share of all steps
        "eval_strategy": "epoch",
        "logging_strategy": "epoch",
        "report_to": "none",
        "disable_tqdm": False,
        "remove_unused_columns": False,  # the images become pixel_values only when they are asked for
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # several processes of one CPU have to be asked for
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
    }
    return kind(**{**common, **values})


def chosen(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What options were set to; of a folder of a model or of data the name, not where it lies on this machine."""
    values = {name: getattr(args, name) for name in names}
    return values | {name: values[name] and public_name(values[name]) for name in ("model", "data")}


def check_same_settings(holder: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """What was begun goes on with the settings that it began with.

    Args:
        holder: what had them, as the beginning of a sentence.

    Raises:
        DataError: one of ours is another.
    """
    other = [f"{name} {theirs.get(name)}, not {value}" for name, value in ours.items() if theirs.get(name) != value]
    if other:
        raise DataError(f"{holder} had {'; '.join(other)}. Use the same settings, or choose another --output.")


def accuracy_of(prediction: EvalPrediction) -> dict[str, float]:
    """Percent of the images whose largest logit is that of their class, for ``compute_metrics``."""
    return {"accuracy": 100 * float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Progress(ProgressCallback):
    """Trainer's progress bar, with one short line an epoch in place of dictionaries."""

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
            measured = f"loss {self.loss:.3f}, accuracy {logs['eval_accuracy']:.1f} %"
            self.training_bar.write(f"{epoch}: {measured}", file=sys.stderr)


class Pace(TrainerCallback):
    """Measures how many images a second training takes in, evaluations and saving left out."""

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

    def images_per_second(self, images: int, steps_an_epoch: float) -> float:
        """The pace, where ``steps_an_epoch`` steps see ``images``."""
        return images * self.steps / steps_an_epoch / self.seconds if self.seconds else 0.0


def quieted(trainer: Trainer, title: str) -> Trainer:
    """The trainer with :class:`Progress` for its progress bar."""
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(Progress(title))
    return trainer


def peak_memory() -> tuple[float, str]:
    """The most memory in MiB so far, and whose: the accelerator's tensors, or else the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20, "GPU"
    try:
        import resource
    except ImportError:  # Windows
        return float("nan"), "process"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, "process"


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the most steps in a folder of Trainer's."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
