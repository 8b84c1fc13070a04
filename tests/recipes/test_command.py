"""The command line: help, options, options from files, and what happens to errors."""

from __future__ import annotations

import configparser
import importlib
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vpt_peft import __version__
from vpt_peft.recipes.command import COMMANDS, main, parse
from vpt_peft.recipes.commands import train as train_module

REPOSITORY = Path(__file__).parents[2]
Refused = Callable[..., str]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


def test_the_console_script_is_the_command_and_so_is_the_module() -> None:
    setup = configparser.RawConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "vpt-peft" and getattr(importlib.import_module(module), function) is main
    done = run("-m", "vpt_peft", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"vpt-peft {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["train", "--epoch"]])
def test_help_and_wrong_options_load_neither_torch_nor_transformers(arguments: list[str]) -> None:
    code = f"""
import sys
import warnings
from vpt_peft.recipes.command import main
try:
    main({arguments!r})
except SystemExit as exit:
    print({{"torch", "transformers", "datasets", "PIL"}} & set(sys.modules), exit.code)
"""
    last = run("-c", code).stdout.splitlines()[-1]
    assert last == ("set() 2" if "--epoch" in arguments else "set() 0")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed and command.help in printed for name, command in COMMANDS.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epoch", "3"], "unknown argument --epoch, did you mean --epochs?"),
        (["train", "stray"], "unknown argument stray"),
        (["train", "--epochs", "0"], "--epochs: must be a whole number of at least 1, got 0"),
        (["train", "--epochs", "many"], "--epochs: must be a whole number of at least 1, got many"),
        (["train", "--batch-size", "0"], "--batch-size: must be a whole number of at least 1, got 0"),
        (["train", "--min-crop", "0"], "--min-crop: must be above 0 and at most 1, got 0"),
        (["train", "--accumulate", "0"], "--accumulate: must be a whole number of at least 1, got 0"),
        (["train", "--workers", "-1"], "--workers: must be a whole number of at least 0, got -1"),
        (["train", "--learning-rate", "nan"], "--learning-rate: must be a number of at least 0, got nan"),
        (["train", "--head-learning-rate=-1"], "--head-learning-rate: must be a number of at least 0, got -1"),
        (["train", "--max-train-samples", "1"], "must be a whole number of at least 2, got 1"),
        (["train", "--method", "vpt"], "invalid choice: 'vpt'"),
        (["train", "--seeds", "0", "0"], "--seeds must be different and at least 0, got 0 0"),
        (["train", "--data", "images"], "--model and --data must be given together"),
        (["train", "--task", "segmentation", "--batch-size", "1"], "--batch-size must be at least 2 for segmentation"),
        (["train", "--image-size", "8", "8", "8"], "--image-size must be one or two numbers"),
        (["train", "--precision", "fp16", "--device", "cpu"], "--precision fp16 needs an accelerator"),
        (["sweep", "--trials", "0"], "--trials: must be a whole number of at least 1, got 0"),
        (["sweep", "--method", "linear"], "invalid choice: 'linear'"),
        (["predict"], "the following arguments are required: ADAPTER... IMAGE..."),
        (["evaluate", "out"], "the following arguments are required: --data. See vpt-peft evaluate --help."),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    arguments: list[str], message: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_there_is_not_is_told_before_anything_is_done(
    device: str, refused: Refused, tmp_path: Path
) -> None:
    message = refused("train", "--device", device, "--output", tmp_path / "out")
    assert f"--device {device} is not available: torch {torch.__version__} finds cpu only here" in message
    assert "--device must be without a number, got cpu:0" in refused("train", "--device", "cpu:0")
    assert "--device cpu:1 is not available: this machine has 1" in refused("train", "--device", "cpu:1")
    assert "--device must be auto, cpu or an accelerator" in refused("train", "--device", "gpu")
    assert not (tmp_path / "out").exists()


# -- options from a file ----------------------------------------------------------------------------------------------


def config_file(tmp_path: Path, text: str, name: str = "options.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_options_come_from_a_file_and_the_command_line_wins(tmp_path: Path) -> None:
    values = {"epochs": 7, "flip": False, "seeds": [3, 4], "keep_best": True, "learning-rate": 0.5, "report_to": "a",
              "gradient-checkpointing": False, "model": None}  # fmt: skip
    as_json = config_file(tmp_path, json.dumps(values), "options.json")
    as_yaml = config_file(tmp_path, "\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()))
    for file in (as_json, as_yaml):
        args = parse(["train", "--epochs", "2", "--config", file])
        assert (args.epochs, args.flip, args.seeds, args.keep_best) == (2, False, [3, 4], True)
        assert (args.learning_rate, args.report_to, args.gradient_checkpointing) == (0.5, ["a"], False)
        assert args.model is None
    assert parse(["train", "--config", as_yaml]).epochs == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "has the unknown option epoch, did you mean epochs?"),
        ("help: true", "has the unknown option help"),
        ("trials: 3", "has the unknown option trials"),
        ("epochs: none", "--epochs: must be a whole number of at least 1, got none"),
        ("epochs: [1, 2]", "epochs in"),
        ("keep_best: 1", "must be true or false, got 1"),
        ("epochs: true", "must be a value, got True"),
        ("method: vpt", "invalid choice: 'vpt'"),
        ("- epochs", "must map options to values, got list"),
        ("a: b: c", "must be a YAML or JSON file"),
    ],
)
def test_a_file_of_options_is_checked_like_the_command_line(
    text: str, message: str, refused: Refused, tmp_path: Path
) -> None:
    assert message in refused("train", "--config", config_file(tmp_path, text))


def test_a_missing_file_of_options_is_an_error(refused: Refused, tmp_path: Path) -> None:
    assert "cannot be read" in refused("train", "--config", tmp_path / "none.yaml")


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt("Go on with --resume"), 130, "vpt-peft train: Go on with --resume"),
        (KeyboardInterrupt(), 130, "vpt-peft train: Interrupted."),
        (OSError("first line\nsecond line"), 2, "vpt-peft train: error: first line second line"),
        (ModuleNotFoundError("x", name="datasets.x"), 2, "needs the package datasets.x: pip install 'vpt-peft[train]'"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "use a smaller --batch-size"),
    ],
)
def test_errors_that_are_no_bugs_end_in_one_line(
    error: BaseException, code: int, message: str, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: Any) -> None:
        raise error

    monkeypatch.setattr(train_module, "run", fail)
    done = command("train")
    assert done.code == code and message in done.err and len(done.err.splitlines()) == 1


def test_warnings_are_told_in_one_line_and_those_for_developers_not_at_all(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(args: Any) -> None:
        warnings.warn("a remark\nof two lines", UserWarning, stacklevel=1)
        warnings.warn("will change", FutureWarning, stacklevel=1)

    monkeypatch.setattr(train_module, "run", warn)
    done = command("train")
    assert (done.code, done.err) == (0, "vpt-peft train: warning: a remark of two lines\n")


@pytest.mark.parametrize(
    "error", [TypeError("a bug"), RuntimeError("a bug"), ModuleNotFoundError("x", name="vpt_peft.x")]
)
def test_bugs_are_not_hidden(error: Exception, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> None:
        raise error

    monkeypatch.setattr(train_module, "run", fail)
    with pytest.raises(type(error)):
        command("train")


def test_convert_is_a_command_too(refused: Refused, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    message = refused("convert", tmp_path / "broken.pth", "--model", checkpoint, "--output", tmp_path / "out")
    assert message.startswith("vpt-peft convert: error: ") and "broken.pth" in message
    assert "unknown argument --models" in refused("convert", "x.pth", "--models", "m", "--model", "m", "--output", "o")
