"""The scripts of examples/: each runs as it stands, on a tiny checkpoint in a folder."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers.models import SEGMENTERS
from packaging.version import Version
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from vpt_peft import AutoVPTModel, PromptConfig, VPTModel, get_vpt_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Script = Callable[..., str]

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="AutoImageProcessor needs torchvision there"
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Runs a script with arguments. Returns what it prints."""

    def run_script(name: str, *args: object) -> str:
        monkeypatch.setattr("sys.argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


@pytest.fixture
def checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, with an image processor for its size of images."""
    folder = tmp_path / "tiny-vit"
    shutil.copytree(checkpoint, folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def colors(image_folder: Callable[..., Path]) -> Path:
    return image_folder("colors", number=20, splits=("train", "validation"))


@pytest.mark.parametrize("script", ["trainer.py", "loop.py"])
def test_a_script_fine_tunes_on_a_folder_and_saves_the_adapter(
    script: str, run: Script, checkpoint: Path, colors: Path, tmp_path: Path
) -> None:
    output = run(script, checkpoint, colors, tmp_path / "out", 3)
    assert "accuracy" in output
    vpt = AutoVPTModel.from_pretrained(tmp_path / "out")
    assert set(vpt.config.id2label.values()) == {"red", "green"}
    assert vpt.active_config.kind == "prefix" and vpt.active_config.bias == "all"
    values = vpt.adapters["default"].state_dict()["prefix.0.value"]
    assert values.any(), "values start at zero"
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_several_tasks_are_answered_in_one_batch(run: Script, checkpoint: Path, tmp_path: Path) -> None:
    expected = {}
    file = tmp_path / "image.png"
    Image.new("RGB", (20, 16), "red").save(file)
    pixel_values = ViTImageProcessorPil.from_pretrained(checkpoint)(Image.open(file), return_tensors="pt").pixel_values
    for task, labels in (("flowers", ["rose", "daisy"]), ("birds", ["jay", "wren", "owl"])):
        model = AutoModelForImageClassification.from_pretrained(
            checkpoint, id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
        )
        vpt = get_vpt_model(model, PromptConfig(num_tokens=2)).eval()
        vpt.save_pretrained(tmp_path / task)
        with torch.inference_mode():
            score, label = vpt(pixel_values).logits.softmax(-1).max(-1)
        expected[task] = f"{labels[label.item()]}, {100 * score.item():.1f} %"
    output = run("many_tasks.py", checkpoint, file, f"flowers={tmp_path / 'flowers'}", f"birds={tmp_path / 'birds'}")
    lines = output.splitlines()
    assert len(lines) == 2 and all(line.endswith(answer) for line, answer in zip(lines, expected.values(), strict=True))


def test_an_adapter_is_saved_and_loaded_again(run: Script, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    Image.new("RGB", (20, 16), "red").save(file)
    output = run("share.py", checkpoint, tmp_path / "adapter", file)
    assert "'label': 'rose'" in output and "'score':" in output


def test_a_segmentation_model_is_fine_tuned_on_images_and_masks(run: Script, tmp_path: Path) -> None:
    tiny = SEGMENTERS["upernet"]()
    tiny.model.save_pretrained(tmp_path / "upernet")
    size = tiny.pixel_values.shape[-1]
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(tmp_path / "upernet")
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "scenes" / kind).mkdir(parents=True)
    for index in range(4):
        Image.fromarray(generator.integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / f"scenes/images/{index}.jpg")
        mask = generator.integers(0, 3, (40, 48)).astype(np.uint8)
        mask[:4] = 255  # no label
        Image.fromarray(mask).save(tmp_path / f"scenes/masks/{index}.png")
    assert "epoch 2: loss" in run("segment.py", tmp_path / "upernet", tmp_path / "scenes", tmp_path / "out", 2)
    vpt = VPTModel.from_pretrained(SEGMENTERS["upernet"]().model, tmp_path / "out")
    assert vpt.config.num_labels == 3
