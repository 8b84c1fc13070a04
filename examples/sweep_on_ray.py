"""The search of ``sweep.py`` with Ray Tune, on one machine or a cluster.

    pip install 'ray[tune]'
    python examples/sweep_on_ray.py                                   # handwritten digits, one machine
    python examples/sweep_on_ray.py --address auto --gpus 1 --model google/vit-base-patch16-224-in21k --data my-images

Ray copies the scripts, the backbone and the settings to the other machines. vpt-peft with its extra ``examples`` must
be installed there, and image folders and the datasets cache must be on a shared file system. This is a random search
without pruning, and cannot be continued after an interruption; use ``sweep.py`` for that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import sweep
from images import DataError
from ray import tune
from ray.tune.search import BasicVariantGenerator
from sweep_trials import best_of
from trainer_task import Task
from training import silence_transformers

from vpt_peft import VPTError


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    sweep.add_search_options(parser)
    add = parser.add_argument
    add("--address", help='address of the cluster, "auto" on one of its machines (default: start Ray on this machine)')
    add("--cpus", type=float, default=1, help="per trial (default: %(default)s)")
    add("--gpus", type=float, default=0, help="per trial; 0.5 lets two trials share a GPU (default: %(default)s)")
    return sweep.set_search_defaults(parser, parser.parse_args(argv))


def space(search: sweep.Search) -> dict[str, Any]:
    """The search space of ``sweep.py`` for Ray."""
    return {
        **{name: tune.loguniform(*bounds) for name, bounds in sweep.RATES.items()},
        "num_tokens": tune.lograndint(1, search.args.most_tokens + 1),
        "depth": tune.randint(1, search.layers + 1),
    }


def run(search: sweep.Search) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the trials. Returns them in the format of ``sweep.py``, and the best one.

    Raises:
        DataError: no trial was completed.
    """
    args = search.args
    try:
        result = search.build_trainer().hyperparameter_search(
            lambda _: space(search),
            compute_objective=sweep.objective,
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
        raise DataError(  # transformers reads the result of the best trial, which is None
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


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    silence_transformers()
    try:
        task = Task.load(args, args.seed)
        search = sweep.Search(args, task)
        # Trials import these scripts on every machine.
        ray.init(args.address, runtime_env={"working_dir": str(Path(__file__).parent)}, log_to_driver=False)
        trials, best = run(search)
        test_accuracy = search.retrain(best["params"])
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    finally:
        ray.shutdown()
    sweep.report(args, task.name, trials, best, test_accuracy)


if __name__ == "__main__":
    main()
