"""Push and pull with the real client, against a small Hub on loopback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.hub_server import HubServer
from helpers.models import Tiny, logits, tiny_vit
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from packaging.version import Version
from PIL import Image
from transformers import ViTImageProcessor, ViTImageProcessorPil

from vpt_peft import AutoVPTModel, CheckpointError, PromptConfig, VPTModel, get_vpt_model

NAME = "me/birds-vpt"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def vpt(vit: Tiny) -> VPTModel:
    vit.model.config.name_or_path = "google/vit"
    return vit.prompted()


@pytest.fixture
def online(hub: HubServer, tmp_path: Path) -> Iterator[HubServer]:
    """The Hub, with the client logged in as "me"."""
    with hub.client(token="hf_me", cache=tmp_path / "cache"):
        yield hub


def test_an_adapter_comes_back_from_the_hub_as_it_was_pushed(online: HubServer, vpt: VPTModel, vit: Tiny) -> None:
    commit = vpt.push_to_hub(NAME, commit_message="First", license="mit")
    assert commit.oid == online.repo(NAME).history("main")[0].oid
    assert set(online.repo(NAME).files("main")) == {
        ".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    assert NAME in online.repo(NAME).files("main")["README.md"].decode()
    loaded = VPTModel.from_pretrained(tiny_vit().model, NAME)
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_only_the_adapters_files_travel(online: HubServer, vpt: VPTModel) -> None:
    vpt.push_to_hub(NAME)
    vpt.add_adapter("cars", PromptConfig(num_tokens=2), num_labels=3)
    vpt.push_to_hub(NAME, image_processor=ViTImageProcessor())
    assert set(online.repo(NAME).files("main")) - {".gitattributes"} == {
        f"{folder}{name}"
        for folder in ("", "cars/")
        for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json")
    }


def test_a_second_push_of_the_same_adapter_makes_no_commit(online: HubServer, vpt: VPTModel) -> None:
    first = vpt.push_to_hub(NAME)
    online.requests.clear()
    second = vpt.push_to_hub(NAME)
    assert online.count("POST", "/commit/") == online.count("PUT") == 0
    assert first.oid == second.oid


def test_branches_tags_commits_and_pull_requests(online: HubServer, vpt: VPTModel, vit: Tiny) -> None:
    answers = {}
    answers["main"] = logits(vpt, vit.pixel_values)
    first = vpt.push_to_hub(NAME).oid
    online.repo(NAME).add_ref("refs/tags/v1", first)
    answers[first] = answers["v1"] = answers["main"]
    for where in ("branch", "pull request"):
        with torch.no_grad():
            for parameter in vpt.adapters.parameters():
                parameter.add_(0.1)
        if where == "branch":
            vpt.push_to_hub(NAME, revision="experiment")
            answers["experiment"] = logits(vpt, vit.pixel_values)
        else:
            request = vpt.push_to_hub(NAME, create_pr=True)
            answers[request.pr_revision] = logits(vpt, vit.pixel_values)
    for revision, answer in answers.items():
        loaded = VPTModel.from_pretrained(tiny_vit().model, NAME, revision=revision)
        assert torch.equal(logits(loaded, vit.pixel_values), answer), revision
    assert not torch.equal(answers["main"], answers["experiment"])


def test_an_adapter_in_a_subfolder(online: HubServer, vit: Tiny) -> None:
    vit.model.config.name_or_path = "google/vit"
    vpt = get_vpt_model(vit.model, PromptConfig(num_tokens=2), adapter_name="birds")
    answer = logits(vpt, vit.pixel_values)
    vpt.push_to_hub(NAME)
    for subfolder in (None, "birds"):
        loaded = VPTModel.from_pretrained(tiny_vit().model, NAME, subfolder=subfolder)
        assert torch.equal(logits(loaded, vit.pixel_values), answer)
    vpt.add_adapter("cars", PromptConfig(num_tokens=3))
    vpt.push_to_hub(NAME)
    with pytest.raises(CheckpointError, match=f"'{NAME}', got several: birds, cars"):
        VPTModel.from_pretrained(tiny_vit().model, NAME)
    with pytest.raises(EntryNotFoundError, match=NAME):
        VPTModel.from_pretrained(tiny_vit().model, NAME, subfolder="boats")
    other = tiny_vit().prompted()
    other.load_adapter(NAME, "cars", subfolder="cars")
    assert list(other.adapters) == ["default", "cars"]


def test_offline_use_reads_the_cache(hub: HubServer, vpt: VPTModel, vit: Tiny, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with hub.client(token="hf_me", cache=cache):
        vpt.push_to_hub(NAME)
        VPTModel.from_pretrained(tiny_vit().model, NAME)
        hub.requests.clear()
        loaded = VPTModel.from_pretrained(tiny_vit().model, NAME, local_files_only=True)
        with pytest.raises(LocalEntryNotFoundError):
            VPTModel.from_pretrained(tiny_vit().model, "me/other", local_files_only=True)
    with hub.client(cache=cache, offline=True):
        VPTModel.from_pretrained(tiny_vit().model, NAME)
    assert hub.requests == []
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


def test_private_and_gated_repositories(hub: HubServer, vpt: VPTModel, tmp_path: Path) -> None:
    hub.add_user("you", "hf_you")
    with hub.client(token="hf_me", cache=tmp_path / "mine"):
        vpt.push_to_hub("me/private", private=True)
        vpt.push_to_hub("me/gated")
        VPTModel.from_pretrained(tiny_vit().model, "me/private")
    hub.set_gated("me/gated")
    for token, cache in ((None, "nobody"), ("hf_you", "yours")):
        with hub.client(token=token, cache=tmp_path / cache):
            with pytest.raises(RepositoryNotFoundError, match="me/private"):
                VPTModel.from_pretrained(tiny_vit().model, "me/private")
            with pytest.raises(GatedRepoError, match="me/gated"):
                VPTModel.from_pretrained(tiny_vit().model, "me/gated")
            with pytest.raises(HfHubHTTPError):
                vpt.push_to_hub("me/private")
            VPTModel.from_pretrained(tiny_vit().model, "me/private", token="hf_me")


def test_what_is_missing_is_named(online: HubServer, vpt: VPTModel) -> None:
    vpt.push_to_hub(NAME)
    online.add_repo("me/empty", {"notes.txt": b"nothing here"})
    online.add_repo("me/half", {"adapter_config.json": b"{}"})
    model = tiny_vit().model
    with pytest.raises(RepositoryNotFoundError, match="me/missing"):
        VPTModel.from_pretrained(model, "me/missing")
    with pytest.raises(RevisionNotFoundError, match=NAME):
        VPTModel.from_pretrained(model, NAME, revision="v9")
    with pytest.raises(CheckpointError, match=r"adapter_config.json\) in the repository 'me/empty', got none"):
        VPTModel.from_pretrained(model, "me/empty")
    with pytest.raises(EntryNotFoundError, match="me/half"):
        VPTModel.from_pretrained(model, "me/half")
    with pytest.raises(HfHubHTTPError, match="401"):
        VPTModel.from_pretrained(model, NAME, token="hf_wrong")
    with pytest.raises(CheckpointError, match="neither an existing folder nor a valid repository name"):
        VPTModel.from_pretrained(model, "not/a/repository")


def test_a_transfer_cut_off_half_way_can_be_tried_again(online: HubServer, vpt: VPTModel, vit: Tiny) -> None:
    vpt.push_to_hub(NAME)
    online.break_downloads(1)
    for _ in range(3):
        try:
            loaded = VPTModel.from_pretrained(tiny_vit().model, NAME)
            break
        except Exception as error:
            assert not isinstance(error, CheckpointError), "half a file was taken for a whole one"
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))


@pytest.mark.parametrize("name", ["default", "birds"])
@pytest.mark.parametrize("revision", [None, "main"])
def test_a_push_between_config_and_weights_mixes_no_two_adapters(
    name: str, revision: str | None, online: HubServer, vit: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapter(num_tokens: int) -> VPTModel:
        torch.manual_seed(num_tokens)
        vpt = get_vpt_model(tiny_vit().model, PromptConfig(num_tokens, base_model_name_or_path="google/vit"), name)
        with torch.no_grad():
            for parameter in vpt.adapters.parameters():
                parameter.add_(torch.randn_like(parameter))
        return vpt

    older, newer = adapter(5), adapter(6)
    older.push_to_hub(NAME)
    downloaded = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        path = hf_hub_download(repo_id, filename, **options)
        downloaded.append(filename)
        if downloaded.count("adapter_config.json") == 1 and filename == "adapter_config.json":
            newer.push_to_hub(NAME)
        return path

    monkeypatch.setattr("vpt_peft.hub.transfer.hf_hub_download", download)
    subfolder = None if name == "default" else name
    answers = [logits(vpt, vit.pixel_values) for vpt in (older, newer)]
    for expected in answers:
        loaded = VPTModel.from_pretrained(tiny_vit().model, NAME, name, revision=revision, subfolder=subfolder)
        assert torch.equal(logits(loaded, vit.pixel_values), expected)
    assert downloaded == ["adapter_config.json", "adapter_model.safetensors"] * 2


def test_the_users_card_on_the_hub_is_kept(online: HubServer, vpt: VPTModel) -> None:
    vpt.push_to_hub(NAME)
    card = online.repo(NAME).files("main")["README.md"].decode()
    online.repo(NAME).put({"README.md": (card + "\nMy words.\n").encode()}, revision="main")
    vpt.unload()
    vpt = get_vpt_model(vpt.get_base_model(), PromptConfig(num_tokens=7))
    vpt.push_to_hub(NAME)
    card = online.repo(NAME).files("main")["README.md"].decode()
    assert "My words." in card and "| prompt length | 7 |" in card


def test_an_adapter_on_the_hub_finds_its_backbone_there(online: HubServer, vit: Tiny, tmp_path: Path) -> None:
    vit.model.save_pretrained(tmp_path / "backbone")
    online.add_repo("google/vit", tmp_path / "backbone")
    first = online.repo("google/vit").history("main")[0]
    model = type(vit.model).from_pretrained("google/vit")
    torch.manual_seed(1)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=5))
    assert vpt.active_config.base_model_name_or_path == "google/vit"
    vpt.push_to_hub(NAME)
    with torch.no_grad():
        vit.model.classifier.weight.add_(1)
        vit.model.vit.layernorm.weight.add_(1)
    vit.model.save_pretrained(tmp_path / "backbone")
    online.repo("google/vit").put({"model.safetensors": (tmp_path / "backbone/model.safetensors").read_bytes()})
    assert online.repo("google/vit").history("main")[0] != first
    loaded = AutoVPTModel.from_pretrained(NAME)
    assert torch.equal(logits(loaded, vit.pixel_values), logits(vpt, vit.pixel_values))
    changed = type(vit.model).from_pretrained("google/vit")
    with pytest.raises(CheckpointError, match="backbone is not the one that the adapter was trained on"):
        VPTModel.from_pretrained(changed, NAME)
    with pytest.warns(UserWarning, match="was trained on revision"):
        VPTModel.from_pretrained(changed, NAME, check_backbone=False)


def test_pushing_an_adapter_of_a_local_backbone_warns(online: HubServer, vit: Tiny, tmp_path: Path) -> None:
    vit.model.config.name_or_path = str(tmp_path)
    with pytest.warns(UserWarning, match="is a local folder .* others cannot load it"):
        vit.prompted().push_to_hub(NAME)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="AutoImageProcessor needs torchvision there"
)
@pytest.mark.heavy
def test_the_sharing_example_runs(hub: HubServer, vit: Tiny, tmp_path: Path) -> None:
    size = vit.pixel_values.shape[-1]
    vit.model.save_pretrained(tmp_path / "backbone")
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(tmp_path / "backbone")
    hub.add_repo("google/vit", tmp_path / "backbone")
    Image.new("RGB", (20, 16), "red").save(tmp_path / "rose.png")
    done = subprocess.run(
        [sys.executable, ROOT / "examples/share.py", "google/vit", "adapter", "rose.png", "me/shared"],
        env=hub.environment("hf_me", tmp_path / "cache") | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "{'label': 'rose', 'score':" in done.stdout
    assert "preprocessor_config.json" in hub.repo("me/shared").files()
