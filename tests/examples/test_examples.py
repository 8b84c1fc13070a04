"""The examples' image sets and training, and the quickstart, in a setting of seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image


import accuracy
import digits
import images
import quickstart
import training

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--epochs", "1"]


def an_image_set(number_a_class: int = 10) -> images.ImageSet:
    labels = torch.arange(3).repeat_interleave(number_a_class)
    pictures = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return images.ImageSet(pictures.to(torch.uint8), labels, ("a", "b", "c"), images.Preprocessing(32))


# -- the quickstart -------------------------------------------------------------------------------------------------


def test_the_quickstart_script_runs_without_a_model_or_data(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *QUICK, "--pretraining-epochs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for title in ("Linear head", "VPT-Shallow", "VPT-Deep"):
        assert f"| {title}" in done.stdout
    assert "identical to the last bit" in done.stdout
    assert "100%" in done.stderr, "progress bars"
    assert (tmp_path / "runs/quickstart/backbone/model.safetensors").is_file()
    assert (tmp_path / "runs/quickstart/vpt-deep/adapter_model.safetensors").is_file()


def test_the_quickstart_tunes_a_swin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(["--backbone", "swin", *QUICK, "--pretraining-epochs", "1", "--output", str(tmp_path / "swin")])
    assert "identical to the last bit" in capsys.readouterr().out
    assert json.loads((tmp_path / "swin/vpt-deep/adapter_config.json").read_text())["model_type"] == "swin"


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_the_quickstart_tunes_a_checkpoint_to_a_folder_of_pictures(
    splits: tuple[str, ...],
    checkpoint: Path,
    picture_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = picture_folder("colors", splits=splits)
    quickstart.main(["--model", str(checkpoint), "--data", str(data), *QUICK, "--output", str(tmp_path / "out")])
    assert "identical to the last bit" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out/vpt-deep/adapter_config.json").read_text())
    assert saved["id2label"] == {"0": "green", "1": "red"}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("tiny", "nowhere", "pip install datasets"),
        ("tiny", "empty", "a folder of images for each class"),
        ("nowhere/at-all", "colors", "name or folder of a checkpoint for images, got 'nowhere/at-all'"),
    ],
)
def test_the_quickstart_says_what_it_expected(
    model: str,
    data: str,
    message: str,
    checkpoint: Path,
    picture_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    picture_folder("colors")
    (tmp_path / "empty").mkdir()
    model = str(checkpoint) if model == "tiny" else model
    with pytest.raises(SystemExit, match=message):
        quickstart.main(["--model", model, "--data", data, *QUICK])


def test_model_and_data_belong_together(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (quickstart.main, accuracy.main):
        with pytest.raises(SystemExit):
            main(["--data", "pictures"])
        assert "--model and --data belong together" in capsys.readouterr().err


# -- image sets -----------------------------------------------------------------------------------------------------


def test_pictures_are_normalised_as_the_checkpoint_was_trained(checkpoint: Path) -> None:
    preprocessing = images.Preprocessing.of(str(checkpoint))
    assert preprocessing == images.Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    white = preprocessing.load(Image.new("L", (30, 20), 255))
    one = images.ImageSet(white[None], torch.tensor([0]), ("white",), preprocessing)
    expected = torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6])
    torch.testing.assert_close(one.pixel_values(one.images)[0, :, 0, 0], expected)


def test_a_checkpoint_without_a_processor_gets_one_half_for_mean_and_deviation(tmp_path: Path) -> None:
    digits.small_backbone("vit").save_pretrained(tmp_path)
    assert images.Preprocessing.of(str(tmp_path)) == images.Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_a_split_is_disjoint_and_the_same_for_the_same_seed_and_has_the_share_of_each_class() -> None:
    whole = an_image_set()
    first, second = whole.split(0.8, seed=1)
    assert first.labels.bincount().tolist() == [8, 8, 8]
    assert second.labels.bincount().tolist() == [2, 2, 2]
    together = torch.cat([first.images, second.images]).flatten(1)
    assert len(together.unique(dim=0)) == len(whole)
    assert torch.equal(first.images, whole.split(0.8, seed=1)[0].images)
    assert not torch.equal(first.images, whole.split(0.8, seed=2)[0].images)


def test_some_classes_are_counted_anew() -> None:
    kept = an_image_set().only([1, 2])
    assert kept.class_names == ("b", "c")
    assert kept.labels.bincount().tolist() == [10, 10]


def test_augmentation_shifts_and_mirrors_only_if_asked() -> None:
    ramp = torch.arange(32).expand(40, 3, 32, 32).to(torch.uint8)
    shifted = images.augment(ramp, torch.Generator().manual_seed(0))
    assert ((shifted.int() - ramp.int()).abs() <= 2).all()
    assert len(shifted.unique(dim=0)) > 1
    rising = images.augment(ramp, torch.Generator().manual_seed(0), flip=True)[:, 0, 0].int().diff().sum(dim=1) > 0
    assert 0 < rising.sum() < len(ramp)


def test_a_broken_picture_is_named(picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("colors")
    (folder / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(images.DataError, match=r"red.0\.png' must be an image"):
        images.load_images(str(folder), images.Preprocessing(8), seed=0)


@pytest.mark.parametrize(("kind", "mode"), [("uint16", "I;16"), ("float32", "F")])
def test_pictures_of_more_than_8_bits_are_refused(kind: str, mode: str, picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("colors")
    Image.fromarray(np.array([[0, 3000], [30000, 5]], dtype=kind)).save(folder / "red" / "cells.tif")
    with pytest.raises(images.DataError, match=rf"cells.tif' cannot be used: .* got mode {mode} .* from 0 to 30000"):
        images.load_images(str(folder), images.Preprocessing(8), seed=0)


def test_pictures_are_turned_as_their_camera_noted(tmp_path: Path) -> None:
    lying = Image.new("RGB", (4, 2))
    noted = lying.getexif()
    noted[0x0112] = 6  # orientation: to be turned by a quarter
    lying.save(tmp_path / "photo.jpg", exif=noted)
    with images.opened(tmp_path / "photo.jpg") as photo:
        assert images.upright(photo).size == (2, 4)


def test_too_few_pictures_to_hold_some_out_are_refused(picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(images.DataError, match="must be more images of a class, got 4 of 2 classes"):
        images.load_images(str(picture_folder("colors", number=2)), images.Preprocessing(8), seed=0)


def test_a_class_that_only_the_test_images_have_is_refused(picture_folder: Callable[..., Path]) -> None:
    folder = picture_folder("colors", splits=("train", "test"))
    picture_folder("colors", classes="blue", splits=("test",))
    with pytest.raises(images.DataError, match="has blue besides"):
        images.load_images(str(folder), images.Preprocessing(8), seed=0)


def test_a_dataset_from_the_hub_is_read_by_the_types_of_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):  # type: ignore[type-arg]
        features = {"photo": type("Image", (), {})(), "kind": type("ClassLabel", (), {"names": ["cat", "dog"]})()}  # noqa: RUF012

        def __getitem__(self, column):  # type: ignore[no-untyped-def]
            return [row[column] for row in self]

    rows = Rows({"photo": Image.new("RGB", (9, 9)), "kind": index % 2} for index in range(10))
    fake = SimpleNamespace(load_dataset=lambda name: {"train": rows, "validation": rows})
    monkeypatch.setitem(sys.modules, "datasets", fake)  # type: ignore[arg-type]
    train_set, test_set = images.load_images("someone/pets", images.Preprocessing(8), seed=0)
    assert train_set.class_names == ("cat", "dog")
    assert test_set.labels.tolist() == [0, 1] * 5


# -- training -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_then_falls_to_nothing() -> None:
    factors = [training.learning_rate_factor(step, 100) for step in range(101)]
    assert max(factors) == factors[10] == 1
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)


def test_the_same_seed_gives_the_same_result(checkpoint: Path, tmp_path: Path) -> None:
    logits = []
    for name in ("one", "two"):
        data = an_image_set().split(0.5, seed=0)
        data = tuple(training_set_of_size(part, 16) for part in data)  # type: ignore[assignment]
        model = training.load_backbone(str(checkpoint), data[0].class_names, seed=3)
        method = training.METHODS["vpt-deep"]
        logits.append(training.tune(model, method, data, training.Settings(1), 3, tmp_path / name).logits)
    assert torch.equal(*logits)


def training_set_of_size(part: images.ImageSet, size: int) -> images.ImageSet:
    return images.ImageSet(part.images[..., :size, :size], part.labels, part.class_names, part.preprocessing)
