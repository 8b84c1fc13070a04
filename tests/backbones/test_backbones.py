"""Which models are supported, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import VIT, Tiny, logits
from transformers import (
    Data2VecVisionConfig,
    Data2VecVisionModel,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from vpt_peft import (
    AdapterError,
    Architecture,
    Head,
    PromptConfig,
    UnsupportedModelError,
    get_vpt_model,
    register_architecture,
)
from vpt_peft.backbones import ARCHITECTURES


@pytest.mark.parametrize("model", [None, "google/vit-base-patch16-224"])
def test_what_is_no_model_is_named_with_the_way_to_load_one(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Expected a model, got .*AutoModel\w*\.from_pretrained"):
        get_vpt_model(model, PromptConfig())


def test_a_model_that_carries_prompts_already_is_refused(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    expected = logits(vpt, tiny.pixel_values)
    for model in (vpt, tiny.model):
        with pytest.raises(AdapterError, match="already has adapters"):
            get_vpt_model(model, PromptConfig())
    assert torch.equal(logits(vpt, tiny.pixel_values), expected)


def test_a_subclass_of_a_supported_class_is_supported(vit: Tiny) -> None:
    class Mine(ViTForImageClassification):
        pass

    model = Mine(vit.model.config).eval()
    model.load_state_dict(vit.model.state_dict())
    torch.manual_seed(1)
    ours = get_vpt_model(model, PromptConfig(num_tokens=5))
    assert torch.equal(logits(ours, vit.pixel_values), logits(vit.prompted(), vit.pixel_values))


def test_a_declaration_that_does_not_fit_says_so(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit", [])  # put back afterwards
    heads = {"ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",))}
    register_architecture(Architecture("vit", heads, norm="norm_of_another_version"))
    with pytest.raises(UnsupportedModelError, match="does not match the declaration of 'vit'"):
        get_vpt_model(vit.model, PromptConfig())


def test_the_first_declaration_that_fits_is_used(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit", list(ARCHITECTURES["vit"]))
    heads = {"ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",))}
    register_architecture(Architecture("vit", heads, norm="norm_of_another_version"))
    assert get_vpt_model(vit.model, PromptConfig()).routes == dict.fromkeys(range(4), "key_value")


@pytest.mark.parametrize("change", [{"mlp": "mlp.fc1"}, {"o_proj": "q_proj"}, {"mlp_norm": "layernorm_before"}])
def test_a_declaration_that_overlooks_parameters_is_refused(
    vit: Tiny, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit", [])
    heads = {"ViTForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",))}
    register_architecture(Architecture("vit", heads, **change))
    with pytest.raises(UnsupportedModelError, match=r"declaration of 'vit' overlooks .* of ViTLayer"):
        get_vpt_model(vit.model, PromptConfig())


def test_an_attention_that_calls_no_function_is_refused() -> None:
    model = Data2VecVisionModel._from_config(Data2VecVisionConfig(**VIT), attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match=r'Data2VecVisionModel .* Load it with attn_implementation="sdpa"'):
        get_vpt_model(model, PromptConfig())


def test_a_model_that_masks_patches_is_refused_and_its_checkpoint_works_in_a_vit(tmp_path: Path) -> None:
    model = ViTMAEModel(ViTMAEConfig(**VIT))
    with pytest.raises(UnsupportedModelError, match=r"hides patches at random.*Load the checkpoint into ViTModel"):
        get_vpt_model(model, PromptConfig())
    pretrained = ViTMAEForPreTraining(model.config)
    pretrained.save_pretrained(tmp_path / "mae")
    classifier = ViTForImageClassification.from_pretrained(tmp_path / "mae")
    assert torch.equal(classifier.vit.layers[1].mlp.fc1.weight, pretrained.vit.layers[1].mlp.fc1.weight)
    assert get_vpt_model(classifier, PromptConfig()).routes == dict.fromkeys(range(4), "key_value")


def test_a_checkpoint_of_another_family_in_a_vit_is_a_vit(vit: Tiny) -> None:
    vit.model.config.model_type = "vit_mae"  # as from_pretrained leaves it for MAE, MSN and DeiT checkpoints
    assert get_vpt_model(vit.model, PromptConfig()).backbone.model_type == "vit"
