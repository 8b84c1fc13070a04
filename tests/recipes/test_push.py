"""``--push-to-hub`` and ``vpt-peft push``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_server import HubServer
from transformers import AutoModelForImageClassification

from vpt_peft import VPTModel
from vpt_peft.images.processors import read_processor
from vpt_peft.recipes.training import repository

Command = Callable[..., Any]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json"}


def files(hub: HubServer, name: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.repo(name).files().items() if path != ".gitattributes"}


def check_pushed(hub: HubServer, folder: Path, checkpoint: Path) -> str:
    """The adapter in "me/colors" is that in the folder, with its processor and card, which is returned."""
    pixels = torch.rand(2, 3, 16, 16)
    loaded = [
        VPTModel.from_pretrained(AutoModelForImageClassification.from_pretrained(checkpoint), source)
        for source in (folder, "me/colors")
    ]
    assert torch.equal(loaded[0](pixels).logits, loaded[1](pixels).logits)
    assert read_processor("me/colors").image_mean == pytest.approx((0.1, 0.2, 0.3))
    assert set(files(hub, "me/colors")) == ADAPTER, "no checkpoints, results or data"
    card = files(hub, "me/colors")["README.md"].decode()
    assert "| accuracy, % of 15 test images |" in card and "pipeline_tag: image-classification" in card
    assert "| training data | colors (a folder) |" in card and "datasets:" not in card
    assert 'VPTModel.from_pretrained(model, "me/colors")' in card, "the backbone is a folder here"
    assert "| learning rate | 0.003 |" in card and "| epochs | 1 |" in card
    assert all(str(checkpoint).encode() not in content for content in files(hub, "me/colors").values())
    assert str(checkpoint) in (folder / "adapter_config.json").read_text(), "local files still name their backbone"
    return card


@pytest.mark.filterwarnings("ignore:The adapter's backbone is a local folder")
@pytest.mark.parametrize("way", ["train", "push"])
def test_a_pushed_adapter_is_loaded_with_its_processor_and_card(
    way: str, hub: HubServer, train: Command, command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    with hub.client(token="hf_me"):
        if way == "train":
            train("--method", "vpt-deep", "--push-to-hub", "me/colors", "--private")
        else:
            train("--method", "vpt-deep")
            done = command("push", folder, "me/colors", "--private")
            assert done.code == 0 and "Pushed to http" in done.out, done.err
        card = check_pushed(hub, folder, checkpoint)
        assert hub.repo("me/colors").private
        hub.repo("me/colors").put({"README.md": f"{card}\nEdited by hand.\n".encode()})
        again = ["train", "--resume"] if way == "train" else ["push"]
        if way == "train":
            train("--method", "vpt-deep", "--push-to-hub", "me/colors", "--private", again[1])
        else:
            command("push", folder, "me/colors")
        assert "Edited by hand." in check_pushed(hub, folder, checkpoint)


@pytest.mark.filterwarnings("ignore:The adapter's backbone is a local folder")
def test_a_repository_without_owner_is_created_for_the_user(hub: HubServer, train: Command) -> None:
    with hub.client(token="hf_me"):
        train("--method", "linear", "--push-to-hub", "colors")
    assert 'from_pretrained(model, "me/colors")' in files(hub, "me/colors")["README.md"].decode()


@pytest.mark.parametrize(
    ("method", "file", "message"),
    [
        ("linear", "model.safetensors", "'me/colors' contains a model"),
        ("full", "adapter_config.json", "'me/colors' on the Hub contains an adapter"),
    ],
)
def test_a_repository_with_a_model_of_another_kind_is_an_error_before_training(
    method: str, file: str, message: str, hub: HubServer, train: Command, tmp_path: Path
) -> None:
    hub.add_repo("me/colors", {file: b"{}"})
    with hub.client(token="hf_me"):
        done = train("--method", method, "--push-to-hub", "me/colors", ok=False)
    assert done.code == 2 and message in done.err.splitlines()[-1]
    assert not list(tmp_path.glob("out/seed-*"))


@pytest.mark.parametrize("name", ["someone/colors", "no/such/name"])
def test_a_repository_that_cannot_be_created_is_an_error_before_training(
    name: str, hub: HubServer, train: Command, tmp_path: Path
) -> None:
    with hub.client(token="hf_me"):
        done = train("--push-to-hub", name, ok=False)
    assert done.code == 2 and f"'{name}' on the Hub could not be created" in done.err.splitlines()[-1]
    assert not list(tmp_path.glob("out/seed-*"))


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_no_or_a_wrong_token_is_told_before_training_with_how_to_log_in(
    token: str | None, hub: HubServer, train: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    with hub.client(token=token):
        done = train("--push-to-hub", "me/colors", ok=False)
        assert done.code == 2 and "hf auth login" in done.err.splitlines()[-1], done.err
        assert not list(tmp_path.glob("out/seed-*"))
        train(output="trained")
        assert "hf auth login" in refused("push", tmp_path / "trained", "me/colors")


@pytest.mark.filterwarnings("ignore:The adapter's backbone is a local folder")
def test_a_failed_push_leaves_everything_saved_locally(
    hub: HubServer, train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise ConnectionError("no connection")

    monkeypatch.setattr(VPTModel, "push_to_hub", fail)
    monkeypatch.setattr(repository, "upload_folder", fail)
    expected = {"README.md", "results.json", "learning_curve.png", "preprocessor_config.json"}
    for method, file in (("linear", "adapter_model.safetensors"), ("full", "model.safetensors")):
        with hub.client(token="hf_me"):
            options = ["--method", method, "--push-to-hub", f"me/{method}"]
            done = train(*options, output=method, ok=False)
        assert done.code == 2 and "on the Hub could not be written to: no connection" in done.err.splitlines()[-1]
        assert expected | {file} <= {path.name for path in (tmp_path / method).iterdir()}


@pytest.mark.parametrize("way", ["train", "push"])
def test_a_full_model_is_pushed_without_checkpoints(
    way: str, hub: HubServer, train: Command, command: Command, tmp_path: Path
) -> None:
    with hub.client(token="hf_me"):
        if way == "train":
            train("--method", "full", "--push-to-hub", "me/whole")
        else:
            train("--method", "full")
            assert command("push", tmp_path / "out", "me/whole").code == 0
        assert AutoModelForImageClassification.from_pretrained("me/whole").config.id2label[0] == "blue"
    assert set(files(hub, "me/whole")) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    card = files(hub, "me/whole")["README.md"].decode()
    assert "base_model" not in card and "huggingface.co" not in card, "the backbone is a folder here"
    if way == "train":
        hub.repo("me/whole").put({"README.md": f"{card}\nEdited by hand.\n".encode()})
        with hub.client(token="hf_me"):
            train("--method", "full", "--resume", "--push-to-hub", "me/whole")
        assert files(hub, "me/whole")["README.md"].decode().endswith("Edited by hand.\n")


def test_what_cannot_be_pushed_is_told(
    hub: HubServer, train: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    with hub.client(token="hf_me"):
        assert "which is not a folder" in refused("push", tmp_path / "nowhere", "me/x")
        assert "must contain an adapter or a model, got neither" in refused("push", tmp_path / "colors", "me/x")
        train("--method", "linear")
        (tmp_path / "out/results.json").write_text("{")
        assert "must be the JSON file of a run" in refused("push", tmp_path / "out", "me/x")
        pytest.importorskip("peft")
        train("--method", "lora", output="lora")
        assert "only if its backbone is on the Hub" in refused("push", tmp_path / "lora", "me/y")
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.filterwarnings("ignore:The adapter's backbone is a local folder")
def test_an_adapter_is_pushed_with_the_handler_of_an_endpoint_and_a_full_model_is_not(
    hub: HubServer, train: Command, refused: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    with hub.client(token="hf_me"):
        train("--method", "linear")
        assert command("push", tmp_path / "out", "me/colors", "--handler").code == 0
        train("--method", "full", output="full")
        assert "--handler is for adapters" in refused("push", tmp_path / "full", "me/full", "--handler")
    assert set(files(hub, "me/colors")) == ADAPTER | {"handler.py", "requirements.txt"}
    assert "me/full" not in hub.repos
