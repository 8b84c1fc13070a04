"""The quickstart, and the datasets and the training loop of the examples."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import accuracy
import digits
import images
import numpy as np
import pytest
import quickstart
import torch
import training
from PIL import ExifTags, Image

PROCESSOR = "preprocessor_config.json"
ONE_EPOCH = ["--epochs", "1"]


def random_images() -> images.ImageSet:
    labels = torch.arange(3).repeat_interleave(10)
    pixels = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return images.ImageSet(pixels.to(torch.uint8), labels, ("a", "b", "c"), images.Preprocessing(32))


# -- the quickstart -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
def test_quickstart_script_runs_without_options_for_model_and_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *ONE_EPOCH, "--pretraining-epochs", "1"])
    runpy.run_path(str(quickstart.__file__), run_name="__main__")

    printed, progress = capsys.readouterr()
    for title in ("Linear head", "VPT-Shallow", "VPT-Deep"):
        assert f"| {title}" in printed
    assert "logits of all 70 test images are bit-identical" in printed
    assert "100%" in progress
    assert (tmp_path / "runs/quickstart/backbone/model.safetensors").is_file()
    assert (tmp_path / "runs/quickstart/vpt-deep/adapter_model.safetensors").is_file()


@pytest.mark.usefixtures("few_digits")
def test_quickstart_fine_tunes_a_swin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "swin")]
    quickstart.main(["--backbone", "swin", *ONE_EPOCH, "--pretraining-epochs", "1", *output])
    assert "bit-identical" in capsys.readouterr().out
    assert json.loads((tmp_path / "swin/vpt-deep/adapter_config.json").read_text())["model_type"] == "swin"
    for method in ("linear", "vpt-shallow", "vpt-deep"):
        assert json.loads((tmp_path / "swin" / method / PROCESSOR).read_text())["crop_size"] == {
            "height": 32,
            "width": 32,
        }
    card = (tmp_path / "swin/vpt-deep/README.md").read_text()
    assert (
        "| accuracy, % of 70 test images |" in card and "| learning rate | 0.003 |" in card and "| epochs | 1 |" in card
    )


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_quickstart_fine_tunes_a_checkpoint_on_a_folder_of_images(
    splits: tuple[str, ...],
    checkpoint: Path,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = image_folder("colors", splits=splits)
    quickstart.main(["--model", str(checkpoint), "--data", str(data), *ONE_EPOCH, "--output", str(tmp_path / "out")])
    assert "bit-identical" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out/vpt-deep/adapter_config.json").read_text())
    assert saved["id2label"] == {"0": "green", "1": "red"}
    assert json.loads((tmp_path / "out/vpt-deep" / PROCESSOR).read_text())["image_mean"] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("tiny", "nowhere", "pip install datasets"),
        ("tiny", "empty", "a folder of images per class"),
        ("nowhere/at-all", "colors", "name or folder of a vision checkpoint, got 'nowhere/at-all'"),
        (
            "./typo",
            "colors",
            "got './typo', which is neither an existing folder nor a valid repository name. Check the path",
        ),
    ],
)
def test_quickstart_exits_with_a_message_for_an_invalid_model_or_dataset(
    model: str,
    data: str,
    message: str,
    checkpoint: Path,
    image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    image_folder("colors")
    (tmp_path / "empty").mkdir()
    model = str(checkpoint) if model == "tiny" else model
    with pytest.raises(SystemExit, match=message):
        quickstart.main(["--model", model, "--data", data, *ONE_EPOCH])


def test_data_without_model_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for main in (quickstart.main, accuracy.main):
        with pytest.raises(SystemExit):
            main(["--data", "images"])
        assert "--model and --data must be given together" in capsys.readouterr().err


# -- datasets -------------------------------------------------------------------------------------------------------


def test_images_are_normalised_with_the_checkpoints_mean_and_std(checkpoint: Path) -> None:
    preprocessing = images.Preprocessing.from_checkpoint(str(checkpoint))
    assert preprocessing == images.Preprocessing(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    white = preprocessing.load(Image.new("L", (30, 20), 255))
    dataset = images.ImageSet(white[None], torch.tensor([0]), ("white",), preprocessing)
    expected = torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6])
    torch.testing.assert_close(dataset.pixel_values(dataset.images)[0, :, 0, 0], expected)


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (301, 223), (8, 20)])
def test_the_saved_image_processor_preprocesses_as_in_training(size: tuple[int, int]) -> None:
    preprocessing = images.Preprocessing(32, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 50).convert("RGB")
    expected = images.normalize(preprocessing.load(image)[None], preprocessing.mean, preprocessing.std)
    found = preprocessing.image_processor()(image, return_tensors="pt").pixel_values
    assert found.shape == expected.shape and (found - expected).abs().mean() < 0.05


def test_preprocessing_without_an_image_processor_has_mean_and_std_of_one_half(tmp_path: Path) -> None:
    digits.small_backbone("vit").save_pretrained(tmp_path)
    half = (0.5, 0.5, 0.5)
    assert images.Preprocessing.from_checkpoint(str(tmp_path)) == images.Preprocessing(32, half, half)


def test_split_is_disjoint_stratified_and_determined_by_the_seed() -> None:
    whole = random_images()
    first, second = whole.split(0.8, seed=1)
    assert first.labels.bincount().tolist() == [8, 8, 8]
    assert second.labels.bincount().tolist() == [2, 2, 2]
    together = torch.cat([first.images, second.images]).flatten(1)
    assert len(together.unique(dim=0)) == len(whole)
    assert torch.equal(first.images, whole.split(0.8, seed=1)[0].images)
    assert not torch.equal(first.images, whole.split(0.8, seed=2)[0].images)


def test_select_classes_relabels_from_zero() -> None:
    subset = random_images().select_classes([1, 2])
    assert subset.class_names == ("b", "c")
    assert subset.labels.bincount().tolist() == [10, 10]


def test_augmentation_shifts_images_and_flips_them_only_on_request() -> None:
    ramp = torch.arange(32).expand(40, 3, 32, 32).to(torch.uint8)
    shifted = images.augment(ramp, torch.Generator().manual_seed(0))
    assert ((shifted.int() - ramp.int()).abs() <= 2).all()
    assert len(shifted.unique(dim=0)) > 1
    flipped = images.augment(ramp, torch.Generator().manual_seed(0), flip=True)[:, 0, 0].int().diff().sum(dim=1) < 0
    assert 0 < flipped.sum() < len(ramp)


def test_error_for_a_broken_image_names_the_file(image_folder: Callable[..., Path]) -> None:
    folder = image_folder("colors")
    (folder / "red" / "0.png").write_bytes(b"not an image")
    with pytest.raises(images.DataError, match=r"red.0\.png' cannot be read as an image"):
        images.load_images(str(folder), images.Preprocessing(8), seed=0)


@pytest.mark.parametrize(("kind", "mode"), [("uint16", "I;16"), ("float32", "F")])
def test_images_with_more_than_8_bits_are_an_error(kind: str, mode: str, image_folder: Callable[..., Path]) -> None:
    folder = image_folder("colors")
    Image.fromarray(np.array([[0, 3000], [30000, 5]], dtype=kind)).save(folder / "red" / "cells.tif")
    with pytest.raises(images.DataError, match=rf"cells.tif' cannot be used: .* got mode {mode} .* from 0 to 30000"):
        images.load_images(str(folder), images.Preprocessing(8), seed=0)


def test_images_are_rotated_by_their_exif_orientation(tmp_path: Path) -> None:
    photo = Image.new("RGB", (4, 2))
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6  # rotated by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    with images.open_image(tmp_path / "photo.jpg") as opened:
        assert images.to_upright_rgb(opened).size == (2, 4)


def test_too_few_images_for_a_split_are_an_error(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(images.DataError, match="more images per class, got 4 images of 2 classes"):
        images.load_images(str(image_folder("colors", number=2)), images.Preprocessing(8), seed=0)


def test_classes_without_training_images_are_an_error(image_folder: Callable[..., Path]) -> None:
    folder = image_folder("colors", splits=("train", "test"))
    image_folder("colors", classes="blue", splits=("test",))
    with pytest.raises(images.DataError, match="also has blue"):
        images.load_images(str(folder), images.Preprocessing(8), seed=0)


def test_columns_of_a_hub_dataset_are_found_by_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    factors = [training.learning_rate_factor(step, 100) for step in range(101)]
    assert max(factors) == factors[10] == 1
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0)


def test_fine_tuning_is_reproducible_for_a_seed(checkpoint: Path, tmp_path: Path) -> None:
    logits = []
    for name in ("first", "second"):
        data = random_images().split(0.5, seed=0)
        data = tuple(crop(part, 16) for part in data)  # type: ignore[assignment]
        model = training.load_backbone(str(checkpoint), data[0].class_names, seed=3)
        method = training.METHODS["vpt-deep"]
        logits.append(training.tune(model, method, data, training.Settings(1), 3, tmp_path / name).logits)
    assert torch.equal(*logits)


def crop(part: images.ImageSet, size: int) -> images.ImageSet:
    return images.ImageSet(part.images[..., :size, :size], part.labels, part.class_names, part.preprocessing)


# -- short runs -----------------------------------------------------------------------------------------------------


def test_a_short_run_with_a_prefix_is_not_below_the_linear_head(tmp_path: Path) -> None:
    """A prefix starts without effect, so that three epochs are enough to gain something and never cost anything."""
    digits.pretrain("vit", tmp_path / "backbone", epochs=6, seed=0)
    methods = {"linear": training.METHODS["linear"].with_rates(3e-2, None)}
    methods |= {name: digits.SMALL_METHODS[name] for name in ("vpt-prefix", "vpt-prefix-bias")}
    found: dict[str, list[float]] = {name: [] for name in methods}
    for seed in (0, 1):
        train_set, test_set = digits.new_task(seed)
        for name, method in methods.items():
            assert method.head_learning_rate in (None, 3e-2)  # the head learns alike in all methods
            model = training.load_backbone(str(tmp_path / "backbone"), train_set.class_names, seed)
            folder = tmp_path / f"{name}-{seed}"
            result = training.tune(model, method, (train_set, test_set), training.Settings(3), seed, folder)
            found[name].append(result.accuracy)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    print(found)
    assert means["vpt-prefix"] >= means["linear"], found
    assert means["vpt-prefix-bias"] >= means["linear"], found
