"""The example and the benchmark of many tasks on one backbone, in a setting of seconds."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK_EXAMPLE = ["--epochs", "1", "--pretraining-epochs", "1", "--images", "6"]
QUICK_BENCHMARK = [
    "--backbone", "tiny-vit", "--batch", "4", "--tasks", "1", "2", "4", "--tokens", "3", "5",
    "--adapters", "5", "--runs", "2", "--warmup", "0", "--output", "results/many.json",
]  # fmt: skip
TASKS = ("digit", "parity", "loop", "size")


def run(script: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script as a user would, in ``folder`` and without a network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The benchmark's run, and the report that it wrote."""
    folder = tmp_path_factory.mktemp("benchmark")
    done = run("benchmarks/many_tasks.py", QUICK_BENCHMARK, folder)
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "results/many.json").read_text())


@pytest.mark.heavy
def test_the_benchmark_has_a_row_for_each_number_of_tasks(benchmark: Any) -> None:
    done, report = benchmark

    assert [row["tasks"] for row in report["batches"]] == [1, 2, 4]
    for row in report["batches"]:
        assert f"| {row['tasks']} " in done.stdout
        assert set(row["seconds"]) == {"mixed", "apart"}
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["seconds"].values())
        assert row["largest_difference"] < 1e-5


def test_the_benchmark_opens_only_the_files_of_adapters(benchmark: Any) -> None:
    _, report = benchmark

    assert report["loading"]["files_opened"] == {"adapter_config.json": 5, "adapter_model.safetensors": 5}
    assert report["loading"]["own_bytes"] == 4 * (2 * 3 * 32 + 33 * 100)


def test_the_benchmark_measures_switching_among_few_and_many_adapters(benchmark: Any) -> None:
    done, report = benchmark

    few, many = report["switching"]
    assert few["adapters"] == 4 and many["adapters"] > few["adapters"] + 5
    assert f"set_adapter among {many['adapters']} adapters" in done.stdout
    assert "load_adapter, p = 50" in done.stdout


def test_the_benchmarks_report_names_no_file_or_folder(benchmark: Any) -> None:
    _, report = benchmark

    assert "output" not in report["settings"]
    assert {"device", "threads", "torch", "transformers", "python"} <= set(report["environment"])
    assert str(ROOT) not in json.dumps(report)


def test_the_benchmark_refuses_more_tasks_than_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["many_tasks.py", "--batch", "4", "--tasks", "8"])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "benchmarks" / "many_tasks.py"), run_name="__main__")
    assert error.value.code == 2
    assert "at most the 4 images of the batch, got 8" in capsys.readouterr().err
