"""``vpt-peft sweep``: the search with Optuna, and with Ray Tune."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial, wraps
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from helpers.plots import assert_is_plot

import vpt_peft
from vpt_peft import AutoVPTModel
from vpt_peft.recipes import search as search_package
from vpt_peft.recipes.command import parse
from vpt_peft.recipes.commands.sweep import LOG_SCALES
from vpt_peft.recipes.commands.train import settings_of
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report import plots
from vpt_peft.recipes.report.metrics import Metric
from vpt_peft.recipes.search import space
from vpt_peft.recipes.search.trials import Trials, importances
from vpt_peft.recipes.training.methods import Method
from vpt_peft.recipes.training.task import Task, set_defaults

Run = Callable[..., Path]


@pytest.fixture
def options(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    """Options for a search with a tiny ViT on colored images."""
    data = image_folder("colors", "red green", number=10, splits=("train", "test"))
    return ["--model", str(checkpoint), "--data", str(data), "--epochs", "1", "--output", str(tmp_path / "out"),
            "--most-tokens", "4", "--method", "vpt-deep"]  # fmt: skip


@pytest.fixture
def run(options: list[str], command: Callable[..., Any], tmp_path: Path) -> Run:
    """Runs a search. Returns the output folder, with what was printed."""

    def start(trials: int, *more: str, fails: str | None = None) -> Path:
        done = command("sweep", *options, "--trials", trials, *more)
        assert (done.code == 0) == (fails is None) and (fails or "") in done.err, done.err
        return tmp_path / "out"

    return start


@pytest.fixture
def search(options: list[str], tmp_path: Path) -> space.Search:
    """A search before it is run."""
    args = parse(["sweep", *options])
    args.task = "classification"
    set_defaults(args)
    settings = settings_of(args)
    return space.Search(args, Task.load(args, settings, 0), settings)


def returning(values: Any) -> Callable[..., dict[str, float]]:
    """A metric that returns these accuracies one after the other, at the end of each evaluation."""

    def call(self: Any, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        if not compute_result:
            return {}
        accuracy = next(values)
        self.scores = type("Fixed", (), {"main": accuracy})()
        return {"accuracy": accuracy}

    return call


def states(folder: Path) -> list[str]:
    """States of the trials in the file."""
    with closing(sqlite3.connect(folder / "trials.db")) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM trials ORDER BY number")]


def params(folder: Path) -> list[dict[str, Any]]:
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'trials.db'}")
    return [trial.params for trial in study.trials]


def raising(function: Callable[..., Any], call: int, error: BaseException) -> Callable[..., Any]:
    """A function of which one call raises an error."""
    calls = 0

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*args, **kwargs)

    return called


# -- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rendered_plots")
@pytest.mark.heavy
def test_search_continues_up_to_the_requested_trials_and_then_only_retrains(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(1)
    assert len(states(folder)) == 1
    run(3)
    assert len(states(folder)) == 3
    assert len({str(values) for values in params(folder)}) == 3, "the same values are not drawn again"

    assert_is_plot(folder / "sweep.png")
    results = json.loads((folder / "results.json").read_text())
    assert [trial["number"] for trial in results["trials"]] == [0, 1, 2]
    config = json.loads((folder / "adapter_config.json").read_text())
    best = results["trials"][results["best"]]["params"]
    assert config["num_tokens"] == best["num_tokens"] and len(config["layers_to_transform"]) == best["depth"]
    assert AutoVPTModel.from_pretrained(folder).config.id2label == {0: "green", 1: "red"}
    assert "| accuracy, % of 20 test images |" in (folder / "README.md").read_text()

    adapter = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(space.Search, "run", None)
    run(3)
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter


def made_up_trials(number: int) -> list[dict[str, Any]]:
    """Trials whose accuracy depends on the learning rate, a little on the depth, and not on the prompt length."""
    rates = [10 ** (-4 + 2 * index / number) for index in range(number)]
    params = [
        {"num_tokens": 1 + 7 * index % 50, "depth": 1 + 5 * index % 6, "learning_rate": rate}
        for index, rate in enumerate(rates)
    ]
    accuracies = [90 + 10 * math.log10(values["learning_rate"]) + 0.5 * values["depth"] for values in params]
    return [
        {"number": index, "state": "complete", "params": values, "accuracy": accuracy}
        for index, (values, accuracy) in enumerate(zip(params, accuracies, strict=True))
    ]


def test_the_importance_of_hyperparameters_is_their_share_of_the_variance() -> None:
    found = importances(made_up_trials(30), LOG_SCALES)
    assert list(found)[:2] == ["learning_rate", "depth"] and found["learning_rate"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    assert importances(made_up_trials(9), LOG_SCALES) == {}, "too few"
    equal = [{**trial, "accuracy": 50.0} for trial in made_up_trials(30)]
    pruned = [{**trial, "state": "pruned"} for trial in made_up_trials(30)]
    assert importances(equal, LOG_SCALES) == importances(pruned, LOG_SCALES) == {}


@pytest.mark.usefixtures("rendered_plots")
def test_the_picture_of_a_search_has_the_importance_of_hyperparameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    trials = made_up_trials(30)
    plots.search(tmp_path / "sweep.png", trials, LOG_SCALES, {"depth": 0.1, "learning_rate": 0.9}, "30 trials")
    plots.search(tmp_path / "few.png", trials[:3], LOG_SCALES, {}, "3 trials")
    assert_is_plot(tmp_path / "sweep.png")
    labels = [axes.get_xlabel() for axes in drawn[0].axes]
    assert labels == ["trial", "num tokens", "depth", "learning rate", "importance: % of the variance explained"]
    assert [text.get_text() for text in drawn[0].axes[-1].texts] == ["depth, 10 %", "learning rate, 90 %"]
    assert [axes.get_xlabel() for axes in drawn[1].axes] == labels[:-1]


@pytest.mark.heavy
def test_interrupted_trial_is_repeated(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(Metric, "__call__", raising(Metric.__call__, 2, KeyboardInterrupt()))
        run(3, fails="Interrupted; the same command continues the search: vpt-peft sweep --model")
    assert states(folder) == ["COMPLETE", "FAIL"]

    run(3)

    assert sorted(states(folder)) == ["COMPLETE"] * 3 + ["FAIL"]
    assert params(folder)[1] == params(folder)[2]


def test_trial_of_a_killed_process_is_repeated(run: Run) -> None:
    folder = run(1)
    with closing(sqlite3.connect(folder / "trials.db")) as connection:
        connection.execute("UPDATE trials SET state = 'RUNNING'")
        connection.commit()
    run(1)
    assert states(folder) == ["FAIL", "COMPLETE"]
    assert params(folder)[0] == params(folder)[1]


def test_failed_trial_does_not_stop_the_search(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Metric, "__call__", raising(Metric.__call__, 1, RuntimeError("out of memory")))
        folder = run(2)
    assert states(folder) == ["FAIL", "COMPLETE"]
    assert json.loads((folder / "results.json").read_text())["trials"][0]["error"] == "RuntimeError: out of memory"
    run(2)
    assert len(states(folder)) == 2, "failed trials count"


def test_search_without_a_complete_trial_exits_with_the_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, prediction: Any, compute_result: bool = True) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Metric, "__call__", fail)
    run(2, fails="None of 2 trials was completed. Errors: RuntimeError: out of memory")


def test_trials_use_a_validation_split_and_only_the_best_setting_is_tested(
    run: Run, used_rows: list[tuple[str, set[bytes]]]
) -> None:
    run(2)
    assert [(purpose, len(images)) for purpose, images in used_rows] == [
        ("for_training", 16), ("for_testing", 4),  # trials: training and validation
        ("for_training", 20), ("for_testing", 20),  # best setting: all training images, and the test images
    ]  # fmt: skip
    training, validation, retraining, _ = (images for _, images in used_rows)
    assert not training & validation and training | validation == retraining


@pytest.mark.heavy
def test_trial_below_the_median_is_pruned(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three epochs of four good trials, one of a bad trial, and the test.
    accuracies = iter([90.0] * 3 * 4 + [10.0] + [80.0])
    monkeypatch.setattr(Metric, "__call__", returning(accuracies))
    folder = run(5, "--epochs", "3")
    assert states(folder) == ["COMPLETE"] * 4 + ["PRUNED"]
    assert json.loads((folder / "results.json").read_text())["test"] == 80.0


def test_search_with_only_pruned_trials_exits_with_a_message(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = optuna.pruners.ThresholdPruner(lower=101)
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **kwargs: pruner)
    run(2, fails="None of 2 trials was completed")
    assert states(tmp_path / "out") == ["PRUNED", "PRUNED"]


def test_search_with_changed_settings_is_an_error(run: Run) -> None:
    run(1)
    run(2, "--seed", "1", fails="had seed 0, not 1")
    run(2, "--label-column", "label", fails="had label_column None, not label")
    run(2, "--method", "vpt-prefix", fails="had method vpt-deep, not vpt-prefix")


def test_search_on_a_changed_folder_is_an_error(run: Run, tmp_path: Path) -> None:
    run(1)
    (tmp_path / "colors/train/red/0.png").unlink()
    run(2, fails="had train images 20, not 19")


class FakeRay(ModuleType):
    """A fake of the parts of Ray that the search and transformers use, in this process.

    A distribution is a list of the values that trials get. Tests that trials get Ray's values, and Ray their results.
    """

    def __init__(self) -> None:
        super().__init__("ray")
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec("ray", None)
        self.tune = self
        self.BasicVariantGenerator = lambda random_state: random_state
        self.CLIReporter = SimpleNamespace
        self.settings: dict[str, Any] = {}
        self.reported: list[float] = []

    def init(self, address: str | None, log_to_driver: bool) -> None:
        self.address = address
        if address == "nowhere":
            raise ConnectionError("nobody is there")

    def shutdown(self) -> None: ...

    def loguniform(self, low: float, high: float) -> list[Any]:
        return [low, high]

    def lograndint(self, low: int, end: int) -> list[int]:
        return [low, end - 1]

    def randint(self, low: int, end: int) -> list[int]:
        return [end - 1, low]

    def get_checkpoint(self) -> None:
        return None

    def get_context(self) -> Any:
        return SimpleNamespace(get_trial_id=lambda: "trial")

    def with_parameters(self, function: Callable[..., Any], **parameters: Any) -> Callable[..., Any]:
        return partial(function, **parameters)

    def report(self, metrics: dict[str, float], checkpoint: Any = None) -> None:
        self.reported.append(metrics["objective"])

    def run(
        self, trainable: Callable[..., Any], config: dict[str, list[Any]], num_samples: int, **settings: Any
    ) -> Any:
        self.settings = settings
        trials = []
        for number in range(num_samples):
            trial = {name: choices[number] for name, choices in config.items()}
            before, status = len(self.reported), "TERMINATED"
            try:
                trainable(dict(trial))
            except OSError:
                status = "ERROR"
            last = {"objective": self.reported[-1]} if len(self.reported) > before else {}
            trials.append(SimpleNamespace(trial_id=str(number), status=status, last_result=last, config=trial))
        reported = [trial for trial in trials if trial.last_result]
        best = max(reported, key=lambda trial: trial.last_result["objective"]) if reported else None
        return SimpleNamespace(trials=trials, get_best_trial=lambda **_: best)


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    fake = FakeRay()
    for name in ("ray", "ray.tune", "ray.tune.search"):
        monkeypatch.setitem(sys.modules, name, fake)
    yield fake
    sys.modules.pop("vpt_peft.recipes.search.on_ray", None)  # which has imported the fake
    vars(search_package).pop("on_ray", None)


def results_of_ray(folder: Path) -> dict[str, Any]:
    """The results of a search of two trials, of which the best one was retrained and saved."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert [trial["number"] for trial in results["trials"]] == [0, 1]
    best = results["trials"][results["best"]]["params"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["num_tokens"], len(config["layers_to_transform"])) == (best["num_tokens"], best["depth"])
    assert (folder / "sweep.png").is_file()
    return results


def groups_of(used: list[Any]) -> Callable[..., Any]:
    """``Method.parameter_groups`` that notes prompt length, depth and rates."""
    groups = Method.parameter_groups

    def noting(self: Method, model: Any, weight_decay: float) -> Any:
        config = model.active_config
        rates = self.learning_rate, self.head_learning_rate, weight_decay
        used.append((config.num_tokens, len(config.layers_to_transform), *rates))
        return groups(self, model, weight_decay)

    return noting


def test_ray_trials_use_the_drawn_hyperparameters_and_report_their_accuracy(
    fake_ray: FakeRay, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Metric, "__call__", returning(iter([40.0, 60.0, 50.0])))
    used: list[Any] = []
    monkeypatch.setattr(Method, "parameter_groups", groups_of(used))
    folder = run(2, "--ray", "auto", "--cpus", "2", "--gpus", "0.5", "--seed", "3")

    assert used[:2] == [
        (1, 2, *map(pytest.approx, (3e-4, 1e-3, 1e-4))),
        (4, 1, *map(pytest.approx, (3e-2, 1e-1, 1e-1))),
    ]
    assert used[2] == used[1], "the best is retrained"
    assert fake_ray.reported == [40.0, 60.0] and fake_ray.address == "auto"
    assert fake_ray.settings["resources_per_trial"] == {"cpu": 2.0, "gpu": 0.5}
    assert fake_ray.settings["search_alg"] == 3
    results = results_of_ray(folder)
    assert (results["best"], results["validation"], results["test"]) == (1, 60.0, 50.0)


def test_failed_ray_trial_is_ignored(fake_ray: FakeRay, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Metric, "__call__", raising(Metric.__call__, 1, OSError("no space left")))
    results = results_of_ray(run(2, "--ray", "local"))
    assert fake_ray.address is None
    assert [trial["state"] for trial in results["trials"]] == ["fail", "complete"] and results["best"] == 1


def test_ray_search_without_a_complete_trial_or_a_cluster_exits_with_a_message(
    fake_ray: FakeRay, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, prediction: Any, compute_result: bool = True) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(Metric, "__call__", fail)
    run(2, "--ray", "local", fails="None of 2 trials was completed")
    run(2, "--ray", "nowhere", fails="--ray must be the address of a Ray cluster, got 'nowhere': nobody is there")


def test_search_on_ray_without_ray_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    run(1, "--ray", "auto", fails="this command needs the package ray: pip install 'ray[tune]'")


@pytest.mark.heavy
def test_search_runs_on_real_ray(options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    root = str(Path(str(vpt_peft.__file__)).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "vpt_peft", "sweep", *map(str, options), "--trials", "2", "--ray", "local"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(trial["state"] == "complete" for trial in results_of_ray(tmp_path / "out")["trials"])


def test_trials_do_not_change_the_backbone(search: space.Search, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in search.backbone.state_dict().items()}
    trials = Trials(tmp_path / "trials.db", "colors", {})
    search.run(trials, 2)
    vpt = search.model_init({"num_tokens": 3, "depth": 1, "learning_rate": 1e-3})  # as from Ray
    assert (vpt.active_config.num_tokens, vpt.active_config.layers_to_transform) == (3, (0,))
    search.vpt.unload()  # type: ignore[union-attr]
    after = search.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trials_use_the_drawn_hyperparameters_within_a_factor_of_ten(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    monkeypatch.setattr(Method, "parameter_groups", groups_of(used))
    drawn = params(run(2))
    names = ("num_tokens", "depth", "learning_rate", "head_learning_rate", "weight_decay")
    assert used[:2] == [tuple(trial[name] for name in names) for trial in drawn]
    assert all(3e-4 <= trial["learning_rate"] <= 3e-2 for trial in drawn)


@pytest.mark.parametrize("method", ["vpt-prefix-bias", "vpt-shallow"])
def test_other_methods_are_searched_too(method: str, run: Run) -> None:
    folder = run(1, "--method", method)
    config = json.loads((folder / "adapter_config.json").read_text())
    (values,) = params(folder)
    assert (config["kind"], config["deep"]) == (("token", False) if method == "vpt-shallow" else ("prefix", True))
    assert ("depth" in values) == (method != "vpt-shallow")
    assert f"| method | {method} |" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("few_digits")
def test_search_uses_digits_by_default(command: Callable[..., Any], tmp_path: Path) -> None:
    done = command("sweep", "--epochs", 1, "--trials", 1, "--output", tmp_path / "digits")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "digits/results.json").read_text())["task"] == "small ViT, handwritten digits 5 to 9"


def test_trials_with_changed_settings_are_an_error(tmp_path: Path) -> None:
    Trials(tmp_path / "trials.db", "pets", {"epochs": 3, "flip": True})
    Trials(tmp_path / "trials.db", "pets", {"epochs": 3, "flip": True})
    with pytest.raises(RecipeError, match=r"had epochs 3, not 4\. Use the same settings"):
        Trials(tmp_path / "trials.db", "pets", {"epochs": 4, "flip": True})
