"""The search of ``sweep.py`` with Ray Tune, on one machine or a cluster.

    pip install 'ray[tune]'
    python examples/sweep_on_ray.py                                   # handwritten digits, on this machine
    python examples/sweep_on_ray.py --address auto --gpus 1 --model google/vit-base-patch16-224-in21k --data my-images

Ray brings the scripts, the backbone and the settings to the other machines; vpt-peft with its extra ``examples`` must
be installed there, and image folders and the cache of data sets be on a file system that all machines see. Ray draws at
random and prunes nothing; to go on where a search stopped, use ``sweep.py``.
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
from training import be_quiet

from vpt_peft import VPTError


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked and completed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    sweep.add_search_options(parser)
    add = parser.add_argument
    add("--address", help='of the cluster, "auto" on a machine of it (default: start Ray on this machine)')
    add("--cpus", type=float, default=1, help="for each trial (default: %(default)s)")
    add("--gpus", type=float, default=0, help="for each trial; 0.5 lets two share one (default: %(default)s)")
    return sweep.complete_search(parser, parser.parse_args(argv))


def space(search: sweep.Search) -> dict[str, Any]:
    """What Ray draws from: the space of ``sweep.py``."""
    return {
        **{name: tune.loguniform(*ends) for name, ends in sweep.RATES.items()},
        "num_tokens": tune.lograndint(1, search.args.most_tokens + 1),
        "depth": tune.randint(1, search.layers + 1),
    }


def run(search: sweep.Search) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs the trials. Returns them as ``sweep.py`` writes them down, and the best of them.

    Raises:
        DataError: none came to its end.
    """
    args = search.args
    try:
        found = search.tuner().hyperparameter_search(
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
        raise DataError(  # transformers asks None, the best of no trials, what it reached
            f"At least one trial must come to its end, but of {args.trials} none did. Ray has printed their errors."
        ) from error
    trials = [
        {
            "number": number,
            "state": "complete" if trial.status == "TERMINATED" else "fail",
            "params": trial.config,
            "accuracy": trial.last_result.get("objective"),  # Trainer's name for what it reports to Ray
        }
        for number, trial in enumerate(found.run_summary.trials)
    ]
    return trials, best_of(trials)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the example."""
    args = arguments(argv)
    be_quiet()
    try:
        task = Task.load(args, args.seed)
        search = sweep.Search(args, task)
        # Trials import these scripts, wherever Ray runs them.
        ray.init(args.address, runtime_env={"working_dir": str(Path(__file__).parent)}, log_to_driver=False)
        trials, best = run(search)
        reached = search.retrain(best["params"])
    except (DataError, VPTError, OSError) as error:
        sys.exit(str(error))
    finally:
        ray.shutdown()
    sweep.report(args, task.name, trials, best, reached)


if __name__ == "__main__":
    main()
