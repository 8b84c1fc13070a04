"""A linear classifier on models that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import headless
from helpers.headless import images
from helpers.models import BEIT, SWIN, VIT, assert_same, logits
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from vpt_peft import (
    AdapterError,
    AutoVPTModelForImageClassification,
    ConfigError,
    PromptConfig,
    RouteError,
    VPTModel,
    get_vpt_model,
)

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTModel(ViTConfig(**VIT)),
    "swin": lambda: SwinModel(SwinConfig(**SWIN)),
    "beit": lambda: BeitModel(BeitConfig(**BEIT)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
}
POOLINGS = {
    "vit": ("default", "class", "image", "class_and_image", "pooled", "prompt", "global"),
    "swin": ("default", "image", "pooled", "prompt", "global"),
    "beit": ("default", "class", "image", "class_and_image", "pooled"),
    "clip": ("default", "class", "image", "class_and_image", "pooled", "prompt", "global"),
}
CASES = [(name, pooling) for name, poolings in POOLINGS.items() for pooling in poolings]


def build(name: str) -> PreTrainedModel:
    return headless.build(MODELS[name])


def classify(model: PreTrainedModel, pooling: str = "default", num_labels: int = 5, **config: Any) -> VPTModel:
    torch.manual_seed(1)
    options = {"num_tokens": 3, "task_type": "IMAGE_CLASSIFICATION", "pooling": pooling, **config}
    return get_vpt_model(model, PromptConfig(**options), num_labels=num_labels)


@pytest.mark.parametrize(("name", "pooling"), [case for case in CASES if case[1] not in ("prompt", "global")])
def test_logits_are_those_of_the_features_that_the_pooling_names(name: str, pooling: str) -> None:
    model = build(name)
    pixel_values = images(model)
    vpt = classify(model, pooling, num_tokens=0)
    with torch.no_grad():
        bare = model(pixel_values)
    tokens, prefix = bare.last_hidden_state, 0 if name == "swin" else 1
    if name == "clip":  # its output is in front of the final norm
        tokens = vpt.backbone.final_norm(tokens).detach()
    features = {
        "class": tokens[:, 0],
        "image": tokens[:, prefix:].mean(1),
        "class_and_image": torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=1),
        "pooled": bare.pooler_output,
        "default": bare.pooler_output if name == "swin" else tokens[:, 0],
    }[pooling]
    head = vpt.adapters["default"].head.find("classifier")
    assert head.weight.shape == (5, features.shape[1])
    torch.testing.assert_close(logits(vpt, pixel_values), head(features).detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "pooling"), CASES)
def test_it_trains_and_comes_back_bit_for_bit(name: str, pooling: str, tmp_path: Path) -> None:
    model = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pixel_values, labels = images(model), torch.tensor([0, 1, 2, 4])
    vpt = classify(model, pooling).train()
    optimizer = torch.optim.SGD([parameter for parameter in vpt.parameters() if parameter.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = vpt(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    expected = logits(vpt.eval(), pixel_values)
    vpt.save_pretrained(tmp_path)
    assert vpt.unload() is model
    assert_same(model.state_dict(), before, 0)
    loaded = VPTModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(loaded, pixel_values), expected)
    assert loaded.config.num_labels == 5


def test_without_adapter_it_is_the_model_that_was_given() -> None:
    model = build("vit")
    pixel_values = images(model)
    with torch.no_grad():
        bare = model(pixel_values).last_hidden_state
        vpt = classify(model)
        assert vpt.get_base_model() is model and vpt.get_model_status().base_model_type == "ViTModel"
        with vpt.disable_adapter():
            assert torch.equal(vpt(pixel_values).last_hidden_state, bare)
        assert torch.equal(model(pixel_values).last_hidden_state, bare)


def test_images_of_several_tasks_with_poolings_of_their_own() -> None:
    model = build("vit")
    pixel_values = images(model)
    vpt = classify(model)
    for pooling in ("class_and_image", "pooled", "global"):
        config = PromptConfig(num_tokens=2, task_type="IMAGE_CLASSIFICATION", pooling=pooling, bias="all")
        vpt.add_adapter(pooling, config, num_labels=3)
    names = ["default", "class_and_image", "pooled", "global"]
    mixed = logits(vpt, pixel_values, adapter_names=names)
    for row, name in enumerate(names):
        vpt.set_adapter(name)
        alone = logits(vpt, pixel_values[row : row + 1])[0]
        torch.testing.assert_close(mixed[row, : len(alone)], alone, atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match="ViTModel has no head of its own for images of '__base__'"):
        vpt(pixel_values, adapter_names=["default", "__base__", "pooled", "default"])


def test_every_bias_that_trains_has_a_gradient() -> None:
    model = build("vit")
    vpt = classify(model, bias="all").train()
    vpt(images(model), labels=torch.tensor([0, 1, 2, 4])).loss.backward()
    without = [name for name, parameter in vpt.adapters.named_parameters() if parameter.grad is None]
    assert without == []


def test_checkpointing_attention_and_compilation() -> None:
    model = build("vit")
    pixel_values, labels = images(model), torch.tensor([0, 1, 2, 4])
    vpt = classify(model).train()
    vpt(pixel_values, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in vpt.adapters.named_parameters()}
    vpt.zero_grad()
    vpt.set_attn_implementation("eager")
    vpt.gradient_checkpointing_enable()
    vpt(pixel_values, labels=labels).loss.backward()
    assert_same({name: parameter.grad for name, parameter in vpt.adapters.named_parameters()}, expected, 1e-5)
    vpt.gradient_checkpointing_disable()
    compiled = torch.compile(vpt.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, pixel_values), logits(vpt, pixel_values), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "pooling", "labels", "message"),
    [
        ("vit", "default", {}, "classifier that is added to ViTModel needs labels, got none"),
        ("swin", "class", {"num_labels": 5}, r"reads \[CLS\], which SwinModel does not have"),
        ("vit", "default", {"num_labels": 5, "id2label": {0: "a"}}, "must have a name"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_bare(
    name: str, pooling: str, labels: dict[str, Any], message: str
) -> None:
    model = build(name)
    with pytest.raises(ConfigError, match=message):
        get_vpt_model(model, PromptConfig(task_type="IMAGE_CLASSIFICATION", pooling=pooling), **labels)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_without_pooled_output_says_so() -> None:
    torch.manual_seed(0)
    vpt = classify(ViTModel(ViTConfig(**VIT), add_pooling_layer=False), "pooled")
    with pytest.raises(RouteError, match="ViTModel has none"):
        vpt(images(vpt.get_base_model()))


def test_poolings_of_an_added_classifier_are_refused_for_others(vit: Any) -> None:
    with pytest.raises(ConfigError, match="needs a classifier that is added to a model without one, got ViTFor"):
        vit.prompted(pooling="class")


@pytest.mark.parametrize("name", MODELS)
def test_backbone_and_classifier_are_found_again_by_the_name_of_the_backbone(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "backbone")
    model = type(build(name)).from_pretrained(tmp_path / "backbone")
    vpt = classify(model, "image").eval()
    vpt.save_pretrained(tmp_path / "adapter")
    loaded = AutoVPTModelForImageClassification.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(model)
    assert torch.equal(logits(loaded, images(model)), logits(vpt, images(model)))
