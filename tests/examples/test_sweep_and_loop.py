"""The hyperparameter search and the loop with accelerate."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate_loop
import optuna
import pytest
import sweep
import torch
from accelerate.state import AcceleratorState
from helpers.plots import assert_is_plot
from images import DataError
from safetensors.torch import load_file
from sweep_trials import Trials

from vpt_peft import AutoVPTModel, parameter_groups

Run = Callable[..., Path]


@pytest.fixture
def run(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Run:
    """Runs a search with a tiny ViT on colored images. Returns the output folder."""
    data = image_folder("colors", "red green", number=10, splits=("train", "test"))
    command = ["--model", str(checkpoint), "--data", str(data), "--epochs", "1", "--output", str(tmp_path / "out")]

    def start(trials: int, *options: str) -> Path:
        sweep.main([*command, "--trials", str(trials), "--most-tokens", "4", *options])
        return tmp_path / "out"

    return start


@pytest.fixture
def search(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> sweep.Search:
    """A search with a tiny ViT on colored images, before it is run."""
    data = image_folder("colors", number=10)
    args = sweep.arguments(
        ["--model", str(checkpoint), "--data", str(data), "--epochs", "1", "--output", str(tmp_path / "out")]
    )
    return sweep.Search(args, sweep.Task.load(args, 0))


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

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*args, **kwargs)

    return called


# -- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rendered_plots")
def test_search_continues_up_to_the_requested_trials_and_then_only_retrains(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
    monkeypatch.setattr(sweep.Search, "run", None)
    run(3)
    assert (folder / "adapter_model.safetensors").read_bytes() == adapter
    assert "Best of 3 trials: trial" in capsys.readouterr().out


def test_interrupted_trial_is_repeated(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(sweep, "compute_accuracy", raising(sweep.compute_accuracy, 2, KeyboardInterrupt()))
        run(3)
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
        patched.setattr(sweep, "compute_accuracy", raising(sweep.compute_accuracy, 1, RuntimeError("out of memory")))
        folder = run(2)
    assert states(folder) == ["FAIL", "COMPLETE"]
    assert json.loads((folder / "results.json").read_text())["trials"][0]["error"] == "RuntimeError: out of memory"
    run(2)
    assert len(states(folder)) == 2, "failed trials count"


def test_search_without_a_complete_trial_exits_with_the_errors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(prediction: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sweep, "compute_accuracy", fail)
    with pytest.raises(SystemExit, match=r"None of 2 trials was completed\. Errors: RuntimeError: out of memory"):
        run(2)


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


def test_trial_below_the_median_is_pruned(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three epochs of four good trials, one of a bad trial, and the test.
    accuracies = iter([90.0] * 3 * 4 + [10.0] + [80.0])
    monkeypatch.setattr(sweep, "compute_accuracy", lambda prediction: {"accuracy": next(accuracies)})
    folder = run(5, "--epochs", "3")
    assert states(folder) == ["COMPLETE"] * 4 + ["PRUNED"]
    assert json.loads((folder / "results.json").read_text())["test"] == 80.0


def test_search_with_only_pruned_trials_exits_with_a_message(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = optuna.pruners.ThresholdPruner(lower=101)
    monkeypatch.setattr(sweep.optuna.pruners, "MedianPruner", lambda **kwargs: pruner)
    with pytest.raises(SystemExit, match="None of 2 trials was completed"):
        run(2)
    assert states(tmp_path / "out") == ["PRUNED", "PRUNED"]


def test_search_with_changed_settings_is_an_error(run: Run) -> None:
    run(1)
    with pytest.raises(SystemExit, match="had seed 0, not 1"):
        run(2, "--seed", "1")
    with pytest.raises(SystemExit, match="had label_column None, not label"):
        run(2, "--label-column", "label")


def test_search_on_a_changed_folder_is_an_error(run: Run, tmp_path: Path) -> None:
    run(1)
    (tmp_path / "colors/train/red/0.png").unlink()
    with pytest.raises(SystemExit, match="had train images 20, not 19"):
        run(2)


class FakeRay(ModuleType):
    """A fake of the parts of Ray that the example and transformers use, in this process.

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

    def init(self, address: str | None, runtime_env: dict[str, str], log_to_driver: bool) -> None:
        assert (Path(runtime_env["working_dir"]) / "sweep.py").is_file()

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
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    for name in ("ray", "ray.tune", "ray.tune.search"):
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.delitem(sys.modules, "sweep_on_ray", raising=False)
    return fake


@pytest.fixture
def on_ray(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> list[str]:
    """The command line of two trials on colored images."""
    data = image_folder("colors", number=10, splits=("train", "test"))
    return ["--model", str(checkpoint), "--data", str(data), "--epochs", "1", "--trials", "2",
            "--most-tokens", "4", "--output", str(tmp_path / "ray")]  # fmt: skip


def results_of_ray(folder: Path) -> dict[str, Any]:
    """The results of a search of two trials, of which the best one was retrained and saved."""
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert [trial["number"] for trial in results["trials"]] == [0, 1]
    best = results["trials"][results["best"]]["params"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["num_tokens"], len(config["layers_to_transform"])) == (best["num_tokens"], best["depth"])
    assert (folder / "sweep.png").is_file()
    return results


def test_ray_trials_use_the_drawn_hyperparameters_and_report_their_accuracy(
    fake_ray: FakeRay, on_ray: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([40.0, 60.0, 50.0])
    monkeypatch.setattr(sweep, "compute_accuracy", lambda prediction: {"accuracy": next(accuracies)})
    used = []

    def groups(model: Any, *rates: float) -> Any:
        used.append((model.active_config.num_tokens, len(model.active_config.layers_to_transform), *rates))
        return parameter_groups(model, *rates)

    monkeypatch.setattr(sweep, "parameter_groups", groups)
    importlib.import_module("sweep_on_ray").main([*on_ray, "--cpus", "2", "--gpus", "0.5", "--seed", "3"])

    assert used == [(1, 2, 3e-4, 3e-3, 1e-4), (4, 1, 3e-2, 3e-1, 1e-1)]
    assert fake_ray.reported == [40.0, 60.0]
    assert fake_ray.settings["resources_per_trial"] == {"cpu": 2.0, "gpu": 0.5}
    assert fake_ray.settings["search_alg"] == 3
    results = results_of_ray(tmp_path / "ray")
    assert (results["best"], results["validation"], results["test"]) == (1, 60.0, 50.0)


def test_failed_ray_trial_is_ignored(
    fake_ray: FakeRay, on_ray: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "compute_accuracy", raising(sweep.compute_accuracy, 1, OSError("no space left")))
    importlib.import_module("sweep_on_ray").main(on_ray)
    results = results_of_ray(tmp_path / "ray")
    assert [trial["state"] for trial in results["trials"]] == ["fail", "complete"] and results["best"] == 1


def test_ray_search_without_a_complete_trial_exits_with_a_message(
    fake_ray: FakeRay, on_ray: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_prediction: Any) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(sweep, "compute_accuracy", fail)
    with pytest.raises(SystemExit, match="None of 2 trials was completed"):
        importlib.import_module("sweep_on_ray").main(on_ray)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_search_runs_on_real_ray(on_ray: list[str], tmp_path: Path) -> None:
    importlib.import_module("sweep_on_ray").main(on_ray)
    assert all(trial["state"] == "complete" for trial in results_of_ray(tmp_path / "ray")["trials"])


def test_trials_do_not_change_the_backbone(search: sweep.Search, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in search.backbone.state_dict().items()}
    trials = Trials(tmp_path / "trials.db", "colors", {})
    search.run(trials, 2)
    vpt = search.model_init({"num_tokens": 3, "depth": 1, "learning_rate": 1e-3})  # as from Ray
    assert (vpt.active_config.num_tokens, vpt.active_config.layers_to_transform) == (3, (0,))
    search.vpt.unload()  # type: ignore[union-attr]
    after = search.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_trials_use_the_drawn_learning_rates(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def groups(model: Any, *rates: float) -> Any:
        used.append(rates)
        return parameter_groups(model, *rates)

    monkeypatch.setattr(sweep, "parameter_groups", groups)
    drawn = params(run(2))
    names = ("learning_rate", "head_learning_rate", "weight_decay")
    assert used == [tuple(trial[name] for name in names) for trial in drawn]


def test_trials_with_changed_settings_are_an_error(tmp_path: Path) -> None:
    Trials(tmp_path / "trials.db", "pets", {"epochs": 3, "flip": True})
    Trials(tmp_path / "trials.db", "pets", {"epochs": 3, "flip": True})
    with pytest.raises(DataError, match=r"had epochs 3, not 4\. Use the same settings"):
        Trials(tmp_path / "trials.db", "pets", {"epochs": 4, "flip": True})


# -- the loop -------------------------------------------------------------------------------------------------------


@pytest.fixture
def loop(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of the loop with a tiny ViT on colored images."""
    data = image_folder("colors", "red green blue", splits=("train", "test"))

    def arguments(output: str, *options: str) -> list[str]:
        paths = ["--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / output)]
        return [*paths, "--epochs", "4", "--save-every", "2", "--batch-size", "4", *options]

    return arguments


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_resumed_loop_gives_the_same_adapter_as_an_uninterrupted_one(
    loop: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerate_loop.main(loop("whole"))
    assert "on 15 images, with 1 processes" in capsys.readouterr().out
    state = tmp_path / "whole/state-2"
    halfway = load_file(state / "model.safetensors").values()
    assert not any(torch.equal(tensor, weights(tmp_path / "whole")["head.classifier.weight"]) for tensor in halfway)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_loop.main(loop("resumed", "--resume", str(state)))

    assert [path.name for path in (tmp_path / "resumed").glob("state-*")] == ["state-4"], "it continues after epoch 2"
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert json.loads((tmp_path / "whole/preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert "| batch size | 8 |" in (tmp_path / "whole/README.md").read_text()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_loop_state_contains_no_backbone(loop: Callable[..., list[str]], tmp_path: Path) -> None:
    accelerate_loop.main(loop("out"))
    names = load_file(tmp_path / "out/state-4/model.safetensors")
    assert names and all(name.startswith("adapters.") for name in names)


def test_loop_cannot_resume_from_a_folder_without_a_state(
    loop: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        accelerate_loop.main(loop("out", "--resume", str(tmp_path)))
    assert "must be a folder saved by this script" in capsys.readouterr().err


def test_loop_cannot_resume_with_changed_settings(loop: Callable[..., list[str]], tmp_path: Path) -> None:
    accelerate_loop.main(loop("whole"))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=r"state-2 had seed 0, not 1\. Use the same settings"):
        accelerate_loop.main(loop("resumed", "--resume", str(tmp_path / "whole/state-2"), "--seed", "1"))


@pytest.mark.parametrize("option", ["--trials", "--most-tokens"])
def test_search_options_below_one_are_an_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.arguments([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--accumulate", "--save-every"])
def test_loop_options_below_one_are_an_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accelerate_loop.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.usefixtures("few_digits")
def test_search_and_loop_use_digits_by_default(tmp_path: Path) -> None:
    accelerate_loop.main(["--epochs", "1", "--output", str(tmp_path / "both")])
    AcceleratorState._reset_state(reset_partial_state=True)
    sweep.main(["--epochs", "1", "--trials", "1", "--output", str(tmp_path / "both")])
    assert json.loads((tmp_path / "both/results.json").read_text())["task"] == "small ViT, handwritten digits 5 to 9"
