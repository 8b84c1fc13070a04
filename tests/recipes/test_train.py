"""``vpt-peft train`` for classification: what it saves, says, continues and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.plots import assert_is_plot
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinConfig,
    SwinForImageClassification,
    ViTImageProcessorPil,
)

import vpt_peft
from vpt_peft.recipes.command import parse
from vpt_peft.recipes.commands import train as train_module
from vpt_peft.recipes.data import folders
from vpt_peft.recipes.report import plots
from vpt_peft.recipes.runtime import choose_precision
from vpt_peft.recipes.training import trainer
from vpt_peft.recipes.training.methods import METHODS, SMALL_METHODS, find_projections

Train = Callable[..., Any]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


# -- what is saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.config is not None])
def test_each_method_saves_an_adapter_with_labels_processor_card_and_results(
    method: str, train: Train, tmp_path: Path
) -> None:
    done, folder = train("--method", method), tmp_path / "out"
    assert "test accuracy" in done.out and "images/s" in done.out and "memory" in done.out
    assert f"{METHODS[method].title}, seed 0" in done.err
    assert re.search(r"epoch 1 of 1: loss .*, accuracy .* %", done.err)
    labels = json.loads((folder / "adapter_config.json").read_text())["id2label"]
    assert labels == {"0": "blue", "1": "green", "2": "red"}
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]) == ([0.1, 0.2, 0.3], {"height": 16, "width": 16})
    card = (folder / "README.md").read_text()
    assert "| accuracy, % of 15 test images |" in card and "colors (a folder)" in card
    found = results(folder)
    assert sum(map(sum, found["confusion"])) == 15
    assert found["runs"][0]["images_per_second"] > 0
    assert str(folder.parent) not in json.dumps(found), "no paths of this machine"


def test_results_and_card_have_the_effective_settings_and_the_scores_of_each_class(
    train: Train, tmp_path: Path
) -> None:
    done, folder = (
        train("--method", "vpt-prefix-bias", "--batch-size", 5, "--accumulate", 2, epochs=2),
        tmp_path / "out",
    )
    settings, found = results(folder)["settings"], results(folder)
    expected = {
        "method": "vpt-prefix-bias", "prompt length": 10, "learning rate": 0.03, "head learning rate": 0.01,
        "bias learning rate": 0.003, "weight decay": 0.01, "epochs": 2, "steps": 4, "batch size": 10, "accumulate": 2,
        "image size": "16 x 16", "min crop": 0.08, "flip": True, "training images": 15, "precision": "fp32",
        "device": "cpu", "seed": 0,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    card = (folder / "README.md").read_text()
    assert all(f"| {name} | {value} |" in card for name, value in expected.items())
    assert found["histories"]["0"][-1]["step"] == 4
    assert found["chance"] == pytest.approx(100 / 3)
    right = sum(found["confusion"][label][label] for label in range(3))
    assert found["metrics"]["accuracy, % of 15 test images"] == pytest.approx(100 * right / 15)
    for label, row in enumerate(found["labels"]):
        predicted = sum(counts[label] for counts in found["confusion"])
        correct = found["confusion"][label][label]
        assert (row["support"], row["recall"]) == (5, pytest.approx(20 * correct))
        assert row["precision"] == (None if predicted == 0 else pytest.approx(100 * correct / predicted, abs=0.01))
        assert f"| {row['label']} " in done.out


@pytest.mark.usefixtures("rendered_plots")
def test_the_learning_curve_has_training_accuracy_and_chance(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, Any] = {}
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        drawn[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    train("--method", "linear", epochs=2)
    for name in ("learning_curve.png", "confusion_matrix.png"):
        assert_is_plot(tmp_path / "out" / name)
    losses, accuracies = drawn["learning_curve.png"].axes
    assert [line.get_label() for line in losses.lines] == ["training", "test"]
    assert [line.get_label() for line in accuracies.lines] == ["training", "test", "chance"]
    assert accuracies.lines[2].get_ydata()[0] == pytest.approx(100 / 3)
    history = results(tmp_path / "out")["histories"]["0"]
    training = [entry["accuracy"] for entry in history if "loss" in entry]
    assert list(accuracies.lines[0].get_ydata()) == training and len(training) == 2
    confusion = drawn["confusion_matrix.png"].axes[0]
    assert (confusion.get_xlabel(), confusion.get_ylabel()) == ("predicted", "true")


@pytest.mark.parametrize("number", [2, 40])
@pytest.mark.usefixtures("rendered_plots")
def test_the_confusion_matrix_is_plotted_for_few_and_many_classes(number: int, tmp_path: Path) -> None:
    names = [f"class {index} with a long name" for index in range(number)]
    plots.confusion_plot(tmp_path / "matrix.png", torch.eye(number, dtype=int).numpy(), names, "Colors")
    assert_is_plot(tmp_path / "matrix.png")


@pytest.mark.usefixtures("rendered_plots")
def test_a_confusion_matrix_of_large_numbers_shows_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    for counts in ([[75_000, 25_000], [100, 99_900]], [[75, 25], [0, 10]]):
        plots.confusion_plot(tmp_path / "matrix.png", np.array(counts), ["sky", "road"], "Scenes")
    shown = [[text.get_text() for text in figure.axes[0].texts] for figure in drawn]
    assert shown == [["75 %", "25 %", "", "100 %"], ["75", "25", "10"]]


def test_full_fine_tuning_saves_the_full_model(train: Train, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    train("--method", "full", epochs=2)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, folder))
    assert not torch.equal(before["vit.embeddings.cls_token"], after["vit.embeddings.cls_token"])
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[2] == "red"
    assert "| accuracy, % of 15 test images |" in (folder / "README.md").read_text()
    assert not (folder / "adapter_config.json").exists()


def test_lora_trains_query_and_value_projections_and_the_head(train: Train, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    train("--method", "lora")
    names = {name.rpartition(".base_model.model.")[2] for name in weights(tmp_path / "out")}
    assert len(names) == 2 * 2 * 2 + 2, "2 layers, 2 projections, 2 factors, and the head's weight and bias"
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    method = METHODS["lora"]
    groups = method.parameter_groups(tuned := method.attach(model), weight_decay=0.1)
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(3e-3, 0.1), (1e-2, 0.1), (1e-2, 0.0)}
    trained = sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad)
    assert trained == sum(parameter.numel() for group in groups for parameter in group["params"])


def test_lora_without_peft_or_without_attention_is_an_error(
    train: Train, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in train("--method", "lora", ok=False).err
    with pytest.raises(vpt_peft.VPTError, match="but Linear has none"):
        find_projections(torch.nn.Linear(2, 2))


def test_checkpoints_contain_the_adapter_without_the_backbone(train: Train, tmp_path: Path) -> None:
    train("--method", "vpt-deep")
    (checkpoint,) = (tmp_path / "out" / "seed-0").iterdir()
    assert (checkpoint / "adapter_config.json").is_file()
    keys = weights(checkpoint)
    assert load_file(checkpoint / "model.safetensors").keys() == {f"adapters.default.{key}" for key in keys}
    assert {name.split(".")[0] for name in keys} == {"prompts", "head"}


def other_backbone(kind: str, folder: Path) -> Path:
    """A tiny backbone for images of 16 x 16."""
    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
    small: dict[str, Any] = {"image_size": 16, "patch_size": 4}
    torch.manual_seed(0)
    if kind == "swin":
        config: Any = SwinConfig(**small, embed_dim=8, depths=[2], num_heads=[2], window_size=2)
        SwinForImageClassification(config).save_pretrained(folder)
    elif kind == "beit":
        BeitForImageClassification(BeitConfig(**small, **shape, intermediate_size=16)).save_pretrained(folder)
    elif kind == "dinov2":
        Dinov2ForImageClassification(Dinov2Config(**small, **shape, mlp_ratio=2)).save_pretrained(folder)
    else:
        DINOv3ViTModel(DINOv3ViTConfig(**small, **shape, intermediate_size=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["swin", "beit", "dinov2", "dinov3_vit"])
def test_other_backbones_are_fine_tuned(kind: str, train: Train, command: Any, tmp_path: Path) -> None:
    train("--method", "vpt-prefix", model=other_backbone(kind, tmp_path / kind))
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (saved["model_type"], saved["id2label"]["2"]) == (kind, "red")
    done = command("predict", tmp_path / "out", tmp_path / "colors/test/red/0.png", "--format", "json")
    assert {label["label"] for label in json.loads(done.out)[0]["labels"]} == {"red", "green", "blue"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_model_without_a_classifier_gets_one_from_adapters_only(method: str, train: Train, tmp_path: Path) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    done = train("--method", method, model=other_backbone("dinov3_vit", tmp_path / "dinov3"), ok=False)
    assert done.code == 2 and "requires a model with a head, got DINOv3ViTModel" in done.err


def test_several_seeds_give_mean_and_standard_deviation(train: Train, tmp_path: Path) -> None:
    done, folder = train("--method", "vpt-deep", "--seeds", 3, 4, epochs=2), tmp_path / "out"
    assert "±" in done.out
    assert [entry["seed"] for entry in results(folder)["runs"]] == [3, 4]
    assert "mean accuracy of 2 seeds" in (folder / "README.md").read_text()
    (third,), (fourth,) = (folder / "seed-3").iterdir(), (folder / "seed-4").iterdir()
    assert all(torch.equal(tensor, weights(third)[name]) for name, tensor in weights(folder).items())
    assert not torch.equal(weights(third)["prompts.0"], weights(fourth)["prompts.0"])


@pytest.mark.usefixtures("few_digits")
def test_digits_are_the_data_by_default_and_stay_as_images(train: Train, command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    done = command("train", "--epochs", 1, "--output", folder)
    assert done.code == 0 and "Pretraining a small ViT on the handwritten digits 0 to 4." in done.out
    found = results(folder)
    assert (found["model"], found["data"]) == ("small ViT", "handwritten digits 5 to 9")
    assert sum(map(sum, found["confusion"])) == 70
    assert [path.name for path in sorted((folder / "data/train").iterdir())] == list("56789")
    done = command("predict", folder, folder / "data/test/7")
    assert done.code == 0 and done.out.count("/7/") == len(list((folder / "data/test/7").iterdir()))
    again = command("train", "--epochs", 1, "--output", folder, "--resume")
    assert again.code == 0 and "Pretraining" not in again.out


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vpt-deep", "vpt-prefix", "full", "lora"])
def test_position_embeddings_are_interpolated_for_another_image_size(
    method: str, train: Train, command: Any, tmp_path: Path
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    folder = tmp_path / "out"
    train("--method", method, "--image-size", 32, 24)
    assert results(folder)["settings"]["image size"] == "32 x 24"
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 32, "width": 24}
    done = command("evaluate", folder, "--data", tmp_path / "colors", "--output", tmp_path / "scores.json")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "scores.json").read_text())["confusion"] == results(folder)["confusion"]
    assert command("predict", folder, tmp_path / "colors/test/red").code == 0


def test_an_image_size_that_the_model_cannot_take_is_an_error(train: Train, tmp_path: Path) -> None:
    done = train("--image-size", 7, model=other_backbone("swin", tmp_path / "swin"), ok=False)
    assert done.code in (0, 2)  # Swin pads
    done = train("--image-size", 2, output="other", ok=False)
    assert done.code == 2 and "cannot take images of 2 x 2 pixels" in done.err


def test_fewer_training_images_are_used_on_request(
    train: Train, used_rows: list[tuple[str, set[bytes]]], tmp_path: Path
) -> None:
    train("--max-train-samples", 6)
    assert results(tmp_path / "out")["settings"]["training images"] == 6
    assert [len(rows) for _, rows in used_rows] == [6, 15, 15]


def test_the_best_epoch_is_kept_on_a_tenth_of_the_training_images(
    train: Train, used_rows: list[tuple[str, set[bytes]]], tmp_path: Path
) -> None:
    train("--method", "vpt-deep", "--keep-best", "--num-tokens", 3, epochs=3)
    (_, training), (_, validation), (_, test) = used_rows
    assert [purpose for purpose, _ in used_rows] == ["for_training", "for_testing", "for_testing"]
    assert (len(training), len(validation), len(test)) == (13, 2, 15)
    assert not training & validation
    check_best_epoch(tmp_path / "out")
    assert len(weights(tmp_path / "out")["prompts.0"]) == 3


def test_the_best_epoch_is_kept_on_the_validation_split_of_the_data(
    train: Train, used_rows: list[tuple[str, set[bytes]]], image_folder: Any, tmp_path: Path
) -> None:
    image_folder("colors", "red green blue", number=2, splits=("validation",))
    train("--method", "linear", epochs=2)
    assert [len(rows) for _, rows in used_rows] == [15, 6, 15]
    assert results(tmp_path / "out")["settings"]["best epoch kept"] is True
    check_best_epoch(tmp_path / "out")


def check_best_epoch(folder: Path) -> None:
    """The saved adapter is that of the epoch with the best validation accuracy."""
    evaluated = [entry for entry in results(folder)["histories"]["0"] if "eval_accuracy" in entry]
    best = max(evaluated, key=lambda entry: entry["eval_accuracy"])
    checkpoint = folder / "seed-0" / f"checkpoint-{best['step']}"
    assert all(torch.equal(tensor, weights(checkpoint)[name]) for name, tensor in weights(folder).items())


def test_training_with_bfloat16_checkpointing_and_accumulation_saves_float32(train: Train, tmp_path: Path) -> None:
    options = ("--precision", "bf16", "--gradient-checkpointing", "--accumulate", 2, "--batch-size", 4, "--no-flip")
    assert "computing in bf16" in train(*options).err
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "out").values())


def test_a_float16_checkpoint_trains_in_float32_and_the_command_says_so(
    train: Train, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "half")
    seen = set()

    def begin(self: Any, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        seen.update(parameter.dtype for parameter in model.parameters())

    monkeypatch.setattr(trainer.Throughput, "on_train_begin", begin)
    done = train(model=tmp_path / "half")
    assert "Training on cpu: weights in float32 (stored in float16)." in done.err
    assert seen == {torch.float32}


def test_precision_is_bfloat16_only_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    for has_it, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_precision("fp16", torch.device("cuda")) == "fp16"


def test_learning_rates_of_the_command_line_replace_the_methods() -> None:
    class OnDigits:
        methods = SMALL_METHODS

    def rates(*options: str) -> tuple[float, float | None, float | None]:
        method = train_module.method_of(parse(["train", *options]), OnDigits())  # type: ignore[arg-type]
        return method.learning_rate, method.head_learning_rate, method.bias_learning_rate

    assert rates("--method", "linear") == (1e-1, None, None)
    assert rates("--method", "linear", "--learning-rate", "0.5") == (0.5, None, None), "only the head is trained"
    assert rates("--learning-rate", "0.5") == (0.5, 3e-2, 3e-3), "the rate of prompts is too large for others"
    assert rates("--head-learning-rate", "0", "--bias-learning-rate", "1") == (3e-2, 0, 1)


def test_runs_are_reported_to_integrations_on_request(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    arguments = trainer.TrainingArguments

    def spy(**values: Any) -> Any:
        asked.append(values["report_to"])
        return arguments(**{**values, "report_to": "none"})

    monkeypatch.setattr(trainer.Settings.arguments, "__defaults__", (spy,))
    train("--report-to", "tensorboard")
    train("--report-to", "none", output="other")
    assert asked == [["tensorboard"], "none"]


# -- what is said -----------------------------------------------------------------------------------------------------


def test_a_run_that_is_too_short_for_its_method_says_so_before_it_starts(train: Train) -> None:
    deep = train("--method", "vpt-deep", "--batch-size", 5, epochs=3)
    assert (
        "This run is short: it has 9 steps, and VPT-Deep needs some 300 to be better than a linear head. Train for "
        "--epochs 100, or take --method vpt-prefix-bias." in deep.err
    )
    assert deep.err.index("This run is short") < deep.err.index("epoch 1 of 3")
    prefix = train("--method", "vpt-prefix", "--batch-size", 5, epochs=20, output="prefix")
    assert "This run is short" not in prefix.err


def test_a_run_that_ends_near_chance_says_what_to_try(train: Train, image_folder: Any, tmp_path: Path) -> None:
    image_folder("same", "red green", number=10, splits=("train", "test"))
    for file in (tmp_path / "same").rglob("*.png"):
        Image.new("RGB", (16, 16), "gray").save(file)
    options = ["--data", tmp_path / "same", "--method", "linear"]
    done = train(*options)
    assert "near chance: 50.0 %, where always answering the most frequent label gives 50.0 %" in done.err
    assert "What to try: take --method vpt-prefix-bias" in done.err and "--epochs" in done.err
    good = train("--method", "full", "--learning-rate", "0.01", "--min-crop", "1", epochs=30, output="good")
    assert "near chance" not in good.err, good.out


# -- going on ---------------------------------------------------------------------------------------------------------


def test_a_resumed_run_gives_the_same_adapter_as_an_uninterrupted_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "out"
    train(epochs=3, output="whole")

    def interrupt(self: Any, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if state.epoch >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Throughput, "on_epoch_end", interrupt)
        done = train(epochs=3, ok=False)
    assert done.code == 130
    assert "Interrupted. Finished epochs are saved; to go on: vpt-peft train --model" in done.err.splitlines()[-1]
    assert done.err.splitlines()[-1].endswith(f"--output {resumed} --resume")
    epochs: list[float] = []
    monkeypatch.setattr(
        trainer.Throughput, "on_epoch_begin", lambda self, args, state, *_, **__: epochs.append(state.epoch)
    )
    train("--resume", epochs=3)

    assert epochs == [1, 2], "the first epoch is not repeated"
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    histories = [results(folder)["histories"]["0"] for folder in (whole, resumed)]
    for key in ("eval_loss", "accuracy"):
        values = [[entry[key] for entry in history if key in entry] for history in histories]
        assert values[0] == values[1] and len(values[0]) == 3


@pytest.mark.heavy
def test_an_interrupt_of_the_process_ends_with_how_to_go_on(
    checkpoint: Path, image_folder: Any, tmp_path: Path
) -> None:
    data = image_folder("colors", "red green", splits=("train", "test"))
    arguments = ["--model", checkpoint, "--data", data, "--epochs", 10_000, "--output", tmp_path / "out"]
    root = str(Path(str(vpt_peft.__file__)).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vpt_peft", "train", *map(str, arguments)], env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background ignore it
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if "epoch 2 of" in line:  # the first one is saved
                process.send_signal(signal.SIGINT)
                break
        err = "".join([*lines, process.stderr.read()])
        assert process.wait() == 130, err
    finally:
        process.kill()
        process.stderr.close()
    last = err.replace("\r", "\n").splitlines()[-1]
    assert last.startswith("vpt-peft train: Interrupted. Finished epochs are saved; to go on: vpt-peft train ")
    assert "Traceback" not in err


def test_an_existing_run_is_not_overwritten(train: Train, tmp_path: Path) -> None:
    train()
    before = (tmp_path / "out/results.json").read_bytes()
    done = train(ok=False)
    assert done.code == 2 and "already contains a run. Add --resume to continue it" in done.err
    shutil.rmtree(tmp_path / "out/seed-0")
    assert "already contains a run" in train(ok=False).err, "the adapter alone is a run too"
    assert (tmp_path / "out/results.json").read_bytes() == before


def test_resuming_with_changed_settings_or_data_is_an_error(train: Train, tmp_path: Path) -> None:
    train()
    assert "num_tokens None, not 3" in train("--resume", "--num-tokens", 3, ok=False).err
    assert "first seed 0, not 1" in train("--resume", "--seeds", 1, ok=False).err  # another test split
    train("--resume", "--seeds", 0, 1)
    (tmp_path / "colors/train/red/0.png").unlink()
    assert "train images 15, not 14" in train("--resume", ok=False).err


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "The dataset 'nowhere' is no folder here, and cannot be loaded from the Hub"),
        (["--data", "./no/where"], "which does not exist. Check the path"),
        (["--model", "nowhere/at-all"], "There is no folder 'nowhere/at-all', and whether there is a repository"),
        (["--model", "./typo"], "got './typo', which is neither an existing folder nor a valid repository name"),
        (["--method", "linear", "--num-tokens", "5"], "requires a method with prompts, got Linear head"),
        (["--output", "colors/train/red/0.png"], "--output must be a folder that can be written to"),
        (["--output", "/proc/none"], "--output must be a folder that can be written to, got '/proc/none'"),
    ],
)
def test_invalid_models_data_and_folders_are_told_in_one_line(
    options: list[str], message: str, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    done = train(*options, ok=False)
    assert done.code == 2 and done.err.splitlines()[-1].startswith("vpt-peft train: error: ")
    assert message in done.err.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_behind_its_header_is_told_in_one_line(
    workers: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in tmp_path.glob("colors/train/*/*.png"):
        file.write_bytes(file.read_bytes()[:45])
    monkeypatch.setattr(folders, "check_all", lambda *args: [])
    done = train("--workers", workers, ok=False)
    last = done.err.splitlines()[-1]
    assert done.code == 2 and last.startswith("vpt-peft train: error: '") and "Traceback" not in last
    assert "cannot be read as an image" in last and last.endswith("Repair or remove it.")


def test_broken_images_are_told_before_the_first_step(train: Train, tmp_path: Path) -> None:
    for name in ("0.png", "3.png"):
        (tmp_path / "colors/test/red" / name).write_bytes(b"broken")
    done = train(ok=False)
    last = done.err.splitlines()[-1]
    assert done.code == 2 and "2 of 30 files:" in last and "0.png" in last and "3.png" in last
    assert not list(tmp_path.glob("out/seed-*"))
