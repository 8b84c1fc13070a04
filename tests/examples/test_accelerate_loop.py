"""The loop with accelerate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import accelerate_loop
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file


@pytest.fixture
def loop(checkpoint: Path, image_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of the loop with a tiny ViT on colored images."""
    data = image_folder("colors", "red green blue", splits=("train", "test"))

    def arguments(output: str, *options: str) -> list[str]:
        paths = ["--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / output)]
        return [*paths, "--epochs", "4", "--save-every", "2", "--batch-size", "4", *options]

    return arguments


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_resumed_loop_gives_the_same_adapter_as_an_uninterrupted_one(
    loop: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerate_loop.main(loop("whole"))
    assert "on 15 images, with 1 processes" in capsys.readouterr().out
    state = tmp_path / "whole/state-2"
    halfway = load_file(state / "model.safetensors").values()
    assert not any(torch.equal(tensor, weights(tmp_path / "whole")["head.classifier.weight"]) for tensor in halfway)

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate_loop.main(loop("resumed", "--resume", str(state)))

    assert [path.name for path in (tmp_path / "resumed").glob("state-*")] == ["state-4"], "it continues after epoch 2"
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert json.loads((tmp_path / "whole/preprocessor_config.json").read_text())["image_mean"] == [0.1, 0.2, 0.3]
    assert "| batch size | 8 |" in (tmp_path / "whole/README.md").read_text()
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


def test_loop_state_contains_no_backbone(loop: Callable[..., list[str]], tmp_path: Path) -> None:
    accelerate_loop.main(loop("out"))
    names = load_file(tmp_path / "out/state-4/model.safetensors")
    assert names and all(name.startswith("adapters.") for name in names)


def test_loop_cannot_resume_from_a_folder_without_a_state(
    loop: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        accelerate_loop.main(loop("out", "--resume", str(tmp_path)))
    assert "must be a folder saved by this script" in capsys.readouterr().err


def test_loop_cannot_resume_with_changed_settings(loop: Callable[..., list[str]], tmp_path: Path) -> None:
    accelerate_loop.main(loop("whole"))
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=r"state-2 had seed 0, not 1\. Use the same settings"):
        accelerate_loop.main(loop("resumed", "--resume", str(tmp_path / "whole/state-2"), "--seed", "1"))


@pytest.mark.parametrize("option", ["--epochs", "--batch-size", "--accumulate", "--save-every"])
def test_loop_options_below_one_are_an_error(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accelerate_loop.main([option, "0"])
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err
