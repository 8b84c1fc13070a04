"""The segmentation example: datasets, metrics, training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation
import torch
import train_semantic_segmentation as example
from helpers.models import Tiny, tiny_beit_segmenter
from PIL import ExifTags, Image
from transformers import SwinConfig, SwinForImageClassification

from vpt_peft import AutoVPTModelForSemanticSegmentation

VOID = segmentation.VOID
ONE_EPOCH = ["--epochs", "1", "--batch-size", "2"]


def make_scenes(folder: Path, *, split_first: bool = True, size: int = 32, number: int = 3) -> Path:
    """A folder of images: the left half has label 0, the right half label 2, the first rows label 11."""
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            inner = folder / split / kind if split_first else folder / kind / split
            inner.mkdir(parents=True)
            for index in range(number):
                pixels = np.zeros((size, size), dtype=np.uint8)
                pixels[:, size // 2 :] = 2 if kind == "masks" else 200 + index
                pixels[:4] = 11 if kind == "masks" else 100
                Image.fromarray(pixels).save(inner / f"{index}.png")
    return folder


def test_metrics_match_values_computed_by_hand() -> None:
    masks = torch.tensor([[[0, 0, 0, VOID], [1, 1, 2, VOID]]])
    predictions = torch.tensor([[[0, 0, 1, 2], [1, 0, 2, 4]]])
    scores = segmentation.score(predictions, masks, num_labels=5)
    # intersection / union; labels 3 and 4 are in neither masks nor predictions of labelled pixels
    assert scores.iou[:3] == (2 / 4, 1 / 3, 1.0) and all(math.isnan(value) for value in scores.iou[3:])
    assert scores.mean_iou == pytest.approx((1 / 2 + 1 / 3 + 1) / 3) and scores.pixel_accuracy == pytest.approx(4 / 6)


def test_iou_of_a_label_that_is_only_predicted_is_zero() -> None:
    scores = segmentation.score(torch.tensor([0, 1]), torch.tensor([0, 0]), num_labels=3)
    assert scores.iou[:2] == (0.5, 0.0) and scores.mean_iou == 0.25


@pytest.mark.parametrize("split_first", [True, False])
def test_folder_is_loaded_with_void_pixels_and_resized(tmp_path: Path, split_first: bool) -> None:
    folder = make_scenes(tmp_path, split_first=split_first)
    (folder / "labels.txt").write_text("road\ncar\nsky\n")
    train, test = segmentation.load_folder(folder, 11, (16, 8))
    assert train.images.shape == (3, 3, 16, 8) and test.masks.shape == (3, 16, 8)
    assert train.label_names == ("road", "car", "sky") and train.masks.unique().tolist() == [0, 2, VOID]
    train, _ = segmentation.load_folder(folder, 11, None)
    assert train.masks.shape == (3, 32, 32) and (train.masks[:, :4] == VOID).all()


def test_inconsistent_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(segmentation.DataError, match="found neither"):
        segmentation.load_folder(tmp_path, VOID, None)
    folder = make_scenes(tmp_path)
    (folder / "labels.txt").write_text("road\n")
    with pytest.raises(segmentation.DataError, match="must contain 3 label names, one per line, got 1"):
        segmentation.load_folder(folder, 11, None)
    Image.new("RGB", (32, 32)).save(folder / "train" / "masks" / "0.png")
    with pytest.raises(segmentation.DataError, match=r"one channel .* got mode RGB"):
        segmentation.load_folder(folder, 11, None)
    (folder / "train" / "masks" / "0.png").unlink()
    with pytest.raises(segmentation.DataError, match="3 images and 2 masks; unpaired: 0"):
        segmentation.load_folder(folder, 11, None)


def test_digit_scenes_are_determined_by_the_seed() -> None:
    scenes, same, other = (segmentation.digit_scenes(range(5, 10), 6, seed) for seed in (1, 1, 2))
    assert torch.equal(scenes.images, same.images) and torch.equal(scenes.masks, same.masks)
    assert not torch.equal(scenes.masks, other.masks)
    assert scenes.masks.unique().tolist() == [0, 1, 2, 3, 4, 5, VOID]
    assert scenes.label_names == ("background", "5", "6", "7", "8", "9")


def test_plot_shows_images_masks_and_predictions() -> None:
    images = torch.full((2, 3, 4, 6), 7, dtype=torch.uint8)
    masks = torch.tensor([0, VOID]).view(2, 1, 1).expand(2, 4, 6)
    drawn = np.array(segmentation.draw_predictions(images, masks, torch.ones(2, 4, 6, dtype=torch.long), 2, scale=1))
    assert drawn.shape == (8, 18, 3)
    assert (drawn[:, :6] == 7).all() and (drawn[4:, 6:12] == 0).all()
    assert (drawn[0, 6] != drawn[0, 12]).any() and (drawn[0, 12] == drawn[7, 17]).all()


def test_example_runs_on_digit_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--images", "4", "--pretraining-images", "4", "--pretraining-epochs", "1"]
    methods = ["linear", "vpt-shallow", "vpt-deep", "full"]
    results = example.main([*ONE_EPOCH, *small, "--output", str(tmp_path), "--method", *methods])
    printed = capsys.readouterr().out
    assert list(results) == methods and "bit-identical logits" in printed and "| VPT-Deep " in printed
    for method in methods:
        processor = json.loads((tmp_path / method / "preprocessor_config.json").read_text())
        assert processor["size"] == {"height": 64, "width": 64} and processor["image_mean"] == [0.5, 0.5, 0.5]
    assert "| head learning rate | 0.003 |" in (tmp_path / "vpt-deep/README.md").read_text()
    assert results["linear"].parameters < results["vpt-shallow"].parameters < results["vpt-deep"].parameters
    assert results["vpt-deep"].parameters < results["full"].parameters
    with Image.open(tmp_path / "predictions.png") as image:
        assert image.size == (3 * 64 * 2, 4 * 64 * 2)
    vpt = AutoVPTModelForSemanticSegmentation.from_pretrained(tmp_path / "vpt-deep")
    assert vpt.config.id2label[1] == "5"


def test_example_fine_tunes_a_swin_classifier_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1]}
    classifier = SwinForImageClassification(SwinConfig(**swin, window_size=4))
    classifier.save_pretrained(tmp_path / "swin")
    scenes = make_scenes(tmp_path / "scenes")
    output = ["--output", str(tmp_path / "runs")]
    model = ["--model", str(tmp_path / "swin"), "--data", str(scenes), "--ignore-index", "11", "--method", "vpt-deep"]
    (result,) = example.main([*ONE_EPOCH, *model, *output]).values()
    assert len(result.scores.iou) == 3 and "with mean 0.5 and std 0.5" in capsys.readouterr().err
    model = example.load(tmp_path / "runs" / "backbone")
    expected, actual = classifier.swin.state_dict(), model.backbone.swin.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_example_fine_tunes_a_beit(tmp_path: Path) -> None:
    tiny_beit_segmenter().model.save_pretrained(tmp_path / "beit")
    scenes = make_scenes(tmp_path / "scenes")
    folders = ["--model", str(tmp_path / "beit"), "--data", str(scenes), "--output", str(tmp_path / "runs")]
    results = example.main([*ONE_EPOCH, *folders, "--ignore-index", "11", "--method", "linear", "vpt-shallow"])
    assert list(results) == ["linear", "vpt-shallow"]


def test_last_batch_of_a_single_image_is_dropped_and_the_schedule_decays_to_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    class AdamW(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", AdamW)
    model, data = tiny_beit_segmenter().model, segmentation.digit_scenes(range(2), 5, 0)
    data = segmentation.SegmentationSet(data.images[..., :32, :32], data.masks[..., :32, :32], data.label_names)
    example.Loop(2, 0).train(model, data, 5, (1e-3, 1e-3), "Test")
    assert len(rates) == 5 * 2
    assert rates[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 9 / 10)) * 1e-3)


def test_masks_with_another_aspect_ratio_or_broken_files_are_an_error(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    mask = folder / "train" / "masks" / "0.png"
    Image.new("L", (16, 15)).save(mask)  # half the size, up to rounding
    segmentation.load_folder(folder, 11, None)
    Image.new("L", (64, 16)).save(mask)
    with pytest.raises(segmentation.DataError, match=r"masks.0\.png' .* got 64 x 16 pixels, and 32 x 32 in"):
        segmentation.load_folder(folder, 11, None)
    Image.new("L", (32, 32)).save(mask)
    for kind in ("masks", "images"):
        file = folder / "train" / kind / "0.png"
        file.write_bytes(file.read_bytes()[:45])
        with pytest.raises(segmentation.DataError, match=rf"{kind}.0\.png' cannot be read as an image"):
            segmentation.load_folder(folder, 11, (32, 32))


def test_masks_are_rotated_with_their_images(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    plain, _ = segmentation.load_folder(folder, 11, None)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # rotated by 180 degrees
    for kind in ("images", "masks"):
        file = folder / "train" / kind / "0.png"
        Image.open(file).save(file, exif=exif)
        if kind == "images":
            with pytest.raises(segmentation.DataError, match=r"masks.0\.png' .* EXIF .* got 1, and 3 in .*images.0"):
                segmentation.load_folder(folder, 11, None)
    rotated, _ = segmentation.load_folder(folder, 11, None)
    assert torch.equal(rotated.images[0], plain.images[0].flip(-1, -2))
    assert torch.equal(rotated.masks[0], plain.masks[0].flip(-1, -2))
    assert not torch.equal(rotated.masks[0], plain.masks[0])


def test_duplicate_file_names_and_masks_with_a_single_label_are_an_error(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    for mask in folder.glob("*/masks/*.png"):
        Image.fromarray(np.array([[0, 255]] * 2, dtype=np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(mask)
    with pytest.raises(segmentation.DataError, match="at least two labels, got only 0 and 255"):
        segmentation.load_folder(folder, VOID, None)
    Image.new("RGB", (32, 32)).save(folder / "train" / "images" / "0.jpg")
    with pytest.raises(segmentation.DataError, match="must differ without their extension"):
        segmentation.load_folder(folder, VOID, None)


def test_example_exits_with_a_message_for_a_model_without_segmentation(tmp_path: Path, vit: Tiny) -> None:
    vit.model.save_pretrained(tmp_path / "vit")
    with pytest.raises(SystemExit, match=r"a Swin or a semantic segmentation checkpoint, got .*vit'"):
        example.main(["--model", str(tmp_path / "vit"), "--images", "2", "--output", str(tmp_path / "runs")])


def test_folder_with_a_single_training_image_is_an_error(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    for name in ("1.png", "2.png"):
        for kind in ("images", "masks"):
            (folder / "train" / kind / name).unlink()
    with pytest.raises(segmentation.DataError, match="at least 2 training images"):
        segmentation.load_folder(folder, 11, None)


@pytest.mark.parametrize(
    ("option", "minimum"), [("--batch-size", 2), ("--images", 2), ("--epochs", 1), ("--pretraining-epochs", 1)]
)
def test_options_below_their_minimum_are_an_error(
    option: str, minimum: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main([option, str(minimum - 1)])
    assert f"{option} must be at least {minimum}, got {minimum - 1}" in capsys.readouterr().err


def test_size_of_zero_pixels_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(["--size", "32", "0"])
    assert "--size must be at least 1, got 32 0" in capsys.readouterr().err


def test_example_exits_with_a_message_for_an_invalid_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="found neither"):
        example.main(["--data", str(tmp_path), "--output", str(tmp_path / "runs")])
