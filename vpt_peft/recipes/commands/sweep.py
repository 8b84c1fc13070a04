"""``vpt-peft sweep``: searches learning rates, weight decay, prompt length and depth, by Optuna or Ray Tune.

As in the paper, trials train on 80 % of the training images and are evaluated on the other 20 %; the best setting is
retrained on all of them and tested once. Bad trials are pruned, failed ones are ignored. Optuna's trials are stored in
a file, so that the same command continues an interrupted search, or adds trials up to a larger ``--trials``. If there
are enough, it only retrains.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import optuna

from ..report import plots
from ..runtime import silence_transformers
from ..search.space import Search
from ..search.trials import Trials, importances
from ..training.task import Task, set_defaults
from .train import check_writable, settings_of

LOG_SCALES = ("learning_rate", "head_learning_rate", "weight_decay", "num_tokens")
SHARED_SETTINGS = (
    "method", "epochs", "batch_size", "min_crop", "flip", "most_tokens", "seed", "image_column", "label_column",
    "image_size", "max_train_samples",
)  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    silence_transformers()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    args.task = "classification"
    set_defaults(args)
    settings = settings_of(args)
    check_writable(args.output)
    try:
        task = Task.load(args, settings, args.seed)
        search = Search(args, task, settings)
        trials, best = _search_on_ray(search) if args.ray else _search(search)
        scores = search.retrain(best["params"]).scores
    except KeyboardInterrupt:
        again = "the search starts anew" if args.ray else "the same command continues the search"
        raise KeyboardInterrupt(f"Interrupted; {again}: {args.command_line}") from None
    report(search, trials, best, scores.main)


def _search(search: Search) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    args, task = search.args, search.task
    shared = {setting: getattr(args, setting) for setting in SHARED_SETTINGS} | task.contents
    trials = Trials(args.output / "trials.db", task.name, shared)
    missing = args.trials - len(trials.finished())
    if missing > 0:
        trials.repeat_interrupted()
        search.run(trials, missing)
    return trials.summaries(), trials.best()


def _search_on_ray(search: Search) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from ..search.on_ray import search_on_ray  # needs ray

    return search_on_ray(search)


def report(search: Search, trials: list[dict[str, Any]], best: dict[str, Any], test: float) -> None:
    """Saves and prints the results of a search, with the test score of the retrained ``best`` trial."""
    folder, name = search.args.output, search.task.name
    importance = importances(trials, LOG_SCALES)
    plots.search(folder / "sweep.png", trials, LOG_SCALES, importance, f"{len(trials)} trials: {name}")
    results = {
        "task": name,
        "method": search.args.method,
        "trials": trials,
        "importance": importance,
        "best": best["number"],
        "validation": best["accuracy"],
        "test": test,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"Best of {len(trials)} trials: trial {best['number']}, validation accuracy {best['accuracy']:.1f} %.")
    print(f"Retrained on all training images: test accuracy {test:.1f} %. Saved in {folder}.")
