"""The search with Ray Tune, on one machine or a cluster.

Ray copies the backbone and the settings to the other machines. vpt-peft with its extra ``train`` must be installed
there, and image folders and the datasets cache must be on a shared file system. This is a random search without
pruning, and cannot be continued after an interruption.
"""

from __future__ import annotations

from typing import Any

import ray  # optional dependency
from ray import tune
from ray.tune.search import BasicVariantGenerator

from ..errors import RecipeError
from .space import Search, objective
from .trials import best_of

LOCAL = "local"


def search_on_ray(search: Search) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the trials. Returns them in the format of :meth:`Trials.summaries`, and the best one.

    Raises:
        RecipeError: no trial was completed.
    """
    address = None if search.args.ray == LOCAL else search.args.ray
    try:
        ray.init(address, log_to_driver=False)
        return _run(search)
    except ConnectionError as error:
        raise RecipeError(f"--ray must be the address of a Ray cluster, got '{search.args.ray}': {error}") from error
    finally:
        ray.shutdown()


def space(search: Search) -> dict[str, Any]:
    """The search space for Ray."""
    return {
        **{name: tune.loguniform(*bounds) for name, bounds in search.rates.items()},
        "num_tokens": tune.lograndint(1, search.args.most_tokens + 1),
        **({"depth": tune.randint(1, search.layers + 1)} if search.searches_depth else {}),
    }


def _run(search: Search) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    args = search.args
    try:
        result: Any = search.build_trainer().hyperparameter_search(
            lambda _: space(search),
            compute_objective=objective,
            n_trials=args.trials,
            direction="maximize",
            backend="ray",
            resources_per_trial={"cpu": args.cpus, "gpu": args.gpus},
            search_alg=BasicVariantGenerator(random_state=args.seed),
            raise_on_failed_trial=False,
        )
    except AttributeError as error:
        if error.obj is not None:
            raise
        raise RecipeError(  # transformers reads the result of the best trial, which is None
            f"None of {args.trials} trials was completed. Ray has printed their errors."
        ) from error
    trials = [
        {
            "number": number,
            "state": "complete" if trial.status == "TERMINATED" else "fail",
            "params": trial.config,
            "accuracy": trial.last_result.get("objective"),  # the name under which Trainer reports it
        }
        for number, trial in enumerate(result.run_summary.trials)
    ]
    return trials, best_of(trials)
