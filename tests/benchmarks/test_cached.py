"""The benchmarks of cached features, at a minimal size."""

from __future__ import annotations

import json
from pathlib import Path

import cached
import last_layers
import pytest


def test_steps_and_sizes_of_each_way_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cached.json"
    cached.main([
        "--backbone", "tiny-vit", "--batch", "2", "--rounds", "2", "--repeats", "1", "--output", str(file)
    ])  # fmt: skip
    report = json.loads(file.read_text())["reports"][0]
    assert all(len(times) == 2 and min(times) > 0 for times in report["seconds"].values())
    assert set(report["seconds"]) == set(cached.VARIANTS) and set(report["ratios"]) == set(cached.RATIOS)
    size = report["caches"]["quarter cached"]["gigabytes_per_1000_images"]
    assert 17 * 32 * 2 / 1e6 < size < 17 * 32 * 2 / 1e6 + 2**14 / 4 / 1e6
    assert "| tiny-vit" in capsys.readouterr().out


def test_each_number_of_last_layers_trains_on_one_cache_and_finished_runs_are_kept(
    checkpoint: Path, image_folder: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colors = image_folder("colors", number=10)  # type: ignore[operator]
    file, features = tmp_path / "last_layers.json", tmp_path / "features"
    command = [
        "--model", checkpoint, "--data", colors, "--image-size", 24, "--layers", 1, "--epochs", 2, "--features",
        features, "--output", file,
    ]  # fmt: skip
    last_layers.main(list(map(str, command)))
    runs = json.loads(file.read_text())
    assert [(run["method"], run["layers"]) for run in runs] == [("vpt-deep", 1), ("vpt-prefix", 1)]
    assert all(0 <= run["accuracy"] <= 100 for run in runs)
    assert len(list(features.glob("colors/*.safetensors"))) == 1
    before = file.stat().st_mtime_ns
    last_layers.main(list(map(str, command)))
    assert file.stat().st_mtime_ns == before
    assert "| VPT-Prefix | last 1 |" in " ".join(capsys.readouterr().out.split())
