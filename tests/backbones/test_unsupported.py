"""What is said of models that cannot be prompted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BeitBackbone,
    BeitConfig,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    DonutSwinConfig,
    DonutSwinModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from vpt_peft import Architecture, Head, PromptConfig, UnsupportedModelError, get_vpt_model, register_architecture
from vpt_peft.backbones import ARCHITECTURES
from vpt_peft.backbones.unsupported import REFUSED

# {family: a part of the reason}
FAMILIES = {
    "segformer": "a convolution over the image makes its keys and values", "pvt": "a convolution over the image",
    "cvt": "a convolution over the image", "focalnet": "no attention to tokens", "poolformer": "no attention to tokens",
    "resnet": "no attention to tokens", "mobilevit": "among the pixels at one place", "levit": "batch norms",
    "mobilevitv2": "in one vector", "swiftformer": "in one vector", "pixtral": "packs the patches of all images",
    "qwen3_vl_vision": "packs the patches of all images", "vitdet": "maps of rows and columns",
    "sam_vision_model": "maps of rows and columns",
}  # fmt: skip


def on_meta(build: Any) -> Any:
    """A model of published size, without weights."""
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_that_cannot_be_prompted_is_refused_with_the_reason(model_type: str) -> None:
    model = on_meta(lambda: AutoModel.from_config(AutoConfig.for_model(model_type)))
    with pytest.raises(
        UnsupportedModelError, match=f"A {type(model).__name__} cannot be prompted: .*{FAMILIES[model_type]}"
    ):
        get_vpt_model(model, PromptConfig())


def test_families_that_are_refused_exist_and_are_not_declared() -> None:
    families = [name for refused in REFUSED.values() for name in refused if not name.startswith("ViTMAE")]
    assert [name for name in families if name not in CONFIG_MAPPING] == []
    assert [name for name in families if name in ARCHITECTURES] == []
    assert len(families) == len(set(families))


def test_a_class_that_cannot_be_prompted_names_the_one_that_loads_its_checkpoints() -> None:
    model = on_meta(lambda: ViTMAEForPreTraining(ViTMAEConfig()))
    with pytest.raises(
        UnsupportedModelError, match=r"hides patches at random.*\. Load the checkpoint into ViTModel\.$"
    ):
        get_vpt_model(model, PromptConfig())


def test_another_class_of_a_supported_family_names_the_nearest_one() -> None:
    class Dinov2ForMaskedImageModeling(torch.nn.Module):
        config = AutoConfig.for_model("dinov2")

    for build, nearest in (
        (Dinov2ForMaskedImageModeling, "Dinov2Model"),
        (lambda: BeitBackbone(BeitConfig()), "BeitModel"),
    ):
        model = on_meta(build)
        message = (
            f"got {type(model).__name__}. The nearest supported class is {nearest}, which loads the same checkpoints."
        )
        with pytest.raises(UnsupportedModelError) as error:
            get_vpt_model(model, PromptConfig())
        assert message in str(error.value) and "docs/families.md" in str(error.value)


def test_a_model_of_an_unknown_family_names_the_one_with_the_most_similar_name() -> None:
    model = on_meta(lambda: DonutSwinModel(DonutSwinConfig()))
    with pytest.raises(
        UnsupportedModelError, match=r"got DonutSwinModel. The nearest supported class is \w*SwinModel\."
    ):
        get_vpt_model(model, PromptConfig())


def test_what_is_no_model_of_images_is_refused_without_one() -> None:
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    text = on_meta(lambda: CLIPTextModel(CLIPTextConfig()))
    for model in (bert, text, torch.nn.Linear(2, 2)):
        with pytest.raises(
            UnsupportedModelError, match=rf"such as ViTModel, got {type(model).__name__}\. docs/fam"
        ) as error:
            get_vpt_model(model, PromptConfig())
        assert "register_architecture" in str(error.value) and "check_architecture" in str(error.value)


def test_a_family_that_users_declare_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vitdet", [])  # put back afterwards
    register_architecture(Architecture("vitdet", {"VitDetModel": Head("FEATURE_EXTRACTION")}))
    model = on_meta(lambda: AutoModel.from_config(AutoConfig.for_model("vitdet")))
    with pytest.raises(UnsupportedModelError, match="does not match the declaration of 'vitdet'"):
        get_vpt_model(model, PromptConfig())
