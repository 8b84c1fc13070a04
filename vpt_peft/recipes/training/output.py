"""The output of ``vpt-peft train``: a line per seed, plots, results, the model and its card."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ...hub import CardContent, update_card
from ...io import WEIGHTS_NAME
from ...model import VPTModel
from ..data.folders import IMAGE
from ..errors import RecipeError
from ..report import plots
from ..report.metrics import Scores, predicted_labels
from ..report.tables import label_table
from .methods import DEFAULT_METHOD, METHODS, Method
from .models import say
from .repository import Repository
from .task import Task
from .trainer import Settings

MODEL_CARD = """# {title}

{base}, fine-tuned by {method} on the labels {labels}.

| | |
|---|---|
{rows}
"""
MAX_PRINTED_LABELS = 20
MAX_PICTURES = 6
WHAT_TO_TRY = (
    "look at some images of each class and at confusion_matrix.png, for wrong labels or wrong folders",
    "train longer with --epochs",
    "lower --learning-rate tenfold if the training accuracy in learning_curve.png stays low",
)


@dataclass
class Run:
    """Result of training with one seed.

    Attributes:
        scores: on the test images.
        loss: cross-entropy on the test images.
        parameters: number of trained parameters.
        images_per_second, seconds: training throughput and time, without evaluation.
        memory_mib: peak memory of ``memory_of``, "GPU" or "process".
        history: Trainer's log.
        model: the trained model.
        main: whether this is the main process, which prints and saves.
    """

    seed: int
    scores: Scores
    loss: float
    parameters: int
    images_per_second: float
    seconds: float
    memory_mib: float
    memory_of: str
    history: list[dict[str, Any]]
    model: Any
    main: bool

    def summary(self) -> dict[str, Any]:
        """Fields for results.json."""
        excluded = ("history", "model", "main", "scores")
        found = {name: value for name, value in vars(self).items() if name not in excluded}
        return {"accuracy": self.scores.accuracy, "score": self.scores.main, **found}


class Report:
    """Collects the results of all seeds and saves them with the first seed's model.

    Args:
        args: the command line.

    Raises:
        RecipeError, CheckpointError: the repository to push to cannot be created, or contains a model of another kind.
    """

    def __init__(self, args: argparse.Namespace, method: Method, task: Task, settings: Settings) -> None:
        self.args, self.method, self.task, self.settings = args, method, task, settings
        self.runs: list[Run] = []
        self.repository: Repository | None = None
        if PartialState().is_main_process:
            if args.push_to_hub:
                self.repository = Repository(args.push_to_hub, args.private, method.config is not None)
            counts = ", ".join(f"{len(rows)} {name}" for name, rows in task.splits.items())
            print(f"{method.title} on {task.model}. Images: {counts}.", flush=True)
            task.say_precision(settings)
            self._say_if_short()

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.args.output)

    def add(self, run: Run) -> None:
        """Adds a run and prints its result."""
        if self.runs:
            run.model = None  # only the first model is kept
        self.runs.append(run)
        if run.main:
            speed = f"{run.images_per_second:.1f} images/s" if run.seconds else "no steps left to train"
            mean_iou = f"mean IoU {run.scores.mean_iou:.1f} %, " if self.task.kind == "segmentation" else ""
            what = "pixel accuracy" if mean_iou else "accuracy"
            print(
                f"Seed {run.seed}: test {mean_iou}{what} {run.scores.accuracy:.1f} %, {run.parameters:,} trained "
                f"parameters, {speed}, peak {run.memory_of} memory {run.memory_mib:,.0f} MiB.",
                flush=True,
            )
            if run.scores.is_near_chance:
                self._say_what_to_try(run)

    def finish(self) -> None:
        """Saves model, results and plots, and pushes them to the Hub if requested.

        Raises:
            RecipeError: the push failed. Everything is saved locally before.
        """
        first, names = self.runs[0], self.task.label_names
        hub_error: RecipeError | None = None
        if self.repository and not isinstance(first.model, VPTModel):
            try:
                self.repository.fetch_card(self.folder)
            except RecipeError as error:
                hub_error = error
        self._save(first)
        if not first.main:
            return
        self._draw(first)
        labels = first.scores.by_label(names)
        self._write_results(first.scores.confusion.tolist(), labels)
        if len(names) <= MAX_PRINTED_LABELS:
            print(f"\n{label_table(labels)}\n")
        if len(self.runs) > 1:
            scores = [run.scores.main for run in self.runs]
            mean, deviation = statistics.mean(scores), statistics.stdev(scores)
            print(f"Mean and standard deviation over {len(self.runs)} seeds: {mean:.1f} ± {deviation:.1f} %.")
        size = ""
        if isinstance(first.model, VPTModel):
            size = f" The adapter has {(self.folder / WEIGHTS_NAME).stat().st_size / 1e6:.2f} MB."
        print(f"Saved in {self.folder}: {self.method.title} of seed {first.seed}, results.json and plots.{size}")
        if hub_error:
            raise hub_error
        if self.repository:
            print(f"Pushed to {self._push(first.model)}")

    # -- remarks ------------------------------------------------------------------------------------------------------

    def _say_if_short(self) -> None:
        steps = self.task.steps(self.settings)
        if steps >= self.method.steps:
            return
        epochs = -(-self.settings.epochs * self.method.steps // steps)
        default = METHODS[DEFAULT_METHOD]
        other = f", or take --method {DEFAULT_METHOD}" if self.method.steps > default.steps else ""
        say(
            f"This run is short: it has {steps} steps, and {self.method.title} needs some {self.method.steps} to be "
            f"better than a linear head. Train for --epochs {epochs}{other}."
        )

    def _say_what_to_try(self, run: Run) -> None:
        is_default = self.method.title == METHODS[DEFAULT_METHOD].title
        tips = [] if is_default else [f"take --method {DEFAULT_METHOD}, which learns in few steps"]
        say(
            f"The test accuracy is near chance: {run.scores.accuracy:.1f} %, where always answering the most frequent "
            f"label gives {run.scores.chance:.1f} %. What to try: {'; '.join([*tips, *WHAT_TO_TRY])}."
        )

    # -- files --------------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Metrics for the model card."""
        name = "mean IoU" if self.task.kind == "segmentation" else "accuracy"
        scores = [run.scores.main for run in self.runs]
        metrics = {f"{name}, % of {len(self.task.splits['test'])} test images": scores[0]}
        if self.task.kind == "segmentation":
            metrics["pixel accuracy, %"] = self.runs[0].scores.accuracy
        if len(scores) > 1:
            metrics[f"mean {name} of {len(scores)} seeds"] = statistics.mean(scores)
            metrics["standard deviation over seeds"] = statistics.stdev(scores)
        return metrics

    def effective(self, seed: int) -> dict[str, Any]:
        """All settings of a run with their effective values, for results.json and the card."""
        settings, processes, args = self.settings, PartialState().num_processes, self.args
        num_images = len(self.task.splits["train"])
        tokens = self.method.config.num_tokens if self.method.config else 0
        height, width = self.task.size
        return {
            "method": args.method,
            **({"prompt length": tokens} if tokens else {}),
            **self.method.rates,
            "optimizer": "AdamW",
            "weight decay": settings.weight_decay,
            "schedule": "cosine, warmup over a tenth of the steps",
            "epochs": settings.epochs,
            "steps": self.task.steps(settings),
            "batch size": settings.batch_size * settings.accumulate * processes,
            "batch size per device": settings.batch_size,
            "accumulate": settings.accumulate,
            "processes": processes,
            "image size": f"{height} x {width}",
            "min crop": args.min_crop,
            "flip": args.flip,
            "training images": num_images,
            "best epoch kept": args.keep_best,
            "precision": settings.precision,
            "gradient checkpointing": settings.gradient_checkpointing,
            "device": settings.device.type,
            "seed": seed,
        }

    def card_details(self, seed: int) -> dict[str, Any]:
        """What the card says besides the adapter's config."""
        return {
            "metrics": self.metrics(),
            "hyperparameters": self.effective(seed),
            "training_data": self.task.training_data,
        }

    def _write_results(self, confusion: list[list[int]], labels: list[dict[str, Any]]) -> None:
        first = self.runs[0]
        report = {
            "task": self.task.kind,
            "model": self.task.model,
            "data": self.task.data,
            "settings": self.effective(first.seed),
            "metrics": self.metrics(),
            "chance": first.scores.chance,
            "labels": labels,
            "runs": [run.summary() for run in self.runs],
            "card": self.card_details(first.seed),
            "confusion": confusion,
            "histories": {run.seed: run.history for run in self.runs},
        }
        (self.folder / "results.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    def _draw(self, run: Run) -> None:
        title = f"{self.method.title} on {self.task.model}, {self.task.data}"
        split = "validation" if self.args.keep_best else "test"
        score = "mean_iou" if self.task.kind == "segmentation" else "accuracy"
        histories = {run.seed: run.history for run in self.runs}
        plots.learning_curve(
            self.folder / "learning_curve.png", histories, title, split, score, run.scores.chance
        )  # fmt: skip
        heading = f"{title}\naccuracy {run.scores.accuracy:.1f} % of {run.scores.total:,} test "
        heading += "pixels" if self.task.kind == "segmentation" else "images"
        plots.confusion_plot(self.folder / "confusion_matrix.png", run.scores.confusion, self.task.label_names, heading)
        if self.task.kind == "segmentation":
            self._draw_segmentation(run.model, title)

    def _draw_segmentation(self, model: Any, title: str) -> None:
        rows = self.task.splits["test"]
        rows = rows.select(np.linspace(0, len(rows) - 1, min(MAX_PICTURES, len(rows))).astype(int))
        inputs = self.task.for_testing(rows)[:]
        masks = torch.stack(inputs["labels"])
        with torch.no_grad():
            logits = model.eval()(pixel_values=inputs["pixel_values"].to(self.settings.device)).logits
        height, width = self.task.size
        images = np.stack([np.array(image.convert("RGB").resize((width, height))) for image in rows[IMAGE]])
        predictions = predicted_labels(logits, masks).cpu().numpy()
        plots.segmentation(
            self.folder / "predictions.png", images, masks.numpy(), predictions, self.task.label_names, title
        )  # fmt: skip

    def _save(self, run: Run) -> None:
        """Called in every process, since sharded tensors are gathered by all of them."""
        if isinstance(run.model, VPTModel):
            details = self.card_details(run.seed)
            run.model.save_pretrained(
                self.folder, image_processor=self.task.processor, is_main_process=run.main, **details
            )  # fmt: skip
            return
        if not run.main:
            return
        run.model.save_pretrained(self.folder)
        if hasattr(run.model, "peft_config"):
            run.model.get_base_model().config.save_pretrained(self.folder)  # the labels, which PEFT does not save
        self.task.processor.save_pretrained(self.folder)
        name = self.task.model
        values = {**self.metrics(), **self.effective(run.seed)}
        rows = "\n".join(
            f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in values.items()
        )
        text = MODEL_CARD.format(
            title=self.folder.name,
            base=f"[{name}](https://huggingface.co/{name})" if self.task.is_on_hub else name,
            method=self.method.title,
            labels=", ".join(self.task.label_names),
            rows=rows,
        )
        is_peft = hasattr(run.model, "peft_config")
        metadata = {
            "library_name": "peft" if is_peft else "transformers",
            "pipeline_tag": "image-segmentation" if self.task.kind == "segmentation" else "image-classification",
            **({"base_model": name} if self.task.is_on_hub else {}),
        }
        update_card(self.folder, CardContent(self.folder.name, text, metadata))

    def _push(self, model: Any) -> str:
        assert self.repository is not None
        if isinstance(model, VPTModel):
            details = self.card_details(self.runs[0].seed)
            return self.repository.push_adapter(model, self.task.processor, details)
        return self.repository.push_folder(self.folder)
