"""``vpt-peft train`` in two processes of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import vpt_peft

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.heavy
def test_training_runs_in_two_processes_of_torchrun(
    checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = image_folder("colors", "red green blue", splits=("train", "test"))
    options = ["--model", checkpoint, "--data", data, "--epochs", 1, "--batch-size", 4, "--method", "vpt-deep"]
    root = str(Path(str(vpt_peft.__file__)).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "-m", "vpt_peft", "train", *map(str, options), "--output", str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stderr
    assert run.stdout.count("Seed 0: test accuracy") == 1, "only one process prints"
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert sum(map(sum, results["confusion"])) == 15, "each image counts once"
    settings = results["settings"]
    assert (settings["processes"], settings["batch size"], settings["steps"]) == (2, 8, 2)
    assert results["histories"]["0"][0]["step"] == 2 and "accuracy" in results["histories"]["0"][0]
    names = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {name.split(".")[0] for name in names} == {"prompts", "head"}
