"""``vpt-peft train --task segmentation``: folders of images and masks, scores, training, pictures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.models import VIT, Tiny, tiny_beit_segmenter
from helpers.plots import assert_is_plot
from PIL import ExifTags, Image
from transformers import Dinov2Config, Dinov2Model, SwinConfig, SwinForImageClassification

from vpt_peft import AutoVPTModelForSemanticSegmentation
from vpt_peft.recipes.data import digits
from vpt_peft.recipes.data.masks import VOID, load_masks
from vpt_peft.recipes.data.transforms import RandomCropAndFlip, load_image_processor, to_inputs
from vpt_peft.recipes.errors import RecipeError
from vpt_peft.recipes.report import plots
from vpt_peft.recipes.report.metrics import Metric, Scores, predicted_labels
from vpt_peft.recipes.training.trainer import drops_last

Command = Callable[..., Any]


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


# -- scores -----------------------------------------------------------------------------------------------------------


def scores(predictions: torch.Tensor, masks: torch.Tensor, num_labels: int) -> Scores:
    metric = Metric(num_labels, "segmentation")
    for index, (predicted, mask) in enumerate(zip(predictions, masks, strict=True)):  # in batches
        metric(SimpleNamespace(predictions=predicted, label_ids=mask), compute_result=index == len(masks) - 1)
    return metric.scores


def test_scores_match_values_computed_by_hand() -> None:
    masks = torch.tensor([[[0, 0, 0, VOID], [1, 1, 2, VOID]]])
    found = scores(torch.tensor([[[0, 0, 1, 2], [1, 0, 2, 4]]]), masks, num_labels=5)
    rows = found.by_label("abcde")
    # intersection / union; labels 3 and 4 are in neither masks nor predictions of labelled pixels
    assert [row["iou"] for row in rows] == [50.0, 33.33, 100.0, None, None]
    assert found.mean_iou == pytest.approx(100 * (1 / 2 + 1 / 3 + 1) / 3)
    assert (found.accuracy, found.total, found.main) == (pytest.approx(400 / 6), 6, found.mean_iou)
    assert rows[0] == {"label": "a", "precision": 66.67, "recall": 66.67, "f1": 66.67, "iou": 50.0, "support": 3}


def test_the_iou_of_a_label_that_is_only_predicted_is_zero() -> None:
    found = scores(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), num_labels=3)
    assert [row["iou"] for row in found.by_label("abc")] == [50.0, 0.0, None] and found.mean_iou == 25.0


def test_a_metric_starts_anew_after_each_evaluation() -> None:
    metric = Metric(2)
    for _ in range(2):
        metric(SimpleNamespace(predictions=torch.tensor([0, 1]), label_ids=torch.tensor([0, 0])), compute_result=False)
        found = metric(SimpleNamespace(predictions=torch.tensor([1]), label_ids=torch.tensor([1])))
        assert found == {"accuracy": pytest.approx(200 / 3)}
    assert metric.scores.confusion.tolist() == [[1, 1], [0, 1]]


def test_a_class_255_is_not_void_in_classification() -> None:
    metric = Metric(256)
    metric(SimpleNamespace(predictions=torch.tensor([255]), label_ids=torch.tensor([255])))
    assert metric.scores.total == 1


def test_near_chance_is_measured_against_the_most_frequent_label() -> None:
    assert Scores(np.array([[60, 0], [40, 0]])).is_near_chance and Scores(np.array([[60, 0], [40, 0]])).chance == 60
    assert not Scores(np.array([[55, 5], [5, 35]])).is_near_chance
    assert math.isnan(Scores(np.zeros((2, 2), dtype=int), "segmentation").mean_iou)


def test_logits_are_resized_to_the_masks() -> None:
    logits = torch.zeros(2, 3, 4, 4)
    logits[:, 1, :, 2:] = 1
    found = predicted_labels((logits, None), torch.zeros(2, 8, 16))
    assert found.shape == (2, 8, 16) and found[0, 0, [0, 5, 10, 15]].tolist() == [0, 0, 1, 1]
    assert predicted_labels(torch.eye(3), torch.zeros(3)).tolist() == [0, 1, 2]


# -- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split_first", [True, False])
def test_a_folder_is_loaded_with_void_pixels_and_resized(tmp_path: Path, split_first: bool, checkpoint: Path) -> None:
    folder = make_scenes(tmp_path, split_first=split_first)
    (folder / "labels.txt").write_text("road\ncar\nsky\n")
    splits, names = load_masks(folder, 11)
    assert list(splits) == ["train", "test"] and names == ["road", "car", "sky"]
    processor = load_image_processor(str(checkpoint), (16, 8))
    inputs = to_inputs(splits["train"], processor, ignore_index=11)[:]
    masks = torch.stack(inputs["labels"])
    assert inputs["pixel_values"].shape == (3, 3, 16, 8) and masks.shape == (3, 16, 8)
    assert masks.unique().tolist() == [0, 2, VOID] and (masks[:, :2] == VOID).all()
    left_of_middle, right_of_middle = masks[0, 8, 3].item(), masks[0, 8, 4].item()
    assert (left_of_middle, right_of_middle) == (0, 2)


def test_a_validation_split_is_loaded_too(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    (folder / "train").rename(folder / "Training")
    make_scenes(tmp_path / "other")
    (tmp_path / "other/train").rename(folder / "val")
    assert list(load_masks(folder, 11)[0]) == ["train", "test", "validation"]


def test_inconsistent_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found neither"):
        load_masks(tmp_path, VOID)
    with pytest.raises(RecipeError, match="which is not a folder"):
        load_masks(tmp_path / "nowhere", VOID)
    folder = make_scenes(tmp_path)
    (folder / "labels.txt").write_text("road\n")
    with pytest.raises(RecipeError, match="must contain 3 label names, one per line, got 1"):
        load_masks(folder, 11)
    Image.new("RGB", (32, 32)).save(folder / "train" / "masks" / "0.png")
    with pytest.raises(RecipeError, match=r"one channel .* got mode RGB"):
        load_masks(folder, 11)
    (folder / "train" / "masks" / "0.png").unlink()
    with pytest.raises(RecipeError, match="3 images and 2 masks; unpaired: 0"):
        load_masks(folder, 11)


def test_masks_with_another_aspect_ratio_or_broken_files_are_an_error(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    mask = folder / "train" / "masks" / "0.png"
    Image.new("L", (16, 15)).save(mask)  # half the size, up to rounding
    load_masks(folder, 11)
    Image.new("L", (64, 16)).save(mask)
    with pytest.raises(RecipeError, match=r"masks.0\.png' .* got 64 x 16 pixels, and 32 x 32 in"):
        load_masks(folder, 11)
    Image.new("L", (32, 32)).save(mask)
    for kind in ("masks", "images"):
        file = folder / "train" / kind / "0.png"
        file.write_bytes(file.read_bytes()[:45])
        with pytest.raises(RecipeError, match=rf"{kind}.0\.png' cannot be read as an image"):
            load_masks(folder, 11)


def test_masks_are_rotated_with_their_images(tmp_path: Path, checkpoint: Path) -> None:
    folder, processor = make_scenes(tmp_path), load_image_processor(str(checkpoint), (32, 32))

    def first() -> tuple[torch.Tensor, torch.Tensor]:
        row = to_inputs(load_masks(folder, 11)[0]["train"], processor)[0]
        return row["pixel_values"], row["labels"]

    plain, exif = first(), Image.Exif()
    exif[ExifTags.Base.Orientation] = 3  # rotated by 180 degrees
    for kind in ("images", "masks"):
        file = folder / "train" / kind / "0.png"
        Image.open(file).save(file, exif=exif)
        if kind == "images":
            with pytest.raises(RecipeError, match=r"masks.0\.png' .* EXIF .* got 1, and 3 in .*images.0"):
                load_masks(folder, 11)
    rotated = first()
    assert all(torch.equal(one, other.flip(-1, -2)) for one, other in zip(rotated, plain, strict=True))
    assert not torch.equal(rotated[1], plain[1])


def test_duplicate_file_names_masks_with_a_single_label_and_a_single_image_are_errors(tmp_path: Path) -> None:
    folder = make_scenes(tmp_path)
    for mask in folder.glob("*/masks/*.png"):
        Image.fromarray(np.array([[0, 255]] * 2, dtype=np.uint8)).resize((32, 32), Image.Resampling.NEAREST).save(mask)
    with pytest.raises(RecipeError, match="at least two labels, got only 0 and 255"):
        load_masks(folder, VOID)
    Image.new("RGB", (32, 32)).save(folder / "train" / "images" / "0.jpg")
    with pytest.raises(RecipeError, match="must differ without their extension"):
        load_masks(folder, VOID)
    for file in [*folder.glob("train/*/1.png"), *folder.glob("train/*/2.png"), folder / "train/images/0.jpg"]:
        file.unlink()
    with pytest.raises(RecipeError, match="at least 2 training images"):
        load_masks(folder, VOID)


def test_augmented_masks_keep_their_labels(tmp_path: Path, checkpoint: Path) -> None:
    splits, _ = load_masks(make_scenes(tmp_path), 11)
    rows = to_inputs(splits["train"], load_image_processor(str(checkpoint), (16, 16)), RandomCropAndFlip((16, 16)), 11)
    assert {label for _ in range(5) for label in torch.stack(rows[:]["labels"]).unique().tolist()} <= {0, 2, VOID}


def test_digit_scenes_are_determined_by_the_seed() -> None:
    (images, masks), same, other = (digits.draw_scenes(range(5, 10), 6, seed) for seed in (1, 1, 2))
    assert np.array_equal(images, same[0]) and np.array_equal(masks, same[1])
    assert not np.array_equal(masks, other[1])
    assert np.unique(masks).tolist() == [0, 1, 2, 3, 4, 5, VOID]


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_digits")
def test_digit_scenes_are_the_data_by_default(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = ["--task", "segmentation", "--epochs", 1, "--method", "vpt-deep", "--output", folder]
    done = command("train", *options)
    assert done.code == 0, done.err
    assert "Pretraining a small UperNet" in done.out and re.search("test mean IoU .* pixel accuracy", done.out)
    assert "| background |" in done.out and "mean IoU" in done.err
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 64, "width": 64} and processor["image_mean"] == [0.5, 0.5, 0.5]
    card = (folder / "README.md").read_text()
    assert "| head learning rate | 0.003 |" in card and "| mean IoU, % of 4 test images |" in card
    results = json.loads((folder / "results.json").read_text())
    assert [label["label"] for label in results["labels"]] == ["background", *"56789"]
    assert {"eval_mean_iou", "eval_accuracy"} <= results["histories"]["0"][1].keys()
    assert (folder / "predictions.png").is_file()
    vpt = AutoVPTModelForSemanticSegmentation.from_pretrained(folder)
    assert vpt.config.id2label[1] == "5"

    images = folder / "data/test/images"
    done = command("predict", folder, images, "--format", "json", "--masks", tmp_path / "masks")
    assert sum(label["score"] for label in json.loads(done.out)[0]["labels"]) <= 1.000001
    with Image.open(tmp_path / "masks" / "0.png") as mask:
        assert mask.size == (64, 64) and set(np.unique(np.array(mask))) <= set(range(6))
    done = command("evaluate", folder, "--data", folder / "data", "--output", tmp_path / "scores.json")
    assert done.code == 0 and "Test: mean IoU" in done.out
    assert json.loads((tmp_path / "scores.json").read_text())["confusion"] == results["confusion"]


def test_a_swin_gets_upernet_with_a_new_decode_head(command: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1]}
    SwinForImageClassification(SwinConfig(**swin, window_size=4)).save_pretrained(tmp_path / "swin")
    scenes = make_scenes(tmp_path / "scenes")
    data = ["--model", tmp_path / "swin", "--data", scenes, "--ignore-index", 11, "--epochs", 1, "--batch-size", 2]
    done = command("train", "--task", "segmentation", *data, "--method", "vpt-prefix", "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert "with mean 0.5 and std 0.5" in done.err
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["labels"]) == 3 and results["settings"]["steps"] == 1, (
        "a single image is too few for batch norms"
    )
    assert sum(map(sum, results["confusion"])) == 3 * 28 * 32, "but no image is left out of the test"
    done = command("evaluate", tmp_path / "out", "--data", scenes, "--ignore-index", 11)
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["linear", "full"])
def test_a_segmentation_checkpoint_is_fine_tuned(method: str, command: Command, tmp_path: Path) -> None:
    tiny_beit_segmenter().model.save_pretrained(tmp_path / "beit")
    scenes = make_scenes(tmp_path / "scenes", number=8)
    data = ["--model", tmp_path / "beit", "--data", scenes, "--ignore-index", 11, "--epochs", 1, "--batch-size", 2]
    options = ["--method", method, "--max-train-samples", 6, "--keep-best", "--output", tmp_path / "out"]
    done = command("train", "--task", "segmentation", *data, *options)
    assert done.code == 0 and "Images: 5 train, 1 validation, 8 test." in done.out, done.err
    assert command("evaluate", tmp_path / "out", "--data", scenes, "--ignore-index", 11).code == 0


@pytest.mark.parametrize("options", [[], ["--image-size", 32, 48]], ids=["own size", "other size"])
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_checkpoint_without_segmentation_gets_a_linear_decode_head(
    kind: str, options: list[Any], command: Command, tmp_path: Path, vit: Tiny
) -> None:
    model = vit.model if kind == "vit" else Dinov2Model(Dinov2Config(**{**VIT, "mlp_ratio": 2}))
    model.save_pretrained(tmp_path / kind)
    scenes, folder = make_scenes(tmp_path / "scenes", number=6), tmp_path / "out"
    data = ["--model", tmp_path / kind, "--data", scenes, "--ignore-index", 11, "--epochs", 40, "--batch-size", 2]
    data += ["--method", "vpt-prefix", "--min-crop", 1, *options]
    done = command("train", "--task", "segmentation", *data, "--output", folder)
    assert done.code == 0, done.err
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert f"The adapter has {size / 1e6:.2f} MB." in done.out and size < 60_000
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["pixel accuracy, %"] > 80, "the halves of the image"
    vpt = AutoVPTModelForSemanticSegmentation.from_pretrained(folder)
    assert type(vpt.get_base_model()).__name__ == {"vit": "ViTModel", "dinov2": "Dinov2Model"}[kind]
    done = command("evaluate", folder, "--data", scenes, "--ignore-index", 11, "--output", tmp_path / "scores.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "scores.json").read_text())["confusion"] == results["confusion"]
    done = command("predict", folder, scenes / "test/images/0.png", "--masks", tmp_path / "masks")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "masks/0.png") as mask:
        assert mask.size == (32, 32)


def test_full_fine_tuning_without_a_decode_head_and_lora_are_refused(
    refused: Callable[..., str], tmp_path: Path, vit: Tiny
) -> None:
    vit.model.save_pretrained(tmp_path / "vit")
    options = ["--task", "segmentation", "--model", tmp_path / "vit", "--data", make_scenes(tmp_path / "scenes")]
    options += ["--ignore-index", 11, "--output", tmp_path / "out"]
    assert "Full fine-tuning requires a model with a head, got ViTModel" in refused(
        "train", *options, "--method", "full"
    )
    tiny_beit_segmenter().model.save_pretrained(tmp_path / "beit")
    options = [*options, "--model", tmp_path / "beit", "--method", "lora", "--resume"]
    (tmp_path / "out/settings.json").unlink()
    assert "LoRA is for classification only" in refused("train", *options)


def test_a_last_batch_of_a_single_image_is_dropped() -> None:
    assert drops_last(5, 2) and drops_last(9, 8)
    assert not drops_last(4, 2) and not drops_last(1, 2) and not drops_last(5, 1) and not drops_last(6, 4)


@pytest.mark.usefixtures("rendered_plots")
def test_the_picture_leaves_void_out_and_has_a_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    images = np.full((2, 16, 24, 3), 7, dtype=np.uint8)
    masks = np.zeros((2, 16, 24), dtype=np.int64)
    masks[:, :, 12:] = VOID
    plots.segmentation(tmp_path / "out.png", images, masks, np.ones_like(masks), ["sky", "road", "car"], "Scenes")
    assert_is_plot(tmp_path / "out.png")
    (figure,) = drawn
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["sky", "road", "unlabelled"], "what occurs"
    assert [axes.get_title() for axes in figure.axes[:3]] == ["image", "mask", "prediction"]
    image, mask, prediction = (axes.images[0].get_array() for axes in figure.axes[:3])
    assert (image == 7).all() and (mask[:, 12:] == 255).all() and (prediction[:, 12:] == 255).all()
    assert (mask[0, 0] != prediction[0, 0]).any() and (mask[0, 0] != 255).any()
    colours = plots.label_colours(20)[:20].astype(int)
    distances = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(20)
    assert distances.min() > 20, "colours that can be told apart"
