"""The loop with accelerate, started by torchrun and by accelerate launch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import accelerate_loop
import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from safetensors.torch import load_file

import vpt_peft

EXAMPLES = Path(str(accelerate_loop.__file__)).parent
PYTHONPATH = os.pathsep.join([str(EXAMPLES), str(Path(str(vpt_peft.__file__)).parents[1])])
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def options(checkpoint: Path, image_folder: Callable[..., Path]) -> list[str]:
    """Options for one epoch on colored images."""
    data = image_folder("colors", "red green blue", splits=("train", "test"))
    return ["--model", str(checkpoint), "--data", str(data), "--epochs", "1"]


def modules_in(folder: Path) -> set[str]:
    """Names of the top-level modules in a saved adapter."""
    return {name.split(".")[0] for name in load_file(folder / "adapter_model.safetensors")}


def test_the_loop_runs_in_two_processes_of_torchrun(options: list[str], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(EXAMPLES / "accelerate_loop.py"), *options, "--output", str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("on 15 images, with 2 processes") == 1, "only one process prints"
    assert modules_in(tmp_path / "out") == {"prompts", "head"}


def test_loop_runs_under_accelerate_launch(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = [str(EXAMPLES / "accelerate_loop.py"), *options, "--output", str(tmp_path)]
    launch_command(launch_command_parser().parse_args(["--cpu", "--num_processes", "1", *script]))
    assert "on 15 images, with 1 processes" in capfd.readouterr().out
    assert modules_in(tmp_path) == {"prompts", "head"}
