"""Search for learning rates, weight decay, prompt length and depth with ``Trainer.hyperparameter_search`` and Optuna.

    python examples/sweep.py                                          # handwritten digits, nothing to download
    python examples/sweep.py --model google/vit-base-patch16-224-in21k --data my-images --trials 40

As in the paper: trials train on 80 % of the training images and are judged by the other 20 %; the best setting then
trains on all of them and is tested once. Bad trials are pruned, failed ones are left out. Trials are kept in a file,
so that the same command goes on where it stopped, and with more ``--trials``; when there are enough, it only retrains.
``sweep_on_ray.py`` searches on a cluster.
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
from trainer_task import Task, add_options, complete
from trainer_tools import accuracy_of, quieted, training_arguments
from training import be_quiet, check_least, load_backbone
from transformers import Trainer, TrainingArguments

from vpt_peft import PromptConfig, VPTError, VPTModel, adamw, get_vpt_model, parameter_groups

# Least and greatest value of what is searched on a logarithmic scale; prompt length and depth are whole numbers.
RATES = {"learning_rate": (3e-4, 3e-2), "head_learning_rate": (3e-3, 3e-1), "weight_decay": (1e-4, 1e-1)}
LOG_SCALES = (*RATES, "num_tokens")
COMMON = ("epochs", "batch_size", "min_crop", "flip", "most_tokens", "seed", "image_column", "label_column")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and completed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_search_options(parser)
    return complete_search(parser, parser.parse_args(argv))


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Options for the task and how to search."""
    add_options(parser)
    add = parser.add_argument
    add("--trials", type=int, default=20, help="how many there are to be, those of earlier calls too (default: 20)")
    add("--most-tokens", type=int, default=50, help="the longest prompt to try (default: %(default)s)")
    add("--seed", type=int, default=0, help="sets everything that is random (default: 0)")
    add("--output", type=Path, default=Path("runs/sweep"), help="default: %(default)s")


def complete_search(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """The command line, checked, with the defaults that depend on the data."""
    check_least(parser, args, trials=1, most_tokens=1, seed=0)
    return complete(parser, args)


@dataclass
class Arguments(TrainingArguments):
    """Trainer's settings and the head's learning rate, so that a search sets it as it sets the others."""

    head_learning_rate: float = 1e-2


class Tuner(Trainer):
    """A trainer whose head has a learning rate of its own: with ``model_init``, no optimizer can be handed over."""

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with the trial's settings."""
        if self.optimizer is None:
            rates = (self.args.learning_rate, self.args.head_learning_rate, self.args.weight_decay)
            self.optimizer = torch.optim.AdamW(parameter_groups(self.model if model is None else model, *rates))
        return self.optimizer

    def train(self, *args: Any, trial: Any = None, **kwargs: Any) -> Any:
        """Trains a trial and tells how it ended. An error is noted in it: that tells errors from interruptions."""
        if isinstance(trial, dict):  # Ray runs it elsewhere, and tells how it ended
            return super().train(*args, trial=trial, **kwargs)
        title, end = f"Trial {trial.number}", "interrupted"
        quieted(self, title)
        try:
            result = super().train(*args, trial=trial, **kwargs)
            end = f"{self.objective:.1f} %"
            return result
        except optuna.TrialPruned:
            end = "pruned"
            raise
        except Exception as error:
            end = f"{type(error).__name__}: {error}"
            trial.set_user_attr(ERROR, end)
            raise
        finally:
            print(f"{title}: {end} with {', '.join(f'{name} {value:.2g}' for name, value in trial.params.items())}")


def objective(metrics: dict[str, float]) -> float:
    """What a search maximizes: percent of the validation images."""
    return metrics["eval_accuracy"]


class Search:
    """What trials have in common: one backbone, loaded once, and the space that they draw from.

    Args:
        args: the command line.
        task: the backbone and the images.
    """

    def __init__(self, args: argparse.Namespace, task: Task) -> None:
        self.args, self.task = args, task
        self.backbone = load_backbone(task.backbone, task.class_names, args.seed)
        config = self.backbone.config
        self.layers = sum(getattr(config, "depths", ())) or config.num_hidden_layers
        self.vpt: VPTModel | None = None

    def space(self, trial: Any) -> dict[str, float]:
        """Draws a trial's hyperparameters, or finds those drawn before. Returns Trainer's own, as ``hp_space`` does."""
        trial.suggest_int("num_tokens", 1, self.args.most_tokens, log=True)
        trial.suggest_int("depth", 1, self.layers)
        return {name: trial.suggest_float(name, *ends, log=True) for name, ends in RATES.items()}

    def model_init(self, trial: Any = None) -> VPTModel:
        """Fresh prompts for a trial, on the backbone as it was loaded, whatever became of the trial before.

        Args:
            trial: Optuna's; or Ray's, a dictionary; None: Trainer wants a model before there is a trial.
        """
        if trial is None:
            return self.prompted(1, 1)
        if not isinstance(trial, dict):
            self.space(trial)
        values = trial if isinstance(trial, dict) else trial.params
        return self.prompted(values["num_tokens"], values["depth"])

    def prompted(self, num_tokens: int, depth: int) -> VPTModel:
        """The backbone with fresh prompts in its first ``depth`` layers, which flow on behind them."""
        if self.vpt is not None:
            self.vpt.unload()
        self.vpt = get_vpt_model(self.backbone, PromptConfig(num_tokens, layers_to_transform=range(depth)))
        return self.vpt

    def settings(self, kind: Any = TrainingArguments, **values: Any) -> Any:
        """Trainer's settings; ``values`` are further ones."""
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

    def tuner(self) -> Tuner:
        """Trains on 80 % of the training images, and is judged by the other 20 %."""
        parts = split(self.task.splits["train"], 0.2, self.args.seed)
        return Tuner(
            args=self.settings(Arguments),
            model_init=self.model_init,
            train_dataset=self.task.for_training(parts["train"]),
            eval_dataset=self.task.for_testing(parts["test"]),
            compute_metrics=accuracy_of,
        )

    def run(self, trials: Trials, number: int) -> None:
        """Runs so many trials."""
        tuner = self.tuner()
        steps = self.args.epochs * -(-len(tuner.train_dataset) // self.args.batch_size)  # type: ignore[arg-type]
        seed = self.args.seed + len(trials.all())  # the same one would draw what it has drawn before
        try:
            tuner.hyperparameter_search(
                self.space,
                compute_objective=objective,
                n_trials=number,
                direction="maximize",
                backend="optuna",
                sampler=optuna.samplers.TPESampler(seed=seed),
                pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=steps // 3),
                catch=(Exception,),
                **trials.arguments,
            )
        except ValueError:
            trials.best()  # where there is none, it says why, and Optuna only that there is none
            raise

    def retrain(self, values: dict[str, Any]) -> float:
        """Trains with these hyperparameters on all training images, saves the adapter and returns its test accuracy."""
        torch.manual_seed(self.args.seed)
        vpt = self.prompted(values["num_tokens"], values["depth"])
        rates = {name: values[name] for name in ("learning_rate", "head_learning_rate", "weight_decay")}
        trainer = Trainer(
            vpt,
            self.settings(eval_strategy="no"),
            train_dataset=self.task.for_training(self.task.splits["train"]),
            compute_metrics=accuracy_of,
            optimizer_cls_and_kwargs=adamw(vpt, **rates),
        )
        quieted(trainer, "Best").train()
        reached = trainer.predict(self.task.for_testing(self.task.splits["test"])).metrics["test_accuracy"]
        metrics = {f"accuracy, % of {len(self.task.splits['test'])} test images": reached}
        vpt.save_pretrained(
            self.args.output,
            image_processor=self.task.processor,
            metrics=metrics,
            training_data=self.task.training_data,
        )
        return reached


def report(
    args: argparse.Namespace, name: str, trials: list[dict[str, Any]], best: dict[str, Any], test: float
) -> None:
    """Writes down and prints what a search found, of which ``best`` was trained anew and tested."""
    plots.search(args.output / "sweep.png", trials, LOG_SCALES, f"{len(trials)} trials: {name}")
    found = {"task": name, "trials": trials, "best": best["number"], "validation": best["accuracy"], "test": test}
    (args.output / "results.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"Best of {len(trials)}: trial {best['number']}, {best['accuracy']:.1f} % of the validation images.")
    print(f"Trained on all training images, it names {test:.1f} % of the test images. Saved in {args.output}.")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    be_quiet()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        task = Task.load(args, args.seed)
        search, name = Search(args, task), task.name
        common = {name: getattr(args, name) for name in COMMON} | task.contents
        trials = Trials(args.output / "trials.db", name, common)
        missing = args.trials - len(trials.ended())
        if missing > 0:
            trials.repeat_interrupted()
            search.run(trials, missing)
        best = trials.best()
        reached = search.retrain(best["params"])
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    report(args, name, trials.summaries(), best, reached)


if __name__ == "__main__":
    main()
