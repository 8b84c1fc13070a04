"""The trials of a search, kept in a file: how many there are, which ones to repeat, which one was best."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from images import DataError
from optuna.trial import FrozenTrial, TrialState
from trainer_tools import check_same_settings

ERROR, REPEATS = "error", "repeats"


class Trials:
    """Trials in an SQLite file.

    Of a trial that ends with an error, ``Tuner`` notes the error; one that fails without a note was interrupted, and so
    was one that still seems to run, as one process at a time searches. Interrupted ones are repeated.

    Args:
        file: of the trials; it may exist already.
        name: what is tuned to what.
        settings: what all trials have in common.

    Raises:
        DataError: the trials in the file had other settings.
    """

    def __init__(self, file: Path, name: str, settings: Mapping[str, Any]) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.arguments = {"storage": f"sqlite:///{file}", "study_name": name, "load_if_exists": True}
        self.study = optuna.create_study(**self.arguments, direction="maximize")
        ours = json.loads(json.dumps(settings))
        theirs = self.study.user_attrs.get("settings", ours)
        check_same_settings(f"The trials in {file}", theirs, ours)
        self.study.set_user_attr("settings", ours)

    def all(self) -> list[FrozenTrial]:
        """All of them, as they are in the file."""
        return self.study.get_trials()

    def ended(self) -> list[FrozenTrial]:
        """Those that came to an end: complete, pruned, or failed with an error."""
        ends = (TrialState.COMPLETE, TrialState.PRUNED)
        return [trial for trial in self.all() if trial.state in ends or ERROR in trial.user_attrs]

    def repeat_interrupted(self) -> None:
        """Puts the values of interrupted trials into the queue."""
        for trial in self.all():
            if trial.state == TrialState.RUNNING:
                self.study.tell(trial.number, state=TrialState.FAIL)
        repeated = {trial.user_attrs.get(REPEATS) for trial in self.all()}
        for trial in self.all():
            interrupted = trial.state == TrialState.FAIL and ERROR not in trial.user_attrs
            if interrupted and trial.params and trial.number not in repeated:
                self.study.enqueue_trial(trial.params, user_attrs={REPEATS: trial.number})

    def best(self) -> dict[str, Any]:
        """The complete trial of the highest accuracy, as in :meth:`summaries`.

        Raises:
            DataError: none is complete.
        """
        return best_of(self.summaries())

    def summaries(self) -> list[dict[str, Any]]:
        """Of each that came to an end: ``number``, ``state``, ``params``, ``accuracy`` (of a pruned one: its last)."""
        return [
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                "params": trial.params,
                "accuracy": trial.value if trial.state == TrialState.COMPLETE else _last(trial),
                **({ERROR: trial.user_attrs[ERROR]} if ERROR in trial.user_attrs else {}),
            }
            for trial in self.ended()
        ]


def _last(trial: FrozenTrial) -> float | None:
    return trial.intermediate_values[trial.last_step] if trial.last_step is not None else None


def best_of(trials: Sequence[Mapping[str, Any]]) -> Any:
    """The complete trial of the highest accuracy, of trials as :meth:`Trials.summaries` gives them.

    Raises:
        DataError: none is complete.
    """
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        errors = [trial[ERROR] for trial in trials if ERROR in trial]
        raise DataError(
            f"At least one trial must come to its end, but of {len(trials)} none did. Errors: "
            f"{'; '.join(dict.fromkeys(errors)) or 'none'}."
        )
    return max(complete, key=lambda trial: trial["accuracy"])
