"""``vpt-peft train --cache-features``: the same training from features that are computed once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vpt_peft.recipes.commands import train as train_module
from vpt_peft.recipes.training import trainer
from vpt_peft.training import CachedFeatures

Train = Callable[..., Any]
LAST = ("--method", "vpt-prefix", "--last-layers", 1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", [LAST, ("--method", "linear")])
def test_features_train_what_pixels_train_and_are_deleted(method: Any, train: Train, tmp_path: Path) -> None:
    same = (*method, "--min-crop", 1, "--no-flip", "--precision", "fp32")
    train(*same, epochs=2, output="pixels")
    train(*same, "--cache-features", "--augmentations", 1, epochs=2)
    ours, theirs = weights(tmp_path / "out"), weights(tmp_path / "pixels")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-2, rtol=0)
    assert not (tmp_path / "out" / "features").exists()
    assert "features" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())


def test_prompts_are_in_the_last_layers(train: Train, tmp_path: Path) -> None:
    train(*LAST)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["layers_to_transform"] == [1]
    assert {name for name in weights(tmp_path / "out") if name.startswith("prefix")} == {
        "prefix.1.key", "prefix.1.value"
    }  # fmt: skip


def test_images_are_tested_on_pixels_and_cached_once_for_all_seeds(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[tuple[str, int, bool]] = []
    tested: list[Any] = []
    make, evaluate = train_module.cache_features, trainer.RecipeTrainer.evaluate

    def recording(vpt: Any, images: Any, folder: Path, draws: int, *args: Any, **kwargs: Any) -> CachedFeatures:
        before = {file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
        found = make(vpt, images, folder, draws, *args, **kwargs)
        kept = before == {file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
        caches.append((folder.name, draws, kept))
        return found

    def evaluating(self: Any, eval_dataset: Any = None, **kwargs: Any) -> Any:
        tested.append(self.eval_dataset if eval_dataset is None else eval_dataset)
        return evaluate(self, eval_dataset, **kwargs)

    monkeypatch.setattr(train_module, "cache_features", recording)
    monkeypatch.setattr(trainer.RecipeTrainer, "evaluate", evaluating)
    train(*LAST, "--cache-features", "--augmentations", 2, "--seeds", 0, 1, epochs=2)
    assert caches == [("train", 2, False), ("evaluation", 1, False), ("train", 2, True), ("evaluation", 1, True)]
    assert [isinstance(images, CachedFeatures) for images in tested] == [True, True, False] * 2


@pytest.mark.parametrize(("given", "epochs", "cached"), [((), 2, 2), (("--augmentations", 3), 1, 1)])
def test_no_more_augmentations_are_cached_than_there_are_epochs(
    given: Any, epochs: int, cached: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws: list[int] = []
    make = train_module.cache_features

    def recording(vpt: Any, images: Any, folder: Path, number: int, *args: Any, **kwargs: Any) -> CachedFeatures:
        draws.append(number)
        return make(vpt, images, folder, number, *args, **kwargs)

    monkeypatch.setattr(train_module, "cache_features", recording)
    train(*LAST, "--cache-features", *given, epochs=epochs)
    assert draws == [cached, 1], "of the training images and of those to evaluate on"


def test_a_resumed_run_goes_on_with_its_augmentations(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*LAST, "--cache-features", "--augmentations", 3)
    train(*options, epochs=3, output="whole")

    def interrupt(self: Any, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if state.epoch >= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trainer.Throughput, "on_epoch_end", interrupt)
        assert train(*options, epochs=3, ok=False).code == 130
    assert (tmp_path / "out" / "features" / "train").is_dir(), "kept for --resume"
    train(*options, "--resume", epochs=3)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "out")[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cache-features",), r"got --method vpt-prefix-bias\. Use --method linear, or"),
        (("--cache-features", "--method", "vpt-deep", "--last-layers", 2), r"got --method vpt-deep --last-layers 2\."),
        (("--cache-features", "--method", "full"), "got --method full"),
        (("--augmentations", 2), "--augmentations is for cached features. Add --cache-features"),
        (("--method", "linear", "--last-layers", 1), "--last-layers requires a method with prompts"),
        (("--method", "vpt-deep", "--last-layers", 3), "--last-layers must be at most 2"),
    ],
)
def test_methods_without_frozen_lower_layers_are_refused(train: Train, options: Any, message: str) -> None:
    done = train(*options, ok=False)
    assert done.code == 2
    lines = [line for line in done.err.splitlines() if " error: " in line]
    assert len(lines) == 1
    assert re.search(message, lines[0])
