"""The backbone that a stranger's adapter names is trusted no more than the adapter: no code of its own, no pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Tiny, logits
from helpers.mutations import NASTY
from helpers.pickles import MaliciousPickle
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from vpt_peft import AutoVPTModel, CheckpointError, PromptConfig, VPTModel, get_vpt_model


def adapter_of(name: str, tiny: Tiny, folder: Path) -> Path:
    """An adapter that says it is for the backbone ``name``."""
    vpt = get_vpt_model(tiny.model, PromptConfig(num_tokens=2, base_model_name_or_path=name))
    vpt.save_pretrained(folder)
    vpt.unload()
    return folder


@pytest.mark.parametrize(
    "name", [*(name for name in NASTY if name != "\ud800"), "no/such/thing", "~", ".", "me/missing"]
)
def test_a_backbone_of_a_nasty_name_is_refused_and_its_card_can_be_written(
    name: str, vit: Tiny, hub: Any, tmp_path: Path
) -> None:
    folder = adapter_of(name, vit, tmp_path / "adapter")
    vpt = VPTModel.from_pretrained(vit.model, folder)
    vpt.save_pretrained(folder)
    vpt.unload()
    with pytest.raises(CheckpointError, match="adapter") as error:
        AutoVPTModel.from_pretrained(folder)
    assert len(str(error.value)) < 5_000


@pytest.mark.parametrize("own", ["config", "config of a known class", "weights"])
def test_a_backbone_is_loaded_without_running_code_of_its_own(
    own: str, vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked to allow it"))
    backbone, sprung = tmp_path / "backbone", tmp_path / "sprung"
    vit.model.save_pretrained(backbone)
    if own != "weights":
        said = json.loads((backbone / "config.json").read_text())
        classes = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}
        (backbone / "config.json").write_text(json.dumps({**said, "model_type": "evil", "auto_map": classes}))
        (backbone / "evil.py").write_text(
            f"open({str(sprung)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n"
        )
    else:
        torch.save({**vit.model.state_dict(), "x": MaliciousPickle(sprung)}, backbone / "pytorch_model.bin")
        (backbone / "model.safetensors").unlink()
    folder = adapter_of(str(backbone), vit, tmp_path / "adapter")
    if own == "config of a known class":  # the adapter names the class of transformers that it was trained on
        assert type(AutoVPTModel.from_pretrained(folder).get_base_model()) is type(vit.model)
    else:
        said = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**said, "model_class": None}))
        weights = folder / "adapter_model.safetensors"
        save_file(load_file(weights), weights)  # without the seal, as in files of other tools
        with pytest.raises(CheckpointError, match=r"The backbone '.*backbone' of the adapter '.*' cannot be loaded"):
            AutoVPTModel.from_pretrained(folder)
    assert not sprung.exists()


def test_the_user_can_allow_a_backbone_that_is_no_safetensors(vit: Tiny, tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    vit.model.save_pretrained(backbone)
    torch.save(vit.model.state_dict(), backbone / "pytorch_model.bin")
    (backbone / "model.safetensors").unlink()
    folder = adapter_of(str(backbone), vit, tmp_path / "adapter")
    loaded = AutoVPTModel.from_pretrained(folder, use_safetensors=False)
    model = AutoModelForImageClassification.from_pretrained(backbone, use_safetensors=False)
    expected = logits(VPTModel.from_pretrained(model, folder), vit.pixel_values)
    assert torch.equal(logits(loaded, vit.pixel_values), expected)
