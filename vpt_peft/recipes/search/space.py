"""The search space, the models of the trials, and a Trainer for them."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import optuna
import torch
from transformers import TrainingArguments

from ...model import VPTModel
from ..report.metrics import Metric
from ..training.methods import Method
from ..training.task import Task
from ..training.trainer import RecipeTrainer, Settings
from .trials import ERROR, Trials

VALIDATION_SHARE = 0.2  # as in the paper
FACTOR = 10  # learning rates are searched from a tenth to ten times the method's
WEIGHT_DECAYS = (1e-4, 1e-1)


@dataclass
class SweepArguments(TrainingArguments):
    """Settings of Trainer with the head's learning rate, so that the search can set it."""

    head_learning_rate: float = 1e-2


class SweepTrainer(RecipeTrainer):
    """Creates the optimizer with the rates of the trial: with ``model_init``, Trainer accepts no optimizer.

    Args:
        method: the method, whose other rates remain.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, title="", **kwargs)
        self.method = method

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with the hyperparameters of the trial."""
        if self.optimizer is None:
            rates = {name: getattr(self.args, name) for name in ("learning_rate", "head_learning_rate")}
            groups = replace(self.method, **rates).parameter_groups(
                self.model if model is None else model, self.args.weight_decay
            )
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer

    def train(self, *args: Any, trial: Any = None, **kwargs: Any) -> Any:
        """Trains a trial and prints how it ended. Errors are stored in the trial, interruptions are not."""
        kwargs["trial"] = trial
        if isinstance(trial, dict):  # Ray reports how it ended
            return super().train(*args, **kwargs)
        title, outcome = f"Trial {trial.number}", "interrupted"
        self.progress.title = title
        try:
            result = super().train(*args, **kwargs)
            outcome = f"{self.objective:.1f} %"  # type: ignore[has-type]  # set by Trainer's callback
            return result
        except optuna.TrialPruned:
            outcome = "pruned"
            raise
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
            trial.set_user_attr(ERROR, outcome)
            raise
        finally:
            values = ", ".join(f"{name} {value:.2g}" for name, value in trial.params.items())
            print(f"{title}: {outcome} with {values}", flush=True)


def objective(metrics: dict[str, float]) -> float:
    """What is maximised: the score on the validation images, in percent."""
    return metrics.get("eval_mean_iou", metrics["eval_accuracy"])


class Search:
    """The models and trainers of a search.

    Args:
        args: the command line.
        task: the backbone and the dataset.
    """

    def __init__(self, args: argparse.Namespace, task: Task, settings: Settings) -> None:
        self.args, self.task, self.settings = args, task, settings
        self.method = task.methods[args.method]
        self.backbone = task.load_backbone(args.seed, settings)
        config = self.backbone.config
        config = getattr(config, "backbone_config", None) or getattr(config, "vision_config", None) or config
        self.layers = sum(getattr(config, "depths", ())) or config.num_hidden_layers
        self.vpt: VPTModel | None = None

    @property
    def rates(self) -> dict[str, tuple[float, float]]:
        """Bounds of the hyperparameters of Trainer, which are drawn log-uniformly."""
        head = self.method.head_learning_rate or self.method.learning_rate
        centers = {"learning_rate": self.method.learning_rate, "head_learning_rate": head}
        return {
            **{name: (center / FACTOR, center * FACTOR) for name, center in centers.items()},
            "weight_decay": WEIGHT_DECAYS,
        }

    @property
    def searches_depth(self) -> bool:
        """Whether the number of layers with prompts is searched: not of VPT-Shallow."""
        return self.method.config is not None and self.method.config.deep

    def space(self, trial: Any) -> dict[str, float]:
        """Draws the hyperparameters of a trial, unless it has some. Returns those of Trainer, as ``hp_space``."""
        trial.suggest_int("num_tokens", 1, self.args.most_tokens, log=True)
        if self.searches_depth:
            trial.suggest_int("depth", 1, self.layers)
        return {name: trial.suggest_float(name, *bounds, log=True) for name, bounds in self.rates.items()}

    def model_init(self, trial: Any = None) -> VPTModel:
        """Builds the model of a trial: fresh prompts on the unchanged backbone.

        Args:
            trial: Optuna's trial, or Ray's dictionary; None: a placeholder that Trainer needs before the first trial.
        """
        if trial is None:
            return self.build_model({"num_tokens": 1, "depth": 1})
        if not isinstance(trial, dict):
            self.space(trial)
        return self.build_model(trial if isinstance(trial, dict) else trial.params)

    def build_model(self, values: dict[str, Any]) -> VPTModel:
        """The backbone with fresh prompts in its first ``depth`` layers."""
        if self.vpt is not None:
            self.vpt.unload()
        assert self.method.config is not None
        layers = {"layers_to_transform": range(values["depth"])} if self.searches_depth else {}
        config = self.method.config.replace(num_tokens=values["num_tokens"], **layers)
        vpt: VPTModel = self.task.attach(replace(self.method, config=config), self.backbone)
        self.vpt = vpt
        return vpt

    def arguments(self, kind: Any = TrainingArguments, **values: Any) -> Any:
        """Settings of Trainer; ``values`` are additional ones."""
        folder = self.args.output / "trainer"
        return self.settings.arguments(folder, self.args.seed, kind, save_strategy="no", **values)

    def build_trainer(self) -> SweepTrainer:
        """A trainer for trials, with a validation split: the dataset's, or 20 % of the training images."""
        task = self.task.with_validation(VALIDATION_SHARE, self.args.seed)
        return SweepTrainer(
            args=self.arguments(SweepArguments),
            model_init=self.model_init,
            train_dataset=task.for_training(task.splits["train"]),
            eval_dataset=task.for_testing(task.splits["validation"]),
            metric=task.metric(),
            method=self.method,
        )

    def run(self, trials: Trials, number: int) -> None:
        """Runs ``number`` trials with Optuna."""
        trainer = self.build_trainer()
        steps = self.settings.steps(len(trainer.train_dataset))  # type: ignore[arg-type]
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

    def retrain(self, values: dict[str, Any]) -> Metric:
        """Trains on all training images, and saves the adapter. Returns its test scores."""
        torch.manual_seed(self.args.seed)
        vpt = self.build_model(values)
        rates = {name: values[name] for name in ("learning_rate", "head_learning_rate")}
        method = replace(self.method, **rates)
        trainer = RecipeTrainer(
            vpt,
            self.arguments(eval_strategy="no"),
            train_dataset=self.task.for_training(self.task.splits["train"]),
            optimizer_cls_and_kwargs=(
                torch.optim.AdamW,
                {"params": method.parameter_groups(vpt, values["weight_decay"])},
            ),
            metric=self.task.metric(),
            title="Best",
        )
        trainer.train()
        test = self.task.splits["test"]
        trainer.evaluate(self.task.for_testing(test), metric_key_prefix="test")
        vpt.save_pretrained(self.args.output, image_processor=self.task.processor, **self.card_details(trainer, values))
        return trainer.metric

    def card_details(self, trainer: RecipeTrainer, values: dict[str, Any]) -> dict[str, Any]:
        """What the card says besides the adapter's config."""
        name = "mean IoU" if self.task.kind == "segmentation" else "accuracy"
        settings = dataclasses.asdict(self.settings)
        shown = ("epochs", "batch_size", "precision")
        return {
            "metrics": {f"{name}, % of {len(self.task.splits['test'])} test images": trainer.metric.scores.main},
            "hyperparameters": {
                "method": self.args.method,
                **{key.replace("_", " "): value for key, value in values.items()},
                **{key.replace("_", " "): settings[key] for key in shown},
                "min crop": self.args.min_crop,
                "flip": self.args.flip,
                "seed": self.args.seed,
            },
            "training_data": self.task.training_data,
        }
