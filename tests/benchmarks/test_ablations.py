"""The benchmark of ablations, at a minimal size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablations
import pytest
from PIL import Image

Bench = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def bench(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Bench:
    """Runs the benchmark for one epoch on the tiny checkpoint. Returns the runs in the output."""
    colors = image_folder("colors", number=10)

    def run(*args: object) -> list[dict[str, Any]]:
        command = ["--model", checkpoint, "--data", colors, "--epochs", 1, "--output", tmp_path / "results.json", *args]
        ablations.main(list(map(str, command)))
        return json.loads((tmp_path / "results.json").read_text())  # type: ignore[no-any-return]

    return run


def rows(text: str) -> list[list[str]]:
    """The cells of a printed table, without its header."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_each_ablation_changes_one_thing() -> None:
    points = list(ablations.variants(12))
    for name, base in ablations.BASES.items():
        for ablation in (f"Length, {name}", f"First layers, {name}", f"Last layers, {name}"):
            methods = [point.method for point in points if point.ablation == ablation]
            assert base in methods and len(set(map(str, methods))) == len(methods) > 3
    first = [point.method.config for point in points if point.ablation == "First layers, VPT-Deep"]
    last = [point.method.config for point in points if point.ablation == "Last layers, VPT-Deep"]
    assert [config.layers_to_transform for config in first if config] == [
        (*range(3),), (*range(6),), (*range(9),), None
    ]  # fmt: skip
    assert last[0] and last[0].layers_to_transform == (9, 10, 11)


def test_the_table_and_the_picture_show_each_point(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plots" / "ablations.png"
    runs = bench("--ablations", "Location", "Pooling", "--seeds", 0, 1, "--plot", picture, "--image-size", 32)
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table] == [
        "prepend", "pixel", "add", "add-shared", "border", "channel", "default", "image", "prompt", "global"
    ]  # fmt: skip
    assert all(row[-1] == "2" and "±" in row[2] for row in table)
    assert len(runs) == 2 * 9, "VPT-Deep itself is in both ablations, but trained once a seed"
    assert {run["location"] for run in runs} == {"prepend", "pixel", "add", "add-shared", "border", "channel"}
    sizes = {run["location"]: run["image_size"] for run in runs}
    assert sizes["border"] == 32 - 2 * ablations.BORDER and sizes["prepend"] == 32
    with Image.open(picture) as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20) or ()) > 10


def test_a_report_trains_nothing_and_names_what_is_missing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("--ablations", "Sharing")
    trained = capsys.readouterr().out
    monkeypatch.setattr(ablations, "tune", None)
    bench("--ablations", "Sharing", "--report")
    assert capsys.readouterr().out == trained
    bench("--ablations", "Sharing", "--resume")
    with pytest.raises(SystemExit, match="contains none of the requested runs"):
        bench("--ablations", "Kind", "--seeds", 7, "--report")
    with pytest.raises(SystemExit):
        bench("--ablations", "Kind")
    assert "Add --resume to continue it" in capsys.readouterr().err


def test_tokens_of_training_images_are_an_initialisation(bench: Bench) -> None:
    runs = bench("--ablations", "Initialisation")
    assert {run["init"] for run in runs} == {"uniform", "normal", "sample", "kmeans", "mean"}
    assert all(0 <= run["accuracy"] <= 100 and run["num_tokens"] == 10 for run in runs)
