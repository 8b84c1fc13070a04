"""``vpt-peft export``: its options reach ``export``, and what it refuses is told in one line."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.families import enlarge
from packaging.version import Version
from torch import Tensor
from transformers import ViTForImageClassification, ViTImageProcessorPil

from vpt_peft import PromptConfig, VPTModel, get_vpt_model

Command = Callable[..., Any]
needs_processor = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="AutoImageProcessor needs torchvision there"
)


@pytest.fixture
def save(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Saves an adapter of the tiny checkpoint in a new folder."""

    def make(name: str, labels: str = "red green", processor: Any = None, **config: Any) -> Path:
        names = labels.split()
        model = ViTForImageClassification.from_pretrained(
            checkpoint, num_labels=len(names), ignore_mismatched_sizes=True,
            id2label=dict(enumerate(names)), label2id={label: index for index, label in enumerate(names)},
        )  # fmt: skip
        vpt = enlarge(get_vpt_model(model, PromptConfig(num_tokens=2, **config)).eval())
        vpt.save_pretrained(tmp_path / name, image_processor=processor)
        return tmp_path / name

    return make


def answers(adapter: Path, checkpoint: Path, images: Tensor) -> Tensor:
    """The logits of an adapter on a fresh backbone."""
    vpt = VPTModel.from_pretrained(ViTForImageClassification.from_pretrained(checkpoint), adapter)
    with torch.no_grad():
        return vpt(images).logits


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """A program of torch.export, and its metadata."""
    files = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    return program, json.loads(files["metadata.json"])


@pytest.mark.heavy
def test_an_adapter_is_exported_and_the_largest_difference_printed(
    save: Callable[..., Path], command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    adapter, file = save("colors"), tmp_path / "new" / "colors.pt2"
    done = command("export", adapter, file)
    assert done.code == 0, done.err
    assert f"Wrote {file}." in done.out and "The largest difference between its outputs and the model's is" in done.out
    images = torch.randn(3, 3, 16, 16)
    found = load(file)[0](images)["logits"]
    torch.testing.assert_close(found, answers(adapter, checkpoint, images), atol=1e-5, rtol=0)


@pytest.mark.heavy
def test_further_adapters_make_a_file_in_which_each_image_names_its_task(
    save: Callable[..., Path], command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    colors, tones = save("colors.v2"), save("tones", "black grey white", kind="prefix")
    file = tmp_path / "all.pt2"
    done = command("export", colors, file, "--adapters", tones, "__base__", "--batch-size", 3)
    assert done.code == 0, done.err
    assert f"Wrote {file} for the tasks 0 = colors-v2, 1 = tones, 2 = __base__." in done.out
    program, metadata = load(file)
    tasks = json.loads(metadata["tasks"])
    assert [task["name"] for task in tasks] == ["colors-v2", "tones", "__base__"]
    assert list(tasks[1]["id2label"].values()) == ["black", "grey", "white"]
    images = torch.randn(3, 3, 16, 16)
    found = program(images, torch.tensor([1, 0, 2]))["logits"]
    expected = [answers(tones, checkpoint, images)[0], answers(colors, checkpoint, images)[1]]
    for row, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-5, rtol=0)
        assert torch.isneginf(row[len(theirs) :]).all()


@pytest.mark.heavy
def test_adapters_of_the_same_name_are_named_by_their_whole_folder(
    save: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    first, second = save("first/out"), save("second/out")
    done = command("export", first, tmp_path / "all.pt2", "--adapters", second)
    assert done.code == 0, done.err
    names = [task["name"] for task in json.loads(load(tmp_path / "all.pt2")[1]["tasks"])]
    assert len(set(names)) == 2 and names[0].endswith("-first-out") and names[1].endswith("-second-out")


@needs_processor
@pytest.mark.heavy
def test_adapters_that_normalise_differently_are_not_normalised_in_one_file(
    save: Callable[..., Path], command: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    own = ViTImageProcessorPil(image_mean=[0.3, 0.2, 0.1], image_std=[0.4, 0.5, 0.6])
    same = ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3)
    plain, like_it, other = save("plain"), save("like", processor=same), save("other", processor=own)
    file = tmp_path / "all.pt2"
    message = refused("export", plain, file, "--adapters", other, "--normalize")
    assert "the image processors of 'plain' and 'other' differ in image_mean" in message and not file.exists()
    assert command("export", plain, file, "--adapters", like_it, "--normalize").code == 0
    pixels = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    load(file)[0](pixels, torch.tensor([0, 1]))


def test_every_option_reaches_export(
    save: Callable[..., Path], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def record(vpt: VPTModel, path: Path, **options: Any) -> float:
        seen.update(options, path=path, dtype=vpt.dtype, active=vpt.active_adapter)
        return 0.25

    module = importlib.import_module("vpt_peft.deploy.exporting.file")
    monkeypatch.setattr(module, "export", record)
    adapter, file = save("colors"), tmp_path / "m.pt2"
    done = command("export", adapter, file, "--probabilities", "--batch-size", 4, "--image-size", 24, 32, "--compile",
                   "--tolerance", 0.5, "--dtype", "bfloat16")  # fmt: skip
    assert done.code == 0 and "is 2.5e-01." in done.out, done.err
    assert seen == {
        "path": file, "dtype": torch.bfloat16, "active": "default", "probabilities": True, "batch_size": 4,
        "image_size": (24, 32), "int8": False, "compile": True, "tolerance": 0.5,
    }  # fmt: skip
    assert command("export", adapter, file, "--image-size", "any").code == 0
    assert (seen["image_size"], seen["dtype"], seen["tolerance"]) == ("any", torch.float32, None)
    assert "image_processor" not in seen and "adapter_names" not in seen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.pt"], "Expected a file name that ends in .onnx or .pt2, got 'm.pt'"),
        (["m.pt2", "--int8"], "int8=True needs a file name that ends in .onnx, got 'm.pt2'"),
        (["m.onnx", "--compile"], "compile=True needs a file name that ends in .pt2, got 'm.onnx'"),
        (["m.pt2", "--image-size", "8"], "--image-size must be height and width in pixels, or any, got 8"),
        (["m.pt2", "--image-size", "any", "8"], "must be height and width in pixels, or any, got any 8"),
        (["m.pt2", "--image-size", "0", "8"], "--image-size: must be a whole number of at least 1, got 0"),
        (["m.pt2", "--tolerance", "-1"], "--tolerance: must be a number of at least 0, got -1"),
        (["m.pt2", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([], "the following arguments are required: OUT"),
        (["m.pt2"], "nowhere"),
    ],
)
def test_what_cannot_be_exported_is_told_before_anything_is_loaded(
    arguments: list[str], message: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("export", "./nowhere", *arguments)
    assert not list(tmp_path.iterdir())


def test_the_same_adapter_twice_is_refused(
    save: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    adapter = save("colors")
    message = refused("export", adapter, tmp_path / "m.pt2", "--adapters", adapter)
    assert "adapter_names must be at least two different adapters" in message
    assert not (tmp_path / "m.pt2").exists()


def test_missing_packages_of_onnx_are_told_in_one_line(
    save: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    message = refused("export", save("colors"), tmp_path / "m.onnx")
    assert "pip install 'vpt-peft[export]'" in message
