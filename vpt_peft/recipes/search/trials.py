"""The trials of a search, stored in an SQLite file by Optuna."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from ..errors import RecipeError
from ..training.trainer import check_same_settings

ERROR, REPEATS = "error", "repeats"  # user attributes of trials
MIN_TRIALS = 10  # with fewer, importance is mostly noise


class Trials:
    """The trials in an SQLite file.

    ``space.SweepTrainer`` stores the error of a failed trial. Trials that failed without an error were interrupted, and
    so were those in state "running", since only one process searches at a time. Interrupted trials are repeated.

    Args:
        file: may exist already.
        name: model and dataset.
        settings: shared by all trials.

    Raises:
        RecipeError: the trials in the file have other settings.
    """

    def __init__(self, file: Path, name: str, settings: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.study_kwargs: dict[str, Any] = {"storage": f"sqlite:///{file}", "study_name": name, "load_if_exists": True}
        self.study = optuna.create_study(**self.study_kwargs, direction="maximize")
        current = json.loads(json.dumps(settings))
        saved = self.study.user_attrs.get("settings", current)
        check_same_settings(f"The trials in {file}", saved, current)
        self.study.set_user_attr("settings", current)

    def all(self) -> list[FrozenTrial]:
        """All trials in the file."""
        return self.study.get_trials()

    def finished(self) -> list[FrozenTrial]:
        """Trials that are complete, pruned, or failed with an error."""
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        return [trial for trial in self.all() if trial.state in finished or ERROR in trial.user_attrs]

    def repeat_interrupted(self) -> None:
        """Enqueues the hyperparameters of interrupted trials."""
        for trial in self.all():
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
        repeated = {trial.user_attrs.get(REPEATS) for trial in self.all()}
        for trial in self.all():
            interrupted = trial.state == TrialState.FAIL and ERROR not in trial.user_attrs
            if interrupted and trial.params and trial.number not in repeated:
                self.study.enqueue_trial(trial.params, user_attrs={REPEATS: trial.number})

    def best(self) -> dict[str, Any]:
        """The complete trial with the highest accuracy, as in :meth:`summaries`.

        Raises:
            RecipeError: no trial is complete.
        """
        return best_of(self.summaries())

    def summaries(self) -> list[dict[str, Any]]:
        """``number``, ``state``, ``params`` and ``accuracy`` (pruned: the last one) of each finished trial."""
        return [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "params": trial.params,
                "accuracy": trial.value if trial.state == TrialState.COMPLETE else _last(trial),
                **({ERROR: trial.user_attrs[ERROR]} if ERROR in trial.user_attrs else {}),
            }
            for trial in self.finished()
        ]


def _last(trial: FrozenTrial) -> float | None:
    return trial.intermediate_values[trial.last_step] if trial.last_step is not None else None


def importances(trials: Sequence[Mapping[str, Any]], log_scales: Sequence[str]) -> dict[str, float]:
    """How much of the differences in accuracy each hyperparameter explains, from 0 to 1, the largest first.

    By functional ANOVA on the complete trials (Hutter et al., An Efficient Approach for Assessing Hyperparameter
    Importance, ICML 2014), within the range of their values.

    Args:
        trials: in the format of :meth:`Trials.summaries`.
        log_scales: hyperparameters that were drawn log-uniformly.

    Returns:
        An empty dict if there are fewer than :data:`MIN_TRIALS`, or they have the same accuracy.
    """
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if len(complete) < MIN_TRIALS or len({trial["accuracy"] for trial in complete}) < 2:
        return {}
    distributions: dict[str, Any] = {}
    for name in complete[0]["params"]:
        values = [trial["params"][name] for trial in complete]
        kind: Any = IntDistribution if all(isinstance(value, int) for value in values) else FloatDistribution
        distributions[name] = kind(min(values), max(values), log=name in log_scales)
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        optuna.create_trial(params=trial["params"], distributions=distributions, value=trial["accuracy"])
        for trial in complete
    )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(share) for name, share in found.items()}


def best_of(trials: Sequence[Mapping[str, Any]]) -> Any:
    """The complete trial with the highest accuracy, of trials in the format of :meth:`Trials.summaries`.

    Raises:
        RecipeError: no trial is complete.
    """
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        errors = [trial[ERROR] for trial in trials if ERROR in trial]
        raise RecipeError(
            f"None of {len(trials)} trials was completed. Errors: {'; '.join(dict.fromkeys(errors)) or 'none'}."
        )
    return max(complete, key=lambda trial: trial["accuracy"])
