"""Models of images and texts: prompts in the vision model, and the text model as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clip_families import CLIP_FAMILIES, image_and_texts, some_texts
from helpers.families import Family, difference, enlarge, run, some_images
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import Tiny
from torch import Tensor
from transformers import Trainer, TrainingArguments

from vpt_peft import AdapterError, ConfigError, PromptConfig, VPTModel, get_vpt_model

NAMES = ["clip", "metaclip2", "chinese_clip", "altclip", "owlvit", "owlv2", "siglip", "siglip2"]
PLAIN = [name for name in NAMES if name != "siglip2"]  # models of images, and not of patches
TOLERANCE = 1e-5


@pytest.fixture(params=NAMES)
def dual(request: pytest.FixtureRequest) -> Family:
    return CLIP_FAMILIES[request.param]


def image_features(model: Any, family: Family, images: Tensor, **kwargs: Any) -> Tensor:
    """Features of images, without gradients."""
    arguments = {name: value for name, value in family.arguments(images).items() if name not in some_texts()}
    with torch.no_grad():
        features: Tensor = model.get_image_features(**arguments, **kwargs).pooler_output
    return features


def text_features(model: Any) -> Tensor:
    """Features of texts, without gradients."""
    with torch.no_grad():
        features: Tensor = model.get_text_features(**some_texts()).pooler_output
    return features


def normalized(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def test_features_of_images_have_prompts_and_those_of_texts_are_the_backbones(dual: Family) -> None:
    images, model = some_images(), dual.bare()
    bare, texts = image_features(model, dual, images), text_features(model)
    vpt = dual.prompted()
    prompted = image_features(vpt, dual, images)
    assert (prompted - bare).abs().max() > 0.03
    assert torch.equal(text_features(vpt), texts)
    with torch.no_grad():
        output: Any = vpt(**dual.arguments(images))
    torch.testing.assert_close(output.image_embeds, normalized(prompted), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.text_embeds, normalized(texts), atol=TOLERANCE, rtol=0)
    with vpt.disable_adapter():
        assert torch.equal(image_features(vpt, dual, images), bare)
        assert torch.equal(text_features(vpt), texts)
    assert torch.equal(image_features(model, dual, images), bare)


def test_images_of_a_mixed_batch_have_their_own_adapters_and_share_the_texts(dual: Family) -> None:
    vpt = dual.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2, deep=False, bias="all"))
    enlarge(vpt, "other", seed=4)
    names, images = ["other", "__base__", "default"], some_images()
    features = image_features(vpt, dual, images, adapter_names=names)
    logits = run(vpt, images, dual, adapter_names=names)["logits_per_image"]
    assert logits.shape == (3, 4)
    for row, name in enumerate(names):
        own = images[row : row + 1]
        alone = image_features(vpt, dual, own, adapter_names=[name])
        torch.testing.assert_close(features[row : row + 1], alone, atol=TOLERANCE, rtol=TOLERANCE)
        alone = run(vpt, own, dual, adapter_names=[name])["logits_per_image"]
        torch.testing.assert_close(logits[row : row + 1], alone, atol=TOLERANCE, rtol=TOLERANCE)
    with pytest.raises(AdapterError, match="one name for each of the 3 images"):
        image_features(vpt, dual, images, adapter_names=["other"] * 4)  # as many as texts


@pytest.mark.parametrize("location", ["border", "channel", "pixel", "add"])
@pytest.mark.parametrize("name", PLAIN)
def test_features_of_images_have_prompts_at_each_location(name: str, location: str) -> None:
    family = CLIP_FAMILIES[name]
    vpt = family.prompted(num_tokens=2, location=location, deep=False)
    images = some_images(size=28 if location == "border" else 32)
    embedded = run(vpt, images, family)["image_embeds"]
    torch.testing.assert_close(normalized(image_features(vpt, family, images)), embedded, atol=TOLERANCE, rtol=0)


def test_pairs_of_images_and_texts_train_the_adapter_alone(dual: Family) -> None:
    vpt = get_vpt_model(dual.bare(), PromptConfig(num_tokens=3)).train()
    before = snapshot(vpt.get_base_model())
    arguments = dual.arguments(some_images()) | some_texts(3)
    optimizer, losses = torch.optim.Adam(vpt.adapters.parameters(), lr=0.1), []
    for _ in range(6):
        loss = vpt(**arguments, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_unchanged(before, snapshot(vpt.get_base_model()))


def test_features_of_class_names_train_a_classifier(dual: Family) -> None:
    vpt = get_vpt_model(dual.bare(), PromptConfig(num_tokens=3)).train()
    names, labels = normalized(text_features(vpt)), torch.tensor([2, 0, 1])
    arguments = {name: value for name, value in dual.arguments(some_images()).items() if name not in some_texts()}
    optimizer, losses = torch.optim.Adam(vpt.adapters.parameters(), lr=0.1), []
    for _ in range(6):
        scores = 20 * normalized(vpt.get_image_features(**arguments).pooler_output) @ names.T
        loss = torch.nn.functional.cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_biases_of_the_text_model_and_of_attention_that_is_not_called_are_not_trained(dual: Family) -> None:
    paths = dual.prompted(bias="all").adapters["default"].bias.paths
    assert paths and all(path.startswith("vision_model.") for path in paths)
    assert not any(path.startswith("vision_model.head.attention") for path in paths)


@pytest.mark.parametrize("name", ["clip", "metaclip2"])
def test_a_copied_module_of_the_text_model_acts_on_texts_alone_and_with_images(name: str) -> None:
    family = CLIP_FAMILIES[name]
    texts = text_features(family.bare())
    vpt = family.prompted(modules_to_save=["text_projection"])
    with torch.no_grad():
        vpt.adapters["default"].modules_to_save.text_projection.weight.mul_(-1)
        output: Any = vpt(**image_and_texts(some_images()))
    torch.testing.assert_close(text_features(vpt), -texts, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.text_embeds, normalized(-texts), atol=TOLERANCE, rtol=0)
    with vpt.disable_adapter():
        assert torch.equal(text_features(vpt), texts)


def test_texts_without_images_say_where_to_go() -> None:
    vpt = CLIP_FAMILIES["clip"].prompted()
    with pytest.raises(AdapterError, match=r"pixel_values must be given .* use vpt.get_text_features"):
        vpt(**some_texts())
    with pytest.raises(AdapterError, match="pixel_values must be a floating-point tensor"):
        vpt.get_image_features()


def test_patches_are_expected_where_the_model_takes_them() -> None:
    vpt = CLIP_FAMILIES["siglip2"].prompted()
    with pytest.raises(AdapterError, match=r"shape \(num_images, num_patches, num_channels \* patch_size \* patch"):
        vpt(some_images(), **some_texts())


@pytest.mark.parametrize("name", ["siglip2", "siglip2_vision", "siglip2_classifier"])
def test_prompts_in_patches_and_prompts_from_patches_are_refused(name: str) -> None:
    family = CLIP_FAMILIES[name]
    for location in ("add", "pixel", "border", "channel"):
        with pytest.raises(ConfigError, match=f'location="{location}" needs images of one size'):
            get_vpt_model(family.bare(), PromptConfig(location=location, deep=location in ("add", "pixel")))
    added = run(family.prompted(location="add-shared"), some_images(), family)
    assert difference(added, run(family.bare(), some_images(), family)) > 0.03
    with pytest.raises(ConfigError, match="whose images are padded"):
        family.prompted().init_prompts([some_images()])


@pytest.mark.parametrize("name", PLAIN)
def test_prompts_start_as_tokens_of_images_without_texts(name: str) -> None:
    vpt = CLIP_FAMILIES[name].prompted()
    seen: list[Tensor] = []
    hook = vpt.backbone.layers[1].module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vpt.init_prompts([some_images()])
    hook.remove()
    found: Any = vpt.adapters["default"].prompts[1]
    distances = (found.detach()[:, None] - seen[0].flatten(0, 1)).abs().amax(-1)  # (num_tokens, image tokens)
    assert found.shape == (3, 24) and distances.min(1).values.max() < TOLERANCE


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_each_part_of_a_model_may_have_an_attention_of_its_own(name: str) -> None:
    family = CLIP_FAMILIES[name]
    vpt = family.prompted()
    expected = run(vpt, some_images(), family)
    for implementation in ("eager", {"vision_config": "flex_attention", "text_config": "eager"}):
        vpt.set_attn_implementation(implementation)
        assert difference(run(vpt, some_images(), family), expected) < TOLERANCE
    assert vpt.base_model.vision_model.config._attn_implementation == "flex_attention"


def test_a_model_of_images_alone_has_no_features_of_texts(vit: Tiny) -> None:
    vpt = vit.prompted()
    for method in (vpt.get_image_features, vpt.get_text_features):
        with pytest.raises(AdapterError, match="needs a model of images and texts, such as CLIPModel, got ViTFor"):
            method(vit.pixel_values)


def test_features_come_as_a_tuple_where_asked_for() -> None:
    family = CLIP_FAMILIES["clip"]
    vpt = family.prompted()
    with torch.no_grad():
        as_tuple = vpt.get_image_features(some_images(), return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], image_features(vpt, family, some_images()))


def test_an_adapter_that_is_frozen_before_the_backward_pass_raises_an_error() -> None:
    vpt = CLIP_FAMILIES["clip"].prompted().train()
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    loss = vpt.get_image_features(some_images()).pooler_output.sum()
    vpt.set_adapter("other")
    with pytest.raises(AdapterError, match="frozen before the backward pass"):
        loss.backward()


def test_trainer_trains_on_pairs(tmp_path: Path) -> None:
    vpt = get_vpt_model(CLIP_FAMILIES["clip"].bare(), PromptConfig(num_tokens=3))
    texts = some_texts(3)
    rows = [
        {"pixel_values": image, **{name: values[row] for name, values in texts.items()}}
        for row, image in enumerate(some_images())
    ]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {name: torch.stack([row[name] for row in batch]) for name in batch[0]} | {"return_loss": True}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=3, report_to=[], disable_tqdm=True, use_cpu=True
    )
    before = {name: tensor.clone() for name, tensor in vpt.state_dict().items()}
    trainer = Trainer(vpt, arguments, train_dataset=rows, data_collator=collate)  # type: ignore[arg-type]
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert all(not torch.equal(tensor, before[name]) for name, tensor in vpt.state_dict().items())
    vpt.save_pretrained(tmp_path / "adapter")
    again = VPTModel.from_pretrained(CLIP_FAMILIES["clip"].bare(), tmp_path / "adapter")
    family = CLIP_FAMILIES["clip"]
    assert torch.equal(image_features(again, family, some_images()), image_features(vpt.eval(), family, some_images()))
