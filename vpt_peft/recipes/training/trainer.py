"""transformers' Trainer for the recipes: settings, training accuracy, progress, throughput and memory."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from ...training import CachedFeatures
from ..errors import RecipeError
from ..report.metrics import Metric, predicted_labels

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """Settings of training. The optimizer is AdamW, with linear warmup over a tenth of the steps and cosine decay.

    Attributes:
        batch_size: per device.
        accumulate: batches per optimizer step.
        precision: "fp32", or "bf16" or "fp16" for automatic mixed precision; weights are float32 in any case.
        workers: processes for data loading; 0: the main process.
        report_to: names of transformers' reporting integrations.
        device: of this process.
    """

    epochs: int = 15
    batch_size: int = 16
    accumulate: int = 1
    weight_decay: float = 0.01
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    workers: int = 0
    report_to: tuple[str, ...] = ()
    device: torch.device = CPU

    def arguments(self, folder: Path, seed: int, kind: Any = TrainingArguments, **values: Any) -> Any:
        """Settings of Trainer, with evaluation after each epoch.

        Args:
            kind: :class:`TrainingArguments` or a subclass.
            values: further settings.
        """
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        # The new name in newer versions of transformers.
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
        common = {
            "output_dir": str(folder),
            "seed": seed,
            "num_train_epochs": self.epochs,
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 4 * self.batch_size,
            "gradient_accumulation_steps": self.accumulate,
            "dataloader_num_workers": self.workers,
            "dataloader_pin_memory": self.device.type == "cuda",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,  # below 1: a fraction of all steps
            "eval_strategy": "epoch",
            "logging_strategy": "epoch",
            "report_to": list(self.report_to) or "none",
            "disable_tqdm": False,
            "remove_unused_columns": False,  # pixel_values are computed from images on access
            "batch_eval_metrics": True,
            "use_cpu": self.device.type == "cpu",  # required for several processes on a CPU
            "bf16": self.precision == "bf16",
            "fp16": self.precision == "fp16",
            checkpointing: self.gradient_checkpointing,
        }
        arguments = kind(**{**common, **values})
        # One process uses one device: with several, Trainer would use nn.DataParallel.
        arguments._n_gpu = min(1, arguments.n_gpu)
        return arguments

    def autocast(self) -> torch.autocast:
        """The precision in which Trainer computes."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def process_state(self) -> PartialState:
        """This process among those that train together."""
        return PartialState(cpu=self.device.type == "cpu")

    def steps(self, num_images: int, processes: int = 1) -> int:
        """Optimizer steps of a run."""
        batches = -(-num_images // (self.batch_size * processes))
        return self.epochs * -(-batches // self.accumulate)


class RecipeTrainer(Trainer):
    """Trainer that also logs the accuracy on training images, measured while it trains.

    Args:
        metric: collects the confusion matrix of evaluated images.
        title: of the progress bar.
    """

    def __init__(self, *args: Any, metric: Metric, title: str, **kwargs: Any) -> None:
        kwargs |= {"compute_metrics": metric, "preprocess_logits_for_metrics": predicted_labels}
        super().__init__(*args, **kwargs)
        self.metric = metric
        self._correct: torch.Tensor | None = None
        self.pop_callback(ProgressCallback)
        self.progress = Progress(title)
        self.add_callback(self.progress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains. The progress bar is closed in any case, so that nothing is printed behind an error."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.progress.close()

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Batches of all images: Trainer would drop the last batch of an evaluation like that of training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's loss. In training, rightly predicted labels are counted on the way."""
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and labels.ndim == 1:
            right = (outputs.logits.detach().argmax(-1) == labels).sum()
            counted = torch.stack([right, torch.tensor(len(labels), device=right.device)])
            self._correct = counted if self._correct is None else self._correct + counted
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs values, and the training accuracy with the training loss."""
        if "loss" in logs and self._correct is not None:
            right, total = self.accelerator.reduce(self._correct).tolist()
            logs = {**logs, "accuracy": 100 * right / total}
            self._correct = None
        super().log(logs, *args, **kwargs)


class Progress(ProgressCallback):
    """Trainer's progress bar, with one short line per epoch instead of dictionaries."""

    def __init__(self, title: str = "") -> None:
        super().__init__()
        self.training_bar: Any = None  # a tqdm while training, in the main process
        self.prediction_bar: Any = None
        self.title, self.loss = title, float("nan")

    def close(self) -> None:
        """Closes the bars that are open."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the bar with the title."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes the line of an epoch."""
        logs = logs or {}
        self.loss = float(logs.get("loss", self.loss))
        named = {"eval_mean_iou": "mean IoU", "eval_accuracy": "accuracy"}
        key = next((name for name in named if name in logs), None)
        if self.training_bar is not None and key:
            epoch = f"epoch {logs['epoch']:.0f} of {args.num_train_epochs:.0f}"
            self.training_bar.write(f"{epoch}: loss {self.loss:.3f}, {named[key]} {logs[key]:.1f} %", file=sys.stderr)


class Throughput(TrainerCallback):
    """Measures training throughput without evaluation and saving."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0
        self._start, self._first = 0.0, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._start, self._first = time.perf_counter(), state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._start
        self.steps += state.global_step - self._first

    def images_per_second(self, num_images: int, steps_per_epoch: float) -> float:
        """Images per second, given the number of images and steps in an epoch."""
        return num_images * self.steps / steps_per_epoch / self.seconds if self.seconds else 0.0


class NextAugmentations(TrainerCallback):
    """Lets each epoch, also of a resumed run and in all processes, have its own augmentations of cached features."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Sets the epoch of the training images."""
        if isinstance(train_dataloader.dataset, CachedFeatures):
            train_dataloader.dataset.set_epoch(round(state.epoch))


def peak_memory(device: torch.device) -> tuple[float, str]:
    """Peak memory in MiB so far, and of what: tensors on the GPU, or the whole process."""
    if device.type == "cuda":
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


def check_same_settings(source: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Checks that a run is continued with its original settings.

    Args:
        source: what the settings were saved with, as the subject of the error message.

    Raises:
        RecipeError: a setting differs.
    """
    changed = [f"{name} {saved.get(name)}, not {value}" for name, value in current.items() if saved.get(name) != value]
    if changed:
        raise RecipeError(f"{source} had {'; '.join(changed)}. Use the same settings, or choose another --output.")


def drops_last(num_images: int, batch_size: int) -> bool:
    """Whether the last batch of an epoch is a single image, too few for batch norms, and left out."""
    return batch_size > 1 and num_images > batch_size and num_images % batch_size == 1


def names_of(integrations: Sequence[str]) -> tuple[str, ...]:
    """The reporting integrations of an option, without "none"."""
    return tuple(name for name in integrations if name != "none")
