"""Output of ``train_image_classification.py``: a line per seed, plots, results, the model and its card."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from typing import Any

import plots
from accelerate import PartialState
from images import DataError
from repository import Repository
from trainer_data import DatasetDict
from trainer_task import Task
from training import Method

from vpt_peft import VPTModel
from vpt_peft.hub import CardContent, update_card

FULL_MODEL_CARD = """# {title}

{base}, fine-tuned in full on the classes {classes}.

| | |
|---|---|
{rows}
"""


@dataclass
class Run:
    """Result of training with one seed.

    Attributes:
        accuracy: test accuracy in percent.
        loss: cross-entropy on the test images.
        parameters: number of trained parameters.
        images_per_second, seconds: training throughput and time, without evaluation.
        memory_mib: peak memory of ``memory_of``, "GPU" or "process".
        history: Trainer's log.
        predictions, labels: of the test images.
        model: the trained model.
        main: whether this is the main process, which prints and saves.
    """

    seed: int
    accuracy: float
    loss: float
    parameters: int
    images_per_second: float
    seconds: float
    memory_mib: float
    memory_of: str
    history: list[dict[str, Any]]
    predictions: list[int]
    labels: list[int]
    model: Any
    main: bool

    def summary(self) -> dict[str, Any]:
        """Fields for results.json."""
        excluded = ("history", "predictions", "labels", "model", "main")
        return {name: value for name, value in vars(self).items() if name not in excluded}


class Report:
    """Collects the results of all seeds and saves them with the first seed's model.

    Args:
        args: the command line.
        splits: training, test and possibly validation images.

    Raises:
        DataError, CheckpointError: the repository to push to cannot be created, or contains a model of another kind.
    """

    def __init__(self, args: argparse.Namespace, method: Method, task: Task, splits: DatasetDict) -> None:
        self.args, self.method, self.task, self.splits = args, method, task, splits
        self.runs: list[Run] = []
        self.histories: dict[int, list[dict[str, Any]]] = {}
        self.repository: Repository | None = None
        if PartialState().is_main_process:
            if args.push_to_hub:
                self.repository = Repository(args.push_to_hub, args.private, method.config is not None)
            counts = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
            print(f"{method.title} on {task.model}. Images: {counts}.")

    def add(self, run: Run) -> None:
        """Adds a run and prints its result."""
        if self.runs:
            run.model = None  # only the first model is kept
        self.runs.append(run)
        self.histories[run.seed] = run.history
        if run.main:
            speed = f"{run.images_per_second:.1f} images/s" if run.seconds else "no steps left to train"
            print(
                f"Seed {run.seed}: test accuracy {run.accuracy:.1f} %, {run.parameters:,} trained parameters, {speed}, "
                f"peak {run.memory_of} memory {run.memory_mib:,.0f} MiB."
            )

    def metrics(self) -> dict[str, float]:
        """Metrics for the model card."""
        accuracies = [run.accuracy for run in self.runs]
        metrics = {f"accuracy, % of {len(self.splits['test'])} test images": accuracies[0]}
        if len(accuracies) > 1:
            metrics[f"mean accuracy of {len(accuracies)} seeds"] = statistics.mean(accuracies)
            metrics["standard deviation over seeds"] = statistics.stdev(accuracies)
        return metrics

    def finish(self) -> None:
        """Saves model, results and plots, and pushes them to the Hub if requested.

        Raises:
            DataError: the push failed. Everything is saved locally before.
        """
        first, folder, names = self.runs[0], self.args.output, self.task.class_names
        hub_error: DataError | None = None
        if self.repository:
            try:
                self.repository.fetch_card(folder)
            except DataError as error:
                hub_error = error
        self._save(first)
        if not first.main:
            return
        if len(self.runs) > 1:
            _, mean, deviation = self.metrics().values()
            print(f"Mean and standard deviation over {len(self.runs)} seeds: {mean:.1f} ± {deviation:.1f} %.")
        title = f"{self.method.title} on {self.task.model}, {self.task.data}"
        split = "validation" if self.args.keep_best else "test"
        plots.learning_curve(folder / "learning_curve.png", self.histories, title, split)
        counts = plots.confusion(first.labels, first.predictions, len(names))
        heading = f"{title}\naccuracy {first.accuracy:.1f} % on {len(first.labels)} test images"
        plots.confusion_matrix(folder / "confusion_matrix.png", counts, names, heading)
        self._write_results(counts.tolist())
        print(f"Saved in {folder}: {self.method.title} of seed {first.seed}, results.json and plots.")
        if hub_error:
            raise hub_error
        if self.repository:
            print(f"Pushed to {self.repository.push(folder)}")

    def _write_results(self, confusion: list[list[int]]) -> None:
        excluded = ("model", "data", "output", "resume", "push_to_hub", "private")
        settings = {name: value for name, value in vars(self.args).items() if name not in excluded}
        runs = [run.summary() for run in self.runs]
        report = {
            "model": self.task.model,
            "data": self.task.data,
            "settings": settings,
            "metrics": self.metrics(),
            "runs": runs,
        }
        text = json.dumps({**report, "confusion": confusion, "histories": self.histories}, indent=1)
        (self.args.output / "results.json").write_text(text, encoding="utf-8")

    def _hyperparameters(self, seed: int) -> dict[str, Any]:
        names = ("epochs", "batch_size", "accumulate", "weight_decay", "min_crop", "flip", "precision")
        return {
            **self.method.rates,
            **{name.replace("_", " "): getattr(self.args, name) for name in names},
            "seed": seed,
        }

    def _save(self, run: Run) -> None:
        """Called in every process, since sharded tensors are gathered by all of them."""
        folder = self.args.output
        if isinstance(run.model, VPTModel):
            run.model.save_pretrained(
                folder,
                image_processor=self.task.processor,
                is_main_process=run.main,
                model_id=self.repository and self.repository.name,
                metrics=self.metrics(),
                hyperparameters=self._hyperparameters(run.seed),
                training_data=self.task.training_data,
            )
            return
        if not run.main:
            return
        run.model.save_pretrained(folder)
        self.task.processor.save_pretrained(folder)
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in self.metrics().items())
        name = self.task.model
        base = f"[{name}](https://huggingface.co/{name})" if self.task.base_model else name
        classes = ", ".join(self.task.class_names)
        text = FULL_MODEL_CARD.format(title=folder.name, base=base, classes=classes, rows=rows)
        metadata = {"library_name": "transformers", "pipeline_tag": "image-classification"}
        if self.task.base_model:
            metadata["base_model"] = self.task.base_model
        update_card(folder, CardContent(folder.name, text, metadata))
