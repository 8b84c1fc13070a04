"""Hyperparameter search with ``Trainer.hyperparameter_search`` and Optuna: learning rates, prompt length, depth, ...

    python examples/sweep.py                                          # handwritten digits, no download
    python examples/sweep.py --model google/vit-base-patch16-224-in21k --data my-images --trials 40

As in the paper, trials train on 80 % of the training images and are evaluated on the other 20 %; the best setting is
retrained on all of them and tested once. Bad trials are pruned, failed ones are ignored. Trials are stored in a file,
so that the same command continues an interrupted search, or adds trials up to a larger ``--trials``. If there are
enough, it only retrains. ``sweep_on_ray.py`` searches on a cluster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import plots
import torch
from images import DataError
from sweep_trials import ERROR, Trials
from trainer_data import split
from trainer_task import Task, add_options, set_defaults
from trainer_tools import compute_accuracy, training_arguments, use_short_progress
from training import check_minimum, load_backbone, silence_transformers
from transformers import Trainer, TrainingArguments

from vpt_peft import PromptConfig, VPTError, VPTModel, adamw, get_vpt_model, parameter_groups

# Bounds of the hyperparameters that are drawn log-uniformly, besides the prompt length.
RATES = {"learning_rate": (3e-4, 3e-2), "head_learning_rate": (3e-3, 3e-1), "weight_decay": (1e-4, 1e-1)}
LOG_SCALES = (*RATES, "num_tokens")
SHARED_SETTINGS = ("epochs", "batch_size", "min_crop", "flip", "most_tokens", "seed", "image_column", "label_column")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_search_options(parser)
    return set_search_defaults(parser, parser.parse_args(argv))


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the task and of the search."""
    add_options(parser)
    add = parser.add_argument
    add("--trials", type=int, default=20, help="total number of trials, including earlier ones (default: 20)")
    add("--most-tokens", type=int, default=50, help="maximum prompt length (default: %(default)s)")
    add("--seed", type=int, default=0, help="random seed (default: 0)")
    add("--output", type=Path, default=Path("runs/sweep"), help="default: %(default)s")


def set_search_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Checks the options and sets defaults that depend on the dataset."""
    check_minimum(parser, args, trials=1, most_tokens=1, seed=0)
    return set_defaults(parser, args)


@dataclass
class SweepArguments(TrainingArguments):
    """Settings of Trainer with the head's learning rate, so that the search can set it."""

    head_learning_rate: float = 1e-2


class SweepTrainer(Trainer):
    """Creates the optimizer with the head's learning rate: with ``model_init``, Trainer accepts no optimizer."""

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with the hyperparameters of the trial."""
        if self.optimizer is None:
            rates = (self.args.learning_rate, self.args.head_learning_rate, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model if model is None else model, *rates))
        return self.optimizer

    def train(self, *args: Any, trial: Any = None, **kwargs: Any) -> Any:
        """Trains a trial and prints how it ended. Errors are stored in the trial, interruptions are not."""
        if isinstance(trial, dict):  # Ray reports how it ended
            return super().train(*args, trial=trial, **kwargs)
        title, outcome = f"Trial {trial.number}", "interrupted"
        use_short_progress(self, title)
        try:
            result = super().train(*args, trial=trial, **kwargs)
            outcome = f"{self.objective:.1f} %"
            return result
        except optuna.TrialPruned:
            outcome = "pruned"
            raise
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            trial.set_user_attr(ERROR, outcome)
            raise
        finally:
            print(f"{title}: {outcome} with {', '.join(f'{name} {value:.2g}' for name, value in trial.params.items())}")


def objective(metrics: dict[str, float]) -> float:
    """The metric that is maximised: validation accuracy in percent."""
    return metrics["eval_accuracy"]


class Search:
    """The search space, and a backbone that all trials share.

    Args:
        args: the command line.
        task: the backbone and the dataset.
    """

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.args, self.task = args, task
        self.backbone = load_backbone(task.backbone, task.class_names, args.seed)
        config = self.backbone.config
        self.layers = sum(getattr(config, "depths", ())) or config.num_hidden_layers
        self.vpt: VPTModel | None = None

    def space(self, trial: Any) -> dict[str, float]:
        """Draws the hyperparameters of a trial, unless it has some. Returns those of Trainer, as ``hp_space``."""
        trial.suggest_int("num_tokens", 1, self.args.most_tokens, log=True)
        trial.suggest_int("depth", 1, self.layers)
        return {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in RATES.items()}

    def model_init(self, trial: Any = None) -> VPTModel:
        """Builds the model of a trial: fresh prompts on the unchanged backbone.

        Args:
            trial: Optuna's trial, or Ray's dictionary; None: a placeholder that Trainer needs before the first trial.
        """
        if trial is None:
            return self.build_model(1, 1)
        if not isinstance(trial, dict):
            self.space(trial)
        values = trial if isinstance(trial, dict) else trial.params
        return self.build_model(values["num_tokens"], values["depth"])

    def build_model(self, num_tokens: int, depth: int) -> VPTModel:
        """The backbone with fresh prompts in its first ``depth`` layers, carried on through the others."""
        if self.vpt is not None:
            self.vpt.unload()
        self.vpt = get_vpt_model(self.backbone, PromptConfig(num_tokens, layers_to_transform=range(depth)))
        return self.vpt

    def settings(self, kind: Any = TrainingArguments, **values: Any) -> Any:
        """Settings of Trainer; ``values`` are additional ones."""
        return training_arguments(
            kind,
            output_dir=str(self.args.output / "trainer"),
            num_train_epochs=self.args.epochs,
            per_device_train_batch_size=self.args.batch_size,
            per_device_eval_batch_size=4 * self.args.batch_size,
            save_strategy="no",
            seed=self.args.seed,
            **values,
        )

    def build_trainer(self) -> SweepTrainer:
        """A trainer for trials: 80 % of the training images, and the other 20 % for validation."""
        parts = split(self.task.splits["train"], 0.2, self.args.seed)
        return SweepTrainer(
            args=self.settings(SweepArguments),
            model_init=self.model_init,
            train_dataset=self.task.for_training(parts["train"]),
            eval_dataset=self.task.for_testing(parts["test"]),
            compute_metrics=compute_accuracy,
        )

    def run(self, trials: Trials, number: int) -> None:
        """Runs ``number`` trials."""
        trainer = self.build_trainer()
        steps = self.args.epochs * -(-len(trainer.train_dataset) // self.args.batch_size)  # type: ignore[arg-type]
        seed = self.args.seed + len(trials.all())  # the same seed would draw the same values again
        try:
            trainer.hyperparameter_search(
                self.space,
                compute_objective=objective,
                n_trials=number,
                direction="maximize",
                backend="optuna",
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=steps // 3),
                catch=(Exception,),
                **trials.study_kwargs,
            )
        except ValueError:
            trials.best()  # without a complete trial, its error says why
            raise

    def retrain(self, values: dict[str, Any]) -> float:
        """Trains on all training images, saves the adapter and returns its test accuracy in percent."""
        torch.manual_seed(self.args.seed)
        vpt = self.build_model(values["num_tokens"], values["depth"])
        rates = {name: values[name] for name in ("learning_rate", "head_learning_rate", "weight_decay")}
        trainer = Trainer(
            vpt,
            self.settings(eval_strategy="no"),
            train_dataset=self.task.for_training(self.task.splits["train"]),
            compute_metrics=compute_accuracy,
            optimizer_cls_and_kwargs=adamw(vpt, **rates),
        )
        use_short_progress(trainer, "Best").train()
        test_accuracy = trainer.predict(self.task.for_testing(self.task.splits["test"])).metrics["test_accuracy"]
        metrics = {f"accuracy, % of {len(self.task.splits['test'])} test images": test_accuracy}
        vpt.save_pretrained(
            self.args.output,
            image_processor=self.task.processor,
            metrics=metrics,
            hyperparameters={
                **{name.replace("_", " "): values[name] for name in RATES},
                "epochs": self.args.epochs,
                "batch size": self.args.batch_size,
                "seed": self.args.seed,
            },
            training_data=self.task.training_data,
        )
        return test_accuracy


def report(
    args: argparse.Namespace, name: str, trials: list[dict[str, Any]], best: dict[str, Any], test: float
) -> None:
    """Saves and prints the results of a search, with the test accuracy of the retrained ``best`` trial."""
    plots.search(args.output / "sweep.png", trials, LOG_SCALES, f"{len(trials)} trials: {name}")
    results = {"task": name, "trials": trials, "best": best["number"], "validation": best["accuracy"], "test": test}
    (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"Best of {len(trials)} trials: trial {best['number']}, validation accuracy {best['accuracy']:.1f} %.")
    print(f"Retrained on all training images: test accuracy {test:.1f} %. Saved in {args.output}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        task = Task.load(args, args.seed)
        search, name = Search(args, task), task.name
        shared = {setting: getattr(args, setting) for setting in SHARED_SETTINGS} | task.contents
        trials = Trials(args.output / "trials.db", name, shared)
        missing = args.trials - len(trials.finished())
        if missing > 0:
            trials.repeat_interrupted()
            search.run(trials, missing)
        best = trials.best()
        test_accuracy = search.retrain(best["params"])
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    report(args, name, trials.summaries(), best, test_accuracy)


if __name__ == "__main__":
    main()
