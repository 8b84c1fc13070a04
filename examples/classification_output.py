"""What ``train_image_classification.py`` leaves behind: a line a seed, pictures, results, the model and its card."""

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

from vpt_peft import VPTModel, card

FULL_MODEL = """# {title}

{base}, all of it tuned to the classes {classes}.

| | |
|---|---|
{rows}
"""


@dataclass
class Run:
    """What training with one seed reached.

    Attributes:
        accuracy, loss: percent and cross-entropy of the test images.
        parameters: number of those that trained.
        images_per_second, seconds: of training, evaluations left out.
        memory_mib: the most so far, of ``memory_of``: "GPU" or "process".
        history: Trainer's log.
        predictions, labels: of the test images.
        model: what was trained.
        main: whether this is the process that prints and saves.
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
        """What goes into the results."""
        left_out = ("history", "predictions", "labels", "model", "main")
        return {name: value for name, value in vars(self).items() if name not in left_out}


class Report:
    """Collects runs and writes down what they reached; the first seed's model is the one that is kept.

    Args:
        args: the command line.
        splits: the images that are used, of the task's.

    Raises:
        DataError: the repository to push to cannot be created.
    """

    def __init__(self, args: argparse.Namespace, method: Method, task: Task, splits: DatasetDict) -> None:
        self.args, self.method, self.task, self.splits = args, method, task, splits
        self.runs: list[Run] = []
        self.histories: dict[int, list[dict[str, Any]]] = {}
        self.repository: Repository | None = None
        if PartialState().is_main_process:
            if args.push_to_hub:
                self.repository = Repository(args.push_to_hub, args.private)
            numbers = ", ".join(f"{len(rows)} for {name}" for name, rows in splits.items())
            print(f"{method.title} on {task.model}. Images: {numbers}.")

    def add(self, run: Run) -> None:
        """Prints what a seed reached."""
        if self.runs:
            run.model = None  # only the first one is kept
        self.runs.append(run)
        self.histories[run.seed] = run.history
        if run.main:
            pace = f"{run.images_per_second:.1f} images per second" if run.seconds else "no step was left to train"
            print(
                f"Seed {run.seed}: {run.accuracy:.1f} % of the test images are right. {run.parameters:,} parameters "
                f"trained, {pace}, peak memory of the {run.memory_of} {run.memory_mib:,.0f} MiB."
            )

    def metrics(self) -> dict[str, float]:
        """For the card."""
        reached = [run.accuracy for run in self.runs]
        found = {f"accuracy, % of {len(self.splits['test'])} test images": reached[0]}
        if len(reached) > 1:
            found[f"mean accuracy of {len(reached)} seeds"] = statistics.mean(reached)
            found["standard deviation over seeds"] = statistics.stdev(reached)
        return found

    def finish(self) -> None:
        """Saves everything, prints where it is, and pushes it if that was asked for.

        Raises:
            DataError: the Hub does not take it. All is saved by then.
        """
        first, folder, names = self.runs[0], self.args.output, self.task.class_names
        refused: DataError | None = None
        if self.repository:
            try:
                self.repository.fetch_card(folder)
            except DataError as error:
                refused = error
        self._save(first)
        if not first.main:
            return
        if len(self.runs) > 1:
            _, mean, deviation = self.metrics().values()
            print(f"{mean:.1f} ± {deviation:.1f} %: mean and standard deviation of {len(self.runs)} seeds.")
        title = f"{self.method.title} on {self.task.model}, {self.task.data}"
        split = "validation" if self.args.keep_best else "test"
        plots.learning_curve(folder / "learning_curve.png", self.histories, title, split)
        counts = plots.confusion(first.labels, first.predictions, len(names))
        heading = f"{title}\n{first.accuracy:.1f} % of {len(first.labels)} test images are right"
        plots.confusion_matrix(folder / "confusion_matrix.png", counts, names, heading)
        self._write_results(counts.tolist())
        print(f"Saved in {folder}: {self.method.title} of seed {first.seed}, results.json and pictures.")
        if refused:
            raise refused
        if self.repository:
            print(f"Pushed to {self.repository.push(folder)}")

    def _write_results(self, confusion: list[list[int]]) -> None:
        left_out = ("model", "data", "output", "resume", "push_to_hub", "private")
        settings = {name: value for name, value in vars(self.args).items() if name not in left_out}
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

    def _save(self, run: Run) -> None:
        """Called in every process: what several share is gathered by all of them."""
        folder = self.args.output
        if isinstance(run.model, VPTModel):
            run.model.save_pretrained(
                folder,
                image_processor=self.task.processor,
                is_main_process=run.main,
                model_id=self.repository and self.repository.name,
                metrics=self.metrics(),
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
        text = FULL_MODEL.format(title=folder.name, base=base, classes=classes, rows=rows)
        facts = {"library_name": "transformers", "pipeline_tag": "image-classification"}
        if self.task.base_model:
            facts["base_model"] = self.task.base_model
        card.refresh(folder, text, facts)
