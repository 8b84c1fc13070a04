"""The example that tunes a model of images and texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zero_shot

from vpt_peft import AutoVPTModel

SHORT = ["--epochs", "1", "--pretraining-epochs", "1"]


@pytest.fixture
def output(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a short run on digits."""
    zero_shot.main([*SHORT, "--output", str(tmp_path / "digits")])
    printed = capsys.readouterr().out
    for title in ("Without training", "VPT-Deep", "VPT-Prefix"):
        assert f"| {title}" in printed
    assert "reloaded, they give the same logits" in printed
    return tmp_path / "digits"


def test_digits_on_a_gradient_are_classified_by_texts(output: Path) -> None:
    for method in ("vpt-deep", "vpt-prefix"):
        config = json.loads((output / method / "adapter_config.json").read_text())
        assert (config["model_class"], config["task_type"]) == ("CLIPModel", "ZERO_SHOT_IMAGE_CLASSIFICATION")
    vpt = AutoVPTModel.from_pretrained(output / "vpt-deep")
    assert vpt.get_image_features(torch.randn(2, 3, 32, 32)).pooler_output.shape == (2, 64)


def test_a_folder_of_images_is_classified_by_the_names_of_its_folders(
    output: Path, image_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--model", str(output / "backbone"), "--data", str(image_folder("colors"))]
    zero_shot.main([*source, *SHORT, "--text", "{} photo", "--output", str(tmp_path / "out")])
    assert "Tuning it to 2 classes: green photo, red photo" in capsys.readouterr().out
    assert (tmp_path / "out/vpt-prefix/adapter_model.safetensors").is_file()


def test_a_model_of_images_alone_is_refused(
    checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="ViTConfig"):
        zero_shot.main(["--model", str(checkpoint), "--data", str(image_folder("colors"))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "images"], "--model and --data must be given together"),
        (["--text", "a photo"], "--text must contain {} for the name of a class, got 'a photo'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_errors(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        zero_shot.main(options)
    assert message in capsys.readouterr().err
