"""The example with Trainer: datasets, augmentation, training, plots, the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import digits
import plots
import pytest
import repository
import torch
import train_image_classification as example
import trainer_data
import trainer_tools
from augmentation import RandomCropAndFlip, has_torchvision
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from helpers.hub_server import HubServer
from helpers.plots import assert_is_plot
from huggingface_hub import constants, create_repo, upload_folder
from images import HALF, DataError, Preprocessing
from PIL import Image
from safetensors.torch import load_file
from training import METHODS
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    SwinConfig,
    SwinForImageClassification,
)

from vpt_peft import VPTModel

Run = Callable[..., Path]
WITH_TORCHVISION = pytest.param(True, marks=pytest.mark.skipif(not has_torchvision(), reason="without torchvision"))


@pytest.fixture
def run(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Run:
    """Runs the example with a tiny ViT on colored images. Returns the output folder."""
    data = image_folder("colors", "red green blue", splits=("train", "test"))

    def start(*options: str, output: str = "out", epochs: int = 1, model: Path = checkpoint) -> Path:
        folder = tmp_path / output
        example.main(
            ["--model", str(model), "--data", str(data), "--epochs", str(epochs), "--output", str(folder), *options]
        )
        return folder

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# -- the script -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.config is not None])
def test_each_method_saves_an_adapter_with_labels_processor_card_and_results(
    method: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("--method", method)

    printed, progress = capsys.readouterr()
    assert "test accuracy" in printed and "images/s" in printed and "memory" in printed
    assert f"{METHODS[method].title}, seed 0" in progress
    assert re.search(r"epoch 1 of 1: loss .*, accuracy .* %", progress)
    assert json.loads((folder / "adapter_config.json").read_text())["id2label"] == {
        "0": "blue",
        "1": "green",
        "2": "red",
    }
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]) == ([0.1, 0.2, 0.3], {"height": 16, "width": 16})
    card = (folder / "README.md").read_text()
    assert "| accuracy, % of 15 test images |" in card and "colors" in card
    results = json.loads((folder / "results.json").read_text())
    assert sum(map(sum, results["confusion"])) == 15
    assert results["runs"][0]["images_per_second"] > 0
    assert str(folder.parent) not in json.dumps(results), "no paths of this machine"


@pytest.mark.usefixtures("rendered_plots")
def test_run_plots_learning_curve_and_confusion_matrix(run: Run) -> None:
    folder = run("--method", "linear")
    for name in ("learning_curve.png", "confusion_matrix.png"):
        assert_is_plot(folder / name)


def test_full_fine_tuning_saves_the_full_model(run: Run, checkpoint: Path) -> None:
    folder = run("--method", "full", epochs=2)

    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, folder))
    assert not torch.equal(before["vit.embeddings.cls_token"], after["vit.embeddings.cls_token"])
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[2] == "red"
    assert "| accuracy, % of 15 test images |" in (folder / "README.md").read_text()
    assert (folder / "confusion_matrix.png").is_file()


def test_checkpoints_contain_the_adapter_without_the_backbone(run: Run) -> None:
    (checkpoint,) = (run() / "seed-0").iterdir()
    assert (checkpoint / "adapter_config.json").is_file()
    keys = weights(checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() == {f"adapters.default.{key}" for key in keys}
    assert {name.split(".")[0] for name in keys} == {"prompts", "head"}


@pytest.mark.parametrize("kind", ["swin", "beit"])
def test_other_backbones_are_fine_tuned(kind: str, run: Run, tmp_path: Path) -> None:
    small: dict[str, Any] = {"image_size": 16, "patch_size": 4}
    if kind == "swin":
        config: Any = SwinConfig(**small, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
        SwinForImageClassification(config).save_pretrained(tmp_path / kind)
    else:
        config = BeitConfig(**small, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16)
        BeitForImageClassification(config).save_pretrained(tmp_path / kind)

    folder = run("--method", "vpt-shallow", model=tmp_path / kind)

    assert json.loads((folder / "adapter_config.json").read_text())["model_type"] == kind
    assert json.loads((folder / "preprocessor_config.json").read_text())["size"] == {"height": 16, "width": 16}


def test_several_seeds_give_mean_and_standard_deviation(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run("--seeds", "3", "4", epochs=2)

    assert "±" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert [entry["seed"] for entry in results["runs"]] == [3, 4]
    assert "mean accuracy of 2 seeds" in (folder / "README.md").read_text()
    (third,) = (folder / "seed-3").iterdir()
    (fourth,) = (folder / "seed-4").iterdir()
    assert all(torch.equal(tensor, weights(third)[name]) for name, tensor in weights(folder).items())
    assert not torch.equal(weights(third)["prompts.0"], weights(fourth)["prompts.0"])


def test_resumed_run_gives_the_same_adapter_as_an_uninterrupted_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(epochs=3, output="whole")

    def interrupt(self: Any, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if state.epoch >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(trainer_tools.Throughput, "on_epoch_end", interrupt)
        run(epochs=3)
    epochs: list[float] = []
    monkeypatch.setattr(
        trainer_tools.Throughput, "on_epoch_begin", lambda self, args, state, *_, **__: epochs.append(state.epoch)
    )
    resumed = run("--resume", epochs=3)

    assert epochs == [1, 2], "the first epoch is not repeated"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    histories = [json.loads((folder / "results.json").read_text())["histories"]["0"] for folder in (whole, resumed)]
    losses = [[entry["eval_loss"] for entry in history if "eval_loss" in entry] for history in histories]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_existing_run_is_not_overwritten(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    with pytest.raises(SystemExit):
        run()
    assert "Add --resume" in capsys.readouterr().err


def test_resuming_with_changed_settings_or_data_is_an_error(run: Run, tmp_path: Path) -> None:
    run()
    with pytest.raises(SystemExit, match="num_tokens None, not 3"):
        run("--resume", "--num-tokens", "3")
    with pytest.raises(SystemExit, match="first seed 0, not 1"):  # another test split
        run("--resume", "--seeds", "1")
    run("--resume", "--seeds", "0", "1")
    (tmp_path / "colors/train/red/0.png").unlink()
    with pytest.raises(SystemExit, match="train images 15, not 14"):
        run("--resume")


def test_best_epoch_is_selected_on_a_validation_split(run: Run, used_rows: list[tuple[str, set[bytes]]]) -> None:
    folder = run("--keep-best", "--num-tokens", "3", epochs=3)

    (_, training), (_, validation), (_, test) = used_rows
    assert [purpose for purpose, _ in used_rows] == ["for_training", "for_testing", "for_testing"]
    assert (len(training), len(validation), len(test)) == (13, 2, 15)
    assert not training & validation
    history = json.loads((folder / "results.json").read_text())["histories"]["0"]
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    steps = [entry["step"] for entry in history if "eval_accuracy" in entry]
    best = folder / "seed-0" / f"checkpoint-{steps[accuracies.index(max(accuracies))]}"
    assert all(torch.equal(tensor, weights(best)[name]) for name, tensor in weights(folder).items())
    assert len(weights(folder)["prompts.0"]) == 3


def test_training_with_bfloat16_checkpointing_and_accumulation_saves_float32(run: Run) -> None:
    options = ("--precision", "bf16", "--gradient-checkpointing", "--accumulate", "2", "--batch-size", "4", "--no-flip")
    assert all(tensor.dtype == torch.float32 for tensor in weights(run(*options)).values())


@pytest.mark.usefixtures("few_digits")
def test_example_uses_digits_by_default(tmp_path: Path) -> None:
    example.main(["--epochs", "1", "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert (results["model"], results["data"]) == ("small ViT", "handwritten digits 5 to 9")
    assert sum(map(sum, results["confusion"])) == 70


def test_learning_rates_of_the_command_line_replace_the_methods() -> None:
    def rates(*options: str) -> tuple[float, float | None]:
        method = example.build_method(example.arguments(options))
        return method.learning_rate, method.head_learning_rate

    default = digits.SMALL_METHODS["linear"]
    assert rates("--method", "linear") == (default.learning_rate, default.head_learning_rate)
    assert rates("--method", "linear", "--learning-rate", "0.5") == (0.5, None), "only the head is trained"
    assert rates("--learning-rate", "0.5", "--head-learning-rate", "0") == (0.5, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--min-crop", "0"], "--min-crop must be above 0 and at most 1, got 0"),
        (["--accumulate", "0"], "--accumulate must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--seeds", "0", "0"], "--seeds must be different and at least 0, got 0 0"),
        (["--learning-rate", "nan"], "--learning-rate: must be a number of at least 0, got nan"),
        (["--head-learning-rate", "-1"], "--head-learning-rate: must be a number of at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_errors(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--data", "nowhere"],
            "folder of images per class, or the name of an image dataset on the Hub, got",
        ),
        (["--model", "nowhere/at-all"], "name or folder of a vision checkpoint, got 'nowhere/at-all'"),
        (["--method", "linear", "--num-tokens", "5"], "requires a method with prompts, got --method linear"),
        (["--label-column", "kind"], "must have the column kind, got image, label"),
        (["--label-column", "image"], "must be different columns, got image for both"),
        (["--image-column", "label", "--label-column", "image"], r"got label \(ClassLabel\) and image \(Image\)"),
    ],
)
def test_example_exits_with_a_message_for_invalid_models_data_and_columns(
    options: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(*options)


# -- the Hub --------------------------------------------------------------------------------------------------------


def test_pushed_adapter_is_loaded_with_its_processor_and_card(hub: HubServer, run: Run, checkpoint: Path) -> None:
    with hub.client(token="hf_me"):
        folder = run("--push-to-hub", "me/colors", "--private")
        pixels = torch.rand(2, 3, 16, 16)
        loaded = [
            VPTModel.from_pretrained(AutoModelForImageClassification.from_pretrained(checkpoint), source)
            for source in (folder, "me/colors")
        ]
        processor = trainer_data._from_pretrained("me/colors")  # AutoImageProcessor, if it works without torchvision

    assert torch.equal(loaded[0](pixels).logits, loaded[1](pixels).logits)
    assert processor.image_mean == pytest.approx((0.1, 0.2, 0.3))
    assert hub.repo("me/colors").private
    card = hub.repo("me/colors").files()["README.md"].decode()
    assert "| accuracy, % of 15 test images |" in card and "pipeline_tag: image-classification" in card
    assert "| training data | colors (a folder) |" in card and "datasets:" not in card
    assert 'VPTModel.from_pretrained(model, "me/colors")' in card, "the backbone is a folder here"
    assert "| learning rate | 0.003 |" in card and "| epochs |" in card and str(checkpoint) not in card

    hub.repo("me/colors").put({"README.md": f"{card}\nEdited by hand.\n".encode()})
    with hub.client(token="hf_me"):
        run("--resume", "--push-to-hub", "me/colors")
    assert "Edited by hand." in hub.repo("me/colors").files()["README.md"].decode()


def test_repository_without_owner_is_created_for_the_user(hub: HubServer, run: Run) -> None:
    with hub.client(token="hf_me"):
        run("--method", "linear", "--push-to-hub", "colors")
    assert 'from_pretrained(model, "me/colors")' in hub.repo("me/colors").files()["README.md"].decode()


@pytest.mark.parametrize(
    ("method", "file", "message"),
    [
        ("linear", "model.safetensors", "'me/colors' contains a model"),
        ("full", "adapter_config.json", "'me/colors' on the Hub contains an adapter"),
    ],
)
def test_repository_with_a_model_of_another_kind_is_an_error_before_training(
    method: str, file: str, message: str, hub: HubServer, run: Run, tmp_path: Path
) -> None:
    hub.add_repo("me/colors", {file: b"{}"})
    with hub.client(token="hf_me"), pytest.raises(SystemExit, match=message):
        run("--method", method, "--push-to-hub", "me/colors")
    assert not list(tmp_path.glob("out/seed-*"))


@pytest.mark.parametrize("name", ["someone/colors", "no/such/name"])
def test_repository_that_cannot_be_created_is_an_error_before_training(
    name: str, hub: HubServer, run: Run, tmp_path: Path
) -> None:
    with hub.client(token="hf_me"), pytest.raises(SystemExit, match=f"'{name}' on the Hub could not be created"):
        run("--push-to-hub", name)
    assert not list(tmp_path.glob("out/seed-*"))


@pytest.mark.parametrize("step", ["hf_hub_download", "upload_folder"])
def test_failed_push_leaves_everything_saved_locally(
    step: str, hub: HubServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("no connection")

    monkeypatch.setattr(repository, step, fail)
    with (
        hub.client(token="hf_me"),
        pytest.raises(SystemExit, match=r"on the Hub could not be .* no connection"),
    ):
        run("--method", "linear", "--push-to-hub", "me/colors")
    assert {"adapter_model.safetensors", "README.md", "results.json", "learning_curve.png"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_full_model_is_pushed_without_checkpoints(hub: HubServer, run: Run) -> None:
    with hub.client(token="hf_me"):
        run("--method", "full", "--push-to-hub", "me/whole")
        assert AutoModelForImageClassification.from_pretrained("me/whole").config.id2label[0] == "blue"
    files = set(hub.repo("me/whole").files())
    assert files - {".gitattributes"} == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    card = hub.repo("me/whole").files()["README.md"].decode()
    assert "base_model" not in card and "huggingface.co" not in card, "the backbone is a folder here"

    hub.repo("me/whole").put({"README.md": f"{card.replace('fine-tuned', 'trained')}\nEdited by hand.\n".encode()})
    with hub.client(token="hf_me"):
        run("--method", "full", "--resume", "--push-to-hub", "me/whole")
    assert hub.repo("me/whole").files()["README.md"].decode() == f"{card}\nEdited by hand.\n"


# -- datasets -------------------------------------------------------------------------------------------------------


def make_dataset(labels: list[Any], kind: Any, **columns: list[Any]) -> Dataset:
    images = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(len(labels))]
    features = Features({"photo": ImageFeature(), "kind": kind, **{name: Value("int64") for name in columns}})
    return Dataset.from_dict({"photo": images, "kind": labels, **columns}, features=features)


def test_columns_are_found_by_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_dataset([0, 1] * 5, ClassLabel(names=["cat", "dog"]), width=[8] * 10)
    monkeypatch.setattr(trainer_data, "load_dataset", lambda name: DatasetDict(train=rows, validation=rows))
    splits = trainer_data.load_data("someone/pets", seed=0)
    assert splits["test"].column_names == ["image", "label"]
    assert splits["test"]["label"][:3] == [0, 1, 0]


def test_column_of_strings_becomes_classes_shared_by_the_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    train = make_dataset(["dog", "cat", "owl"], Value("string"))
    test = make_dataset(["owl"], Value("string"))
    monkeypatch.setattr(trainer_data, "load_dataset", lambda name: DatasetDict(train=train, test=test))
    with pytest.raises(DataError, match=r"one column of type ClassLabel, got 0 .* Select it by --label-column"):
        trainer_data.load_data("someone/pets", seed=0)
    splits = trainer_data.load_data("someone/pets", seed=0, label_column="kind")
    assert splits["train"].features["label"].names == ["cat", "dog", "owl"]
    assert splits["test"]["label"][:] == [2]


@pytest.mark.parametrize("kind", [Value("string"), ClassLabel(names=["owl", "cat"])])
def test_test_split_with_other_classes_is_an_error(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    train = make_dataset(
        ["dog", "cat"], Value("string") if kind == Value("string") else ClassLabel(names=["cat", "dog"])
    )
    monkeypatch.setattr(
        trainer_data, "load_dataset", lambda name: DatasetDict(train=train, test=make_dataset(["owl"], kind))
    )
    with pytest.raises(DataError, match=r"must have the classes \['cat', 'dog'\], got \['owl'"):
        trainer_data.load_data("someone/pets", seed=0, label_column="kind")


def test_classes_of_a_folder_without_training_images_are_an_error(image_folder: Callable[..., Path]) -> None:
    folder = image_folder("colors", splits=("train", "test"))
    image_folder("colors", classes="blue", splits=("test",))
    with pytest.raises(DataError, match="only classes of its training images, but also have blue"):
        trainer_data.load_data(str(folder), seed=0)


def test_folder_without_class_folders_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / f"{index}.png")
    with pytest.raises(DataError, match="must contain one folder of images per class, at least two"):
        trainer_data.load_data(str(tmp_path), seed=0)


def test_error_for_a_broken_image_in_a_dataset_names_it(image_folder: Callable[..., Path], checkpoint: Path) -> None:
    folder = image_folder("colors", number=10)
    processor = trainer_data.load_image_processor(str(checkpoint))
    rows = trainer_data.with_preprocessing(trainer_data.load_data(str(folder), seed=0)["train"], processor)
    assert rows[:2]["pixel_values"].shape[:2] == (2, 3)
    gray = rows.cast_column("image", ImageFeature(mode="L")).with_format(None)
    pixels = trainer_data.with_preprocessing(gray, processor)[0]["pixel_values"]
    std, mean = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    channels = pixels * std + mean
    torch.testing.assert_close(channels, channels[:1].expand_as(channels))  # the dataset's mode is grayscale
    for file in folder.glob("*/*.png"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"\d\.png' cannot be read as an image: .*Repair or remove it"):
        rows[:2]


def test_dataset_without_a_test_split_is_split_by_class(image_folder: Callable[..., Path]) -> None:
    splits = trainer_data.load_data(str(image_folder("colors", number=10)), seed=0)
    assert sorted(splits["test"]["label"]) == [0, 0, 1, 1]
    assert len(splits["train"]) == 16


def test_test_images_are_preprocessed_by_the_image_processor(checkpoint: Path) -> None:
    processor = trainer_data.load_image_processor(str(checkpoint))
    rows = trainer_data.select_columns(make_dataset([0, 1], ClassLabel(names=["a", "b"])), "pets", None, None)
    (first, _) = trainer_data.with_preprocessing(rows, processor)[:]["pixel_values"]
    expected = processor(Image.new("RGB", (8, 8), (0, 0, 0)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(first, expected)
    cropped = trainer_data.with_preprocessing(rows, processor, RandomCropAndFlip((16, 16)))[0]["pixel_values"]
    black = torch.tensor([-0.1 / 0.4, -0.2 / 0.5, -0.3 / 0.6]).view(3, 1, 1)
    torch.testing.assert_close(cropped, black.expand(3, 16, 16))


def test_unreadable_image_processor_is_an_error_but_a_missing_one_is_not(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    (model / "preprocessor_config.json").write_text("{")
    for load in (trainer_data.load_image_processor, Preprocessing.from_checkpoint):
        with pytest.raises(DataError, match="cannot be read"):
            load(str(model))
    (model / "preprocessor_config.json").unlink()
    assert trainer_data.load_image_processor(str(model)).image_mean == HALF
    assert Preprocessing.from_checkpoint(str(model)).mean == HALF
    assert capsys.readouterr().err.count("has no image processor") == 2


def test_image_processor_that_cannot_be_looked_up_offline_is_an_error(
    hub: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.client(token="hf_me"):
        for name in ("me/bare", "me/not-cached"):
            create_repo(name)
            upload_folder(repo_id=name, folder_path=checkpoint, ignore_patterns=["preprocessor_config.json"])
            assert AutoConfig.from_pretrained(name).image_size == 16
        assert trainer_data.load_image_processor("me/bare").image_mean == HALF
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert trainer_data.load_image_processor("me/bare").image_mean == HALF, "known from the cache"
        with pytest.raises(DataError, match="image processor of 'me/not-cached' cannot be read"):
            trainer_data.load_image_processor("me/not-cached")


# -- augmentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torchvision", [False, WITH_TORCHVISION])
def test_crops_have_the_requested_size_and_half_of_them_are_flipped(torchvision: bool) -> None:
    ramp = Image.linear_gradient("L").rotate(90).resize((60, 40)).convert("RGB")  # brighter to one side
    augment = RandomCropAndFlip((16, 24), torchvision=torchvision)
    left_to_right = []
    for _ in range(200):
        result = augment(ramp)
        assert result.size == (24, 16)
        left_to_right.append(result.getpixel((0, 8))[0] < result.getpixel((23, 8))[0])
    assert 60 < sum(left_to_right) < 140
    straight = RandomCropAndFlip((16, 24), flip=False, torchvision=torchvision)
    assert len({(r := straight(ramp)).getpixel((0, 8))[0] < r.getpixel((23, 8))[0] for _ in range(50)}) == 1


@pytest.mark.parametrize("torchvision", [False, WITH_TORCHVISION])
def test_crops_are_determined_by_the_torch_seed(torchvision: bool) -> None:
    noise = Image.effect_noise((40, 40), 80).convert("RGB")
    augment = RandomCropAndFlip((16, 16), torchvision=torchvision)
    crops = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        crops.append(augment(noise).tobytes())
    assert crops[0] == crops[1] != crops[2]


def test_crops_respect_the_bounds_of_area_and_aspect_ratio() -> None:
    augment = RandomCropAndFlip((16, 16), min_crop=0.5)
    for _ in range(200):
        left, top, width, height = augment.random_box(100, 80)
        assert 0 <= left <= 100 - width and 0 <= top <= 80 - height
        assert 0.48 < width * height / 8000 <= 1.0
        assert 0.73 < width / height < 1.37
    assert augment.random_box(100, 5) == (46, 0, 7, 5), "fallback: the largest centred crop"


def test_crop_area_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        RandomCropAndFlip((16, 16), min_crop=0)


# -- plots ----------------------------------------------------------------------------------------------------------


def test_confusion_matrix_counts_predictions_by_true_class() -> None:
    assert plots.confusion([0, 0, 1, 2], [0, 1, 1, 0], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("number", [2, 40])
@pytest.mark.usefixtures("rendered_plots")
def test_confusion_matrix_is_plotted_for_few_and_many_classes(number: int, tmp_path: Path) -> None:
    names = [f"class {index} with a long name" for index in range(number)]
    plots.confusion_matrix(tmp_path / "matrix.png", plots.confusion([0, 1], [1, 1], number), names, "Colors")
    assert_is_plot(tmp_path / "matrix.png")
