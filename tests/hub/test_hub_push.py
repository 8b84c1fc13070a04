"""What a push sends, what happens when it fails, and what others then find on the Hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cards import run_code
from helpers.hub_server import BACKBONE, HubServer
from helpers.models import Tiny, logits, tiny_vit
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from vpt_peft import AutoVPTModel, CheckpointError, PromptConfig, VPTModel, get_vpt_model

NAME = "me/birds-vpt"
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
PROCESSOR = "preprocessor_config.json"


@pytest.fixture
def vpt(online: HubServer) -> VPTModel:
    return get_vpt_model(AutoModelForImageClassification.from_pretrained(BACKBONE), PromptConfig(num_tokens=3)).eval()


def move(vpt: VPTModel) -> None:
    with torch.no_grad():
        for parameter in vpt.adapters.parameters():
            parameter.add_(0.1)


def card(hub: HubServer, revision: str = "main") -> str:
    return hub.repo(NAME).files(revision)[CARD].decode()


def test_weights_go_to_the_storage_and_the_rest_into_the_commit(online: HubServer, vpt: VPTModel) -> None:
    vpt.push_to_hub(NAME, private=True, image_processor=ViTImageProcessor(), commit_message="Birds")
    repo = online.repo(NAME)
    assert repo.private and repo.history()[0].title == "Birds"
    large = {path for path, blob in repo.resolve().files.items() if blob.lfs}
    assert large == {WEIGHTS} and online.count("PUT") == 1
    assert repo.files()[CONFIG] and repo.files()["preprocessor_config.json"]


def test_a_video_processor_is_pushed_too(online: HubServer, vpt: VPTModel) -> None:
    class Processor:
        def save_pretrained(self, folder: str) -> None:
            for name in ("video_preprocessor_config.json", "other.json"):
                (Path(folder) / name).write_text("{}")

    vpt.push_to_hub(NAME, image_processor=Processor())
    assert online.repo(NAME).files()["video_preprocessor_config.json"] == b"{}"
    assert "other.json" not in online.repo(NAME).files()


def test_a_push_of_another_card_sends_no_weights(online: HubServer, vpt: VPTModel) -> None:
    vpt.push_to_hub(NAME)
    online.requests.clear()
    vpt.push_to_hub(NAME, license="mit", metrics={"accuracy": 0.5})
    assert online.count("PUT") == 0 and online.count("POST", "/commit/") == 1
    assert "license: mit" in card(online) and "| accuracy | 0.5 |" in card(online)


def test_an_upload_cut_off_half_way_leaves_the_old_adapter_until_it_is_tried_again(
    online: HubServer, vpt: VPTModel, vit: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits before it tries again by itself
    vpt.push_to_hub(NAME)
    old, before = logits(vpt, vit.pixel_values), online.repo(NAME).history()
    move(vpt)
    online.break_uploads(20)
    with pytest.raises(Exception) as error:  # the client's own, of whichever version
        vpt.push_to_hub(NAME)
    assert not isinstance(error.value, CheckpointError) and online.repo(NAME).history() == before
    assert torch.equal(logits(AutoVPTModel.from_pretrained(NAME), vit.pixel_values), old)
    online.break_uploads(0)
    vpt.push_to_hub(NAME)
    loaded = AutoVPTModel.from_pretrained(NAME)
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_a_push_needs_a_token_that_may_write(online: HubServer, vpt: VPTModel, tmp_path: Path) -> None:
    vpt.push_to_hub(NAME)
    online.add_user("you", "hf_you")
    online.add_user("me", "hf_read", role="read")
    before = online.repo(NAME).history()
    for token, status in (("hf_wrong", "401"), ("hf_you", "403"), ("hf_read", "403")):
        move(vpt)
        with pytest.raises(HfHubHTTPError, match=status):
            vpt.push_to_hub(NAME, token=token)
    assert online.repo(NAME).history() == before


def test_a_stranger_can_offer_an_adapter_as_a_pull_request(online: HubServer, vpt: VPTModel, vit: Tiny) -> None:
    vpt.push_to_hub(NAME)
    online.add_user("you", "hf_you")
    move(vpt)
    before = online.repo(NAME).history()
    offered = vpt.push_to_hub(NAME, create_pr=True, token="hf_you")
    assert online.repo(NAME).history() == before and offered.pr_revision == "refs/pr/1"
    loaded = AutoVPTModel.from_pretrained(NAME, revision=offered.pr_revision)
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


@pytest.mark.parametrize("where", [{"revision": "experiment"}, {"create_pr": True}], ids=["branch", "pull request"])
def test_the_users_words_are_kept_on_a_new_branch_too(online: HubServer, vpt: VPTModel, where: dict[str, Any]) -> None:
    vpt.push_to_hub(NAME)
    online.repo(NAME).put({CARD: (card(online) + "\nMy words.\n").encode()})
    vpt.push_to_hub(NAME, license="mit", **where)
    there = card(online, where.get("revision", "refs/pr/1"))
    assert "My words." in there and "license: mit" in there
    assert "license: mit" not in card(online)


@pytest.mark.parametrize("has_own", [True, False], ids=["adapter's processor", "backbone's processor"])
def test_code_from_each_card_of_several_adapters_runs_when_pasted(
    has_own: bool, online: HubServer, vpt: VPTModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    online.repo(BACKBONE).put({PROCESSOR: b"{}" if has_own else (tmp_path / PROCESSOR).read_bytes()})
    vpt.add_adapter("cars", PromptConfig(num_tokens=2), num_labels=3)
    vpt.push_to_hub(NAME, image_processor=processor if has_own else None)
    for folder, name in (("", "default"), ("cars/", "cars")):
        names = run_code(online.repo(NAME).files()[folder + CARD].decode(), tmp_path, monkeypatch)
        vpt.set_adapter(name)
        expected = logits(vpt, processor(names["image"], return_tensors="pt").pixel_values)
        assert torch.equal(names["logits"], expected)


def test_only_adapters_that_are_pushed_are_warned_about(online: HubServer, vpt: VPTModel, tmp_path: Path) -> None:
    config = PromptConfig(num_tokens=2, base_model_name_or_path=str(tmp_path / "gone"))
    vpt.add_adapter("mine", config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        vpt.push_to_hub(NAME, selected_adapters=["default"])
    with pytest.warns(UserWarning, match=r"is a local folder \('.*gone'\), which is not published: others cannot"):
        vpt.push_to_hub(NAME, selected_adapters=["mine"])
    assert "base_model" not in online.repo(NAME).files()[f"mine/{CARD}"].decode().split("---")[1]


# A model's files, and the folder that they are in.
MODELS = {
    "safetensors": ("model.safetensors", ""),
    "shards": ("model-00001-of-00002.safetensors", ""),
    "pickle": ("pytorch_model.bin", ""),
    "damaged": ("model.safetensors", ""),
    "subfolder": ("model.safetensors", "birds/"),
}


@pytest.mark.parametrize("branch", [None, "main", "new"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_repository_with_a_model_is_refused_before_anything_is_uploaded(
    kind: str, branch: str | None, online: HubServer, vpt: VPTModel, tmp_path: Path
) -> None:
    name, folder = MODELS[kind]
    weights = b"half" if kind == "damaged" else (tmp_path / "backbone/model.safetensors").read_bytes()
    repo = online.add_repo(NAME, {folder + name: weights, folder + "config.json": b"{}"})
    vpt.add_adapter("birds", PromptConfig(num_tokens=2))
    online.requests.clear()
    with pytest.raises(CheckpointError, match=rf"'{NAME}(/birds)?' contains a model \({name}\).* another .*repository"):
        vpt.push_to_hub(NAME, revision=branch)
    assert {method for method, _ in online.requests} <= {"GET", "HEAD"} and list(repo.refs) == ["main"]
    others = [name for name in ("default", "birds") if bool(folder) == (name == "default")]
    vpt.push_to_hub(NAME, selected_adapters=others, revision=branch)  # into another folder


def test_a_repository_of_the_users_own_is_found_without_its_owner(
    online: HubServer, vpt: VPTModel, vit: Tiny, tmp_path: Path
) -> None:
    online.add_repo("me/model", tmp_path / "backbone")
    with pytest.raises(CheckpointError, match="'me/model' contains a model"):
        vpt.push_to_hub("model")
    online.add_repo("me/birds", {CARD: b"My words."})
    vpt.push_to_hub("birds")
    assert "My words." in online.repo("me/birds").files()[CARD].decode()
    vpt.push_to_hub("cars", private=True)
    assert online.repo("me/cars").private and '"me/cars"' in online.repo("me/cars").files()[CARD].decode()


def test_a_repository_with_a_checkpoint_of_trainer_takes_adapters(
    online: HubServer, vpt: VPTModel, tmp_path: Path
) -> None:
    vpt.save_pretrained(tmp_path / "checkpoint", state_dict=None)
    online.add_repo(NAME, {"model.safetensors": (tmp_path / "checkpoint/model.safetensors").read_bytes()})
    vpt.push_to_hub(NAME)
    assert WEIGHTS in online.repo(NAME).files()


def test_no_path_of_a_local_backbone_is_published(
    online: HubServer, vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "backbone")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    model.config._commit_hash = "a" * 40
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3)).eval()
    vpt.add_adapter("cars", PromptConfig(num_tokens=2))
    with pytest.warns(UserWarning, match="is a local folder .*, which is not published"):
        vpt.push_to_hub(NAME, image_processor=ViTImageProcessor.from_pretrained(tmp_path / "backbone"))
    files = online.repo(NAME).files()
    assert [path for path, content in files.items() if str(tmp_path).encode() in content] == []
    assert {json.loads(files[folder + CONFIG])["revision"] for folder in ("", "cars/")} == {None}
    assert "a backbone of type `vit` that is not on the Hub" in card(online)
    names = run_code(card(online), tmp_path, monkeypatch)
    assert torch.equal(names["logits"], logits(vpt, processor(names["image"], return_tensors="pt").pixel_values))
    vpt.save_pretrained(tmp_path / "adapter")  # here, its name is of use
    loaded = AutoVPTModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))
    vpt.save_pretrained(tmp_path / "to push", model_id=NAME)
    assert [file for file in (tmp_path / "to push").rglob("*.*") if str(tmp_path).encode() in file.read_bytes()] == []


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_you"])
def test_a_push_without_the_right_token_says_how_to_log_in(
    token: str | None, hub: HubServer, vit: Tiny, tmp_path: Path
) -> None:
    hub.add_user("you", "hf_you")
    hub.add_repo(NAME)
    vpt = vit.prompted()
    with hub.client(token=token, cache=tmp_path), pytest.raises(HfHubHTTPError, match="`hf auth login`"):
        vpt.push_to_hub(NAME)


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_you"])
def test_loading_without_the_right_token_says_how_to_log_in(
    token: str | None, hub: HubServer, vit: Tiny, tmp_path: Path
) -> None:
    hub.add_user("you", "hf_you")
    hub.add_repo(NAME, {CONFIG: b"{}"}, private=True)
    vpt = vit.prompted()
    loads = [
        lambda: AutoVPTModel.from_pretrained(NAME),
        lambda: VPTModel.from_pretrained(tiny_vit().model, NAME),
        lambda: vpt.load_adapter(NAME, "other"),
    ]
    for load in loads:
        with hub.client(token=token, cache=tmp_path), pytest.raises(HfHubHTTPError, match="`hf auth login`"):
            load()


def test_an_adapter_brings_its_image_processor(online: HubServer, vpt: VPTModel) -> None:
    vpt.push_to_hub(NAME, image_processor=ViTImageProcessor(size={"height": 32, "width": 32}))
    try:
        found = AutoImageProcessor.from_pretrained(NAME)
    except ImportError:
        pytest.skip("AutoImageProcessor of this version of transformers needs torchvision")
    assert found.size == {"height": 32, "width": 32}


@pytest.mark.parametrize("name", ["default", "birds"])
def test_offline_an_adapter_and_its_backbone_come_from_the_cache(
    name: str, hub: HubServer, vit: Tiny, tmp_path: Path
) -> None:
    vit.model.save_pretrained(tmp_path / "backbone")
    hub.add_repo(BACKBONE, tmp_path / "backbone")
    with hub.client(token="hf_me", cache=tmp_path / "cache"):
        model = AutoModelForImageClassification.from_pretrained(BACKBONE)
        vpt = get_vpt_model(model, PromptConfig(num_tokens=3), adapter_name=name)
        vpt.push_to_hub(NAME)
        AutoVPTModel.from_pretrained(NAME)
        hub.requests.clear()
        loaded = [AutoVPTModel.from_pretrained(NAME, local_files_only=True)]
    with hub.client(cache=tmp_path / "cache", offline=True):
        loaded += [AutoVPTModel.from_pretrained(NAME), VPTModel.from_pretrained(tiny_vit().model, NAME)]
    assert hub.requests == []
    for one in loaded:
        assert torch.equal(logits(one, vit.pixel_values), logits(vpt.eval(), vit.pixel_values))


def test_a_backbone_of_the_right_revision_is_not_warned_about(
    online: HubServer, vpt: VPTModel, vit: Tiny, tmp_path: Path
) -> None:
    first = online.repo(BACKBONE).history()[0].oid
    vpt.push_to_hub(NAME)
    with torch.no_grad():
        vit.model.vit.layernorm.weight.add_(1)
    vit.model.save_pretrained(tmp_path / "changed")
    online.repo(BACKBONE).put({"model.safetensors": (tmp_path / "changed/model.safetensors").read_bytes()})
    newest = AutoModelForImageClassification.from_pretrained(BACKBONE)  # both revisions are in the cache now
    with pytest.warns(UserWarning, match=f"was trained on revision {first}"):
        VPTModel.from_pretrained(newest, NAME, check_backbone=False).unload()
    assert get_vpt_model(newest, PromptConfig()).active_config.revision == online.repo(BACKBONE).history()[0].oid
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        right = AutoModelForImageClassification.from_pretrained(BACKBONE, revision=first)
        VPTModel.from_pretrained(right, NAME).unload()
        AutoVPTModel.from_pretrained(NAME)
    assert get_vpt_model(right, PromptConfig()).active_config.revision == first


def test_a_backbone_that_is_missing_is_named_together_with_the_adapter(online: HubServer, vit: Tiny) -> None:
    vpt = get_vpt_model(vit.model, PromptConfig(base_model_name_or_path="google/missing"))
    vpt.push_to_hub(NAME)
    with pytest.raises(CheckpointError, match=f"The backbone 'google/missing' of the adapter '{NAME}' cannot be"):
        AutoVPTModel.from_pretrained(NAME)


DAMAGES: dict[str, dict[str, bytes]] = {
    "config": {CONFIG: b'{"num_tokens": -1}'},
    "JSON": {CONFIG: b"{"},
    "weights": {WEIGHTS: b"half a header"},
    "pickle": {WEIGHTS: b"\x80\x02}q\x00."},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_an_adapter_on_the_hub_names_its_repository(
    damage: str, online: HubServer, vpt: VPTModel
) -> None:
    vpt.push_to_hub(NAME)
    online.repo(NAME).put(DAMAGES[damage])
    loads = [
        lambda: AutoVPTModel.from_pretrained(NAME),
        lambda: VPTModel.from_pretrained(tiny_vit().model, NAME),
        lambda: vpt.load_adapter(NAME, "default"),
        lambda: vpt.load_adapter(NAME, "other"),
    ]
    for load in loads:
        with pytest.raises(CheckpointError, match=f"In the repository '{NAME}': "):
            load()
    assert list(vpt.adapters) == ["default"]
