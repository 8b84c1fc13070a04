"""Folders of images, their checks, columns of datasets, image processors and augmentation."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from helpers.hub_server import HubServer
from huggingface_hub import constants, create_repo, upload_folder
from PIL import ExifTags, Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo
from transformers import AutoConfig

from vpt_peft import ImageError
from vpt_peft.images.files import open_image, read_image, to_rgb
from vpt_peft.recipes.data import folders, images
from vpt_peft.recipes.data.folders import first_per_class, load_data, read_splits, select_columns
from vpt_peft.recipes.data.images import check_all, check_image
from vpt_peft.recipes.data.transforms import RandomCropAndFlip, load_image_processor, to_inputs
from vpt_peft.recipes.errors import RecipeError

MakeFolder = Callable[..., Path]
HALF = [0.5, 0.5, 0.5]


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_a_folder_without_splits_is_split_by_class(image_folder: MakeFolder) -> None:
    splits = load_data(str(image_folder("colors", number=10)), seed=0)
    assert splits["train"].features["label"].names == ["green", "red"]
    assert sorted(splits["test"]["label"]) == [0, 0, 1, 1]
    assert len(splits["train"]) == 16
    other = load_data(str(image_folder("others", number=10)), seed=1)
    assert sorted(other["test"]["label"]) == [0, 0, 1, 1]


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing"), ("TRAIN", "val"), ("training", "eval")])
def test_splits_may_have_any_of_their_usual_names(names: tuple[str, str], image_folder: MakeFolder) -> None:
    folder = image_folder("colors", number=3, splits=(names[0],))
    image_folder("colors", number=2, splits=(names[1],))
    splits = load_data(str(folder), seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 6, "test": 4}
    assert splits["train"].features["label"].names == ["green", "red"]


def test_a_validation_split_is_kept_beside_a_test_split(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", splits=("train", "valid", "test"))
    assert list(load_data(str(folder), seed=0)) == ["train", "validation", "test"]


def test_a_folder_one_level_too_deep_is_an_error_that_names_the_right_one(image_folder: MakeFolder) -> None:
    for name, splits in (("plain", ("",)), ("split", ("train", "test"))):
        inner = image_folder(f"{name}/data", splits=splits)
        with pytest.raises(RecipeError, match=f"one level deeper. Use --data '{inner}'"):
            load_data(str(inner.parent), seed=0)


def test_folders_inside_of_classes_are_an_error(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", splits=("a", "b"))
    with pytest.raises(RecipeError, match="these contain folders of images: a, b"):
        load_data(str(folder), seed=0)


def test_classes_without_images_are_an_error(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", "red green blue")
    for file in (folder / "blue").iterdir():
        file.rename(file.with_suffix(".heic"))
    with pytest.raises(RecipeError, match=r"these folders have none: blue\. .*Supported file types: .*\.png"):
        load_data(str(folder), seed=0)


def test_a_folder_without_classes_is_an_error(image_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="at least two classes; got 0 folders"):
        (tmp_path / "empty").mkdir()
        load_data(str(tmp_path / "empty"), seed=0)
    with pytest.raises(RecipeError, match="at least two classes; got 5 images beside 0 folders"):
        load_data(str(image_folder("colors") / "red"), seed=0)
    with pytest.raises(RecipeError, match="at least two classes; got 1 folder of"):
        load_data(str(image_folder("one", "red")), seed=0)


def test_hidden_folders_and_other_files_are_left_out(image_folder: MakeFolder) -> None:
    folder = image_folder("colors")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "__MACOSX").mkdir()
    (folder / "red" / "notes.txt").write_text("not an image")
    (folder / "red" / "._0.png").write_bytes(b"not an image")
    assert len(read_splits(str(folder))["train"]) == 10


def test_other_classes_in_the_test_images_are_an_error(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", splits=("train", "test"))
    image_folder("colors", classes="blue", splits=("test",))
    with pytest.raises(RecipeError, match=r"must have only classes of .*train', but also has blue"):
        load_data(str(folder), seed=0)


def test_splits_without_images_or_without_training_images_are_errors(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", splits=("train",))
    (folder / "test").mkdir()
    with pytest.raises(RecipeError, match="test' must contain images in folders of classes, got none"):
        load_data(str(folder), seed=0)
    with pytest.raises(RecipeError, match="must also have a folder named train, got test only"):
        load_data(str(image_folder("others", splits=("test",))), seed=0)
    with pytest.raises(RecipeError, match="one folder per split, got both train and training for train"):
        load_data(str(image_folder("twice", splits=("train", "training"))), seed=0)


def test_a_missing_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"--data must be a folder with .*, got '.*nowhere', which does not exist"):
        load_data(str(tmp_path / "nowhere"), seed=0)


def test_a_folder_with_metadata_is_read_by_its_columns(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", number=4)
    rows = [f"{color}/{index}.png,{color}" for color in ("red", "green") for index in range(4)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,kind", *rows]))
    splits = read_splits(str(folder), label_column="kind")
    assert splits["train"].features["label"].names == ["green", "red"]
    assert sorted(splits["train"]["label"]) == [0] * 4 + [1] * 4


def test_fewer_training_images_are_drawn_from_all_classes(image_folder: MakeFolder) -> None:
    rows = read_splits(str(image_folder("colors", "red green blue", number=10)))["train"]
    assert sorted(first_per_class(rows, 6, seed=0)["label"]) == [0, 0, 1, 1, 2, 2]
    assert first_per_class(rows, 30, seed=0) is rows


# -- images -----------------------------------------------------------------------------------------------------------


def save(folder: Path, mode: str) -> Path:
    """An image of a mode, with the colours of a gradient."""
    gradient = Image.linear_gradient("L").resize((20, 20))
    file = folder / "red" / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
    if mode == "PA":
        image = gradient.convert("RGB").quantize(8)
        image.save(file, transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    elif mode in ("RGBA", "LA"):
        image = gradient.convert(mode)
        image.putalpha(gradient)
        image.save(file)
    else:
        gradient.convert(mode).save(file)
    return file


@pytest.mark.parametrize("mode", ["L", "1", "P", "PA", "CMYK", "RGBA", "LA"])
def test_images_of_other_modes_become_rgb(mode: str, image_folder: MakeFolder, checkpoint: Path) -> None:
    folder = image_folder("colors")
    file = save(folder, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = load_data(str(folder), seed=0)
        inputs = to_inputs(rows["train"], load_image_processor(str(checkpoint)))[:]
    assert inputs["pixel_values"].shape[1:] == (3, 16, 16)
    with Image.open(file) as image:
        assert to_rgb(image).mode == "RGB"


@pytest.mark.parametrize(("kind", "mode"), [("uint16", "I;16"), ("int32", "I"), ("float32", "F")])
def test_images_with_more_than_8_bits_are_an_error(kind: str, mode: str, image_folder: MakeFolder) -> None:
    folder = image_folder("colors")
    Image.fromarray(np.array([[0, 3000], [30000, 5]], dtype=kind)).save(folder / "red" / "cells.tif")
    with pytest.raises(RecipeError, match=rf"cells.tif' cannot be used: images must have 8 bits .* got mode {mode};"):
        load_data(str(folder), seed=0)


def test_broken_images_are_all_named_before_training(image_folder: MakeFolder) -> None:
    folder = image_folder("colors", number=10)
    for name in ("0.png", "1.png"):
        (folder / "red" / name).write_bytes((folder / "red" / name).read_bytes()[:40])
    (folder / "green" / "2.png").write_bytes(b"")
    message = r"3 of 20 files: .*green.2\.png' cannot be read .* Repair or remove it\. '.*red.0\.png'.*red.1\.png'"
    with pytest.raises(RecipeError, match=message):
        load_data(str(folder), seed=0)


FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {},
    "progressive.jpg": {"progressive": True},
    "png": {},
    "webp": {},
    "gif": {},
    "bmp": {},
    "tif": {},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_images_that_are_cut_off_inside_their_pixels_are_found(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"photo.{kind}"
    Image.effect_noise((60, 40), 90).convert("RGB").save(file, **FORMATS[kind])
    check_image(str(file))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(ImageError, match=r"photo\..*' cannot be read as an image .* Repair or remove it\."):
        check_image(str(file))


def test_a_jpeg_with_something_behind_its_end_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    Image.effect_noise((60, 40), 90).convert("RGB").save(file)
    whole = file.read_bytes()
    file.write_bytes(whole + bytes(10))
    check_image(str(file))
    file.write_bytes(whole[:900] + bytes(10))
    with pytest.raises(ImageError, match="truncated"):
        check_image(str(file))


def test_no_pixels_are_decoded_of_jpegs_that_end_as_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(image: Image.Image) -> None:
        raise AssertionError("decoded")

    for name in ("photo.jpg", "photo.png", "photo.webp"):
        Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / name)
    monkeypatch.setattr(JpegImageFile, "load", refuse)
    monkeypatch.setattr(PngImageFile, "load", refuse)
    for name in ("photo.jpg", "photo.png", "photo.webp"):
        check_image(str(tmp_path / name))


def test_many_files_are_checked_by_several_processes(image_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder("colors")
    files = [str(file) for file in sorted(folder.glob("*/*.png"))]
    Path(files[3]).write_bytes(b"")
    used = []
    context = images.multiprocessing.get_context("spawn")
    monkeypatch.setattr(images, "FILES_PER_PROCESS", 5)
    monkeypatch.setattr(images.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(images.multiprocessing, "get_context", lambda kind: used.append(kind) or context)
    with pytest.raises(RecipeError, match=rf"{Path(files[3]).name}' cannot be read"):
        check_all(check_image, files, "Checking")
    assert used == ["spawn"]


def test_an_image_that_breaks_behind_its_header_is_named_when_it_is_read(
    image_folder: MakeFolder, checkpoint: Path
) -> None:
    folder = image_folder("colors", number=10)
    processor = load_image_processor(str(checkpoint))
    rows = to_inputs(load_data(str(folder), seed=0)["train"], processor)
    assert rows[:2]["pixel_values"].shape[:2] == (2, 3)
    for file in folder.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(ImageError, match=r"\d\.png' cannot be read as an image .*Repair or remove it"):
        rows[:2]


def test_an_image_that_its_decoder_refuses_by_another_error_is_named(tmp_path: Path) -> None:
    """PIL raises a ValueError for texts in a PNG file that are too long."""
    texts = PngInfo()
    texts.add_text("comment", "a" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png", pnginfo=texts)
    for read in (check_image, read_image):
        with pytest.raises(ImageError, match=r"photo\.png' cannot be read as an image \(Decompressed data too large"):
            read(str(tmp_path / "photo.png"))


def test_images_are_rotated_by_their_exif_orientation(tmp_path: Path) -> None:
    photo = Image.new("RGB", (4, 2))
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6  # rotated by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    with open_image(tmp_path / "photo.jpg") as opened:
        assert to_rgb(opened).size == (2, 4)


# -- columns of datasets ----------------------------------------------------------------------------------------------


def make_dataset(labels: list[Any], kind: Any, **columns: list[Any]) -> Dataset:
    pictures = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
    features = Features({"photo": ImageFeature(), "kind": kind, **{name: Value("int64") for name in columns}})
    return Dataset.from_dict({"photo": pictures, "kind": labels, **columns}, features=features)


def on_hub(monkeypatch: pytest.MonkeyPatch, **splits: Dataset) -> None:
    monkeypatch.setattr(folders, "load_dataset", lambda name: DatasetDict(**splits))


def test_columns_are_found_by_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_dataset([0, 1] * 5, ClassLabel(names=["cat", "dog"]), width=[8] * 10)
    on_hub(monkeypatch, train=rows, validation=rows, extra=rows)
    splits = load_data("someone/pets", seed=0)
    assert list(splits) == ["train", "test"] and splits["test"].column_names == ["image", "label"]
    assert splits["test"]["label"][:3] == [0, 1, 0]


def test_a_column_of_strings_becomes_classes_shared_by_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = make_dataset(["dog", "cat", "owl"], Value("string")), make_dataset(["owl"], Value("string"))
    on_hub(monkeypatch, train=train, test=test)
    with pytest.raises(RecipeError, match=r"one column of type ClassLabel, got 0 .* Select it by --label-column"):
        load_data("someone/pets", seed=0)
    splits = load_data("someone/pets", seed=0, label_column="kind")
    assert splits["train"].features["label"].names == ["cat", "dog", "owl"]
    assert splits["test"]["label"][:] == [2]


@pytest.mark.parametrize("kind", [Value("string"), ClassLabel(names=["owl", "cat"])])
def test_a_test_split_with_other_classes_is_an_error(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Value("string") if kind == Value("string") else ClassLabel(names=["cat", "dog"])
    on_hub(monkeypatch, train=make_dataset(["dog", "cat"], own), test=make_dataset(["owl"], kind))
    with pytest.raises(RecipeError, match="must have the classes cat, dog, got owl"):
        load_data("someone/pets", seed=0, label_column="kind")


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (None, "colour", "must have the column colour, got photo, kind"),
        (None, "photo", "must be different columns, got photo for both"),
        ("kind", "photo", r"got kind \(ClassLabel\) and photo \(Image\)"),
    ],
)
def test_wrong_columns_are_errors(image: str | None, label: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        select_columns(make_dataset([0, 1], ClassLabel(names=["a", "b"])), "pets", image, label)


# -- image processors -------------------------------------------------------------------------------------------------


def test_test_images_are_preprocessed_by_the_image_processor(checkpoint: Path) -> None:
    processor = load_image_processor(str(checkpoint))
    rows = select_columns(make_dataset([0, 1], ClassLabel(names=["a", "b"])), "pets", None, None)
    (first, _) = to_inputs(rows, processor)[:]["pixel_values"]
    expected = processor(Image.new("RGB", (8, 8), (0, 0, 0)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(first, expected)
    cropped = to_inputs(rows, processor, RandomCropAndFlip((16, 16)))[0]["pixel_values"]
    black = torch.tensor([-0.1 / 0.4, -0.2 / 0.5, -0.3 / 0.6]).view(3, 1, 1)
    torch.testing.assert_close(cropped, black.expand(3, 16, 16))


def test_the_image_processor_makes_images_of_another_size_on_request(checkpoint: Path) -> None:
    processor = load_image_processor(str(checkpoint), (24, 32))
    assert processor(Image.new("RGB", (40, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 24, 32)
    assert processor.image_mean == pytest.approx((0.1, 0.2, 0.3))


def test_an_unreadable_image_processor_is_an_error_but_a_missing_one_is_not(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "preprocessor_config.json").write_text("{")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_image_processor(str(model))
    (model / "preprocessor_config.json").unlink()
    assert list(load_image_processor(str(model)).image_mean) == HALF
    assert "has no image processor" in capsys.readouterr().err


def test_an_image_processor_that_cannot_be_looked_up_offline_is_an_error(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.client(token="hf_me"):
        for name in ("me/bare", "me/not-cached"):
            create_repo(name)
            upload_folder(repo_id=name, folder_path=checkpoint, ignore_patterns=["preprocessor_config.json"])
            assert AutoConfig.from_pretrained(name).image_size == 16
        assert list(load_image_processor("me/bare").image_mean) == HALF
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert list(load_image_processor("me/bare").image_mean) == HALF, "known from the cache"
        with pytest.raises(RecipeError, match="image processor of 'me/not-cached' cannot be read"):
            load_image_processor("me/not-cached")


# -- augmentation -----------------------------------------------------------------------------------------------------


def test_crops_have_the_requested_size_and_half_of_them_are_flipped() -> None:
    ramp = Image.linear_gradient("L").rotate(90).resize((60, 40)).convert("RGB")  # brighter to one side

    def is_darker_on_the_left(augment: RandomCropAndFlip) -> bool:
        result, mask = augment(ramp)
        assert result.size == (24, 16) and mask is None
        return result.getpixel((0, 8))[0] < result.getpixel((23, 8))[0]

    augment = RandomCropAndFlip((16, 24))
    assert 60 < sum(is_darker_on_the_left(augment) for _ in range(200)) < 140
    straight = RandomCropAndFlip((16, 24), flip=False)
    assert len({is_darker_on_the_left(straight) for _ in range(50)}) == 1


def test_crops_are_determined_by_the_torch_seed() -> None:
    noise = Image.effect_noise((40, 40), 80).convert("RGB")
    augment = RandomCropAndFlip((16, 16))
    crops = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        crops.append(augment(noise)[0].tobytes())
    assert crops[0] == crops[1] != crops[2]


def test_crops_respect_the_bounds_of_area_and_aspect_ratio() -> None:
    augment = RandomCropAndFlip((16, 16), min_crop=0.5)
    for _ in range(200):
        left, top, width, height = augment.random_box(100, 80)
        assert 0 <= left <= 100 - width and 0 <= top <= 80 - height
        assert 0.48 < width * height / 8000 <= 1.0
        assert 0.73 < width / height < 1.37
    assert augment.random_box(100, 5) == (46, 0, 7, 5), "fallback: the largest centred crop"
    assert augment.random_box(1, 1) == (0, 0, 1, 1)


def test_a_mask_is_cropped_and_flipped_with_its_image() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    mask = Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST)  # twice the resolution
    augment = RandomCropAndFlip((8, 8), min_crop=0.3, resample=Image.Resampling.NEAREST)
    for seed in range(10):
        torch.manual_seed(seed)
        image, labels = augment(Image.fromarray(pixels), mask)
        assert labels is not None and np.abs(np.array(image).astype(int) - np.array(labels)).max() <= 17, "by a pixel"
    whole = RandomCropAndFlip((16, 16), min_crop=1, flip=False, resample=Image.Resampling.NEAREST)
    image, labels = whole(Image.fromarray(pixels), mask)
    assert labels is not None and np.array_equal(np.array(image), pixels) and np.array_equal(np.array(labels), pixels)


def test_a_crop_area_of_zero_is_an_error() -> None:
    with pytest.raises(RecipeError, match="above 0 and at most 1, got 0"):
        RandomCropAndFlip((16, 16), min_crop=0)
