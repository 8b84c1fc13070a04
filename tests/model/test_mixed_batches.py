"""One pass for images of different tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import SWIN, VIT, Tiny, logits
from helpers.tasks import MIXES
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTModel,
)

from vpt_peft import AdapterError, PromptConfig, VPTModel, get_vpt_model


def one_by_one(vpt: VPTModel, pixel_values: torch.Tensor, names: list[str]) -> list[torch.Tensor]:
    """What users do without mixed batches."""
    answers = []
    for image, name in zip(pixel_values, names, strict=True):
        if name == "__base__":
            with vpt.disable_adapter():
                answers.append(logits(vpt, image[None])[0])
        else:
            vpt.set_adapter(name)
            answers.append(logits(vpt, image[None])[0])
    return answers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("names", MIXES, ids="-".join)
def test_a_mixed_batch_agrees_with_one_pass_per_task(
    tiny: Tiny, many: VPTModel, names: list[str], attention: str
) -> None:
    tiny.model.set_attn_implementation(attention)
    expected = one_by_one(many, tiny.pixel_values, names)
    with torch.no_grad():
        output = many(tiny.pixel_values, adapter_names=names)
    assert output.num_labels.tolist() == [len(answer) for answer in expected]
    for row, answer in zip(output.logits, expected, strict=True):
        torch.testing.assert_close(row[: len(answer)], answer, atol=1e-5, rtol=0)
        assert (row[len(answer) :] == -torch.inf).all()


def test_a_mixed_batch_on_flex_attention(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("long", PromptConfig(num_tokens=9))
    names = ["default", "long", "__base__", "default"]
    expected = logits(vpt, vit.pixel_values, adapter_names=names)
    vit.model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits(vpt, vit.pixel_values, adapter_names=names), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("names", MIXES, ids="-".join)
@pytest.mark.parametrize("tiny", ["vit"], indirect=True)
def test_a_mixed_batch_with_masked_patches_agrees_with_one_pass_per_task(
    tiny: Tiny, many: VPTModel, names: list[str], attention: str
) -> None:
    tiny.model.set_attn_implementation(attention)
    mask = (torch.arange(17) < torch.tensor([[17], [9], [13], [5]])).long()  # for each image another
    ours = logits(many, tiny.pixel_values, adapter_names=names, attention_mask=mask)
    for row, (image, own_mask, name) in enumerate(zip(tiny.pixel_values, mask, names, strict=True)):
        alone = logits(many, image[None], adapter_names=[name], attention_mask=own_mask[None])[0]
        torch.testing.assert_close(ours[row, : len(alone)], alone, atol=1e-5, rtol=0)


def test_a_mixed_batch_after_deleting_an_adapter(tiny: Tiny, many: VPTModel) -> None:
    many.delete_adapter("long")
    names = ["shallow", "tokens", "shallow", "gaps"]
    expected = one_by_one(many, tiny.pixel_values, names)
    ours = logits(many, tiny.pixel_values, adapter_names=names)
    for row, answer in zip(ours, expected, strict=True):
        torch.testing.assert_close(row[: len(answer)], answer, atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match="got long"):
        many(tiny.pixel_values, adapter_names=["long", *names[1:]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["deep"], "one name for each of the 4 images, got 1 names"),
        ("deep", "one name for each of the 4 images, got 'deep'"),
        (["deep", "deep", "boats", "planes"], "got boats, planes"),
        (["deep", "deep", "deep", None], "got None"),
    ],
)
def test_wrong_names_are_a_clear_error(tiny: Tiny, many: VPTModel, names: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        many(tiny.pixel_values, adapter_names=names)


def test_names_decide_alone_whatever_is_active_or_disabled(tiny: Tiny, many: VPTModel) -> None:
    names = ["deep", "long", "shallow", "__base__"]
    expected = logits(many, tiny.pixel_values, adapter_names=names)
    many.set_adapter("pooled")
    with many.disable_adapter():
        assert torch.equal(logits(many, tiny.pixel_values, adapter_names=names), expected)


def test_adapters_of_different_precision_share_a_pass(tiny: Tiny, many: VPTModel, tmp_path: Path) -> None:
    many.save_pretrained(tmp_path, ["long"])
    many.load_adapter(tmp_path / "long", "half", dtype=torch.bfloat16)
    names = ["half", "deep", "half", "long"]
    expected = one_by_one(many, tiny.pixel_values, names)
    for row, answer in zip(logits(many, tiny.pixel_values, adapter_names=names), expected, strict=True):
        torch.testing.assert_close(row[: len(answer)], answer.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (ViTModel, ViTConfig(**VIT)),
        (ViTForMaskedImageModeling, ViTConfig(**VIT, encoder_stride=8)),
        (SwinModel, SwinConfig(**SWIN)),
        (SwinForMaskedImageModeling, SwinConfig(**SWIN, encoder_stride=8)),
    ],
)
def test_models_without_a_classifier_answer_mixed_batches(model_class: Any, config: Any) -> None:
    torch.manual_seed(0)
    vpt = get_vpt_model(model_class(config).eval(), PromptConfig(num_tokens=3), "deep")
    vpt.add_adapter("shallow", PromptConfig(num_tokens=5, deep=False))
    images = torch.randn(3, 3, config.image_size, config.image_size)
    with torch.no_grad():
        ours = vpt(images, adapter_names=["shallow", "__base__", "deep"])[0]
        with vpt.disable_adapter():
            expected = [vpt(images[1:2])[0]]
        for name, row in (("shallow", 0), ("deep", 2)):
            vpt.set_adapter(name)
            expected.insert(row, vpt(images[row : row + 1])[0])
    torch.testing.assert_close(ours, torch.cat(expected), atol=1e-5, rtol=0)


def test_adapters_with_copies_of_modules_cannot_share_a_pass(tiny: Tiny, many: VPTModel) -> None:
    many.add_adapter("owner", PromptConfig(modules_to_save=["layernorm"]))
    with pytest.raises(AdapterError, match="The adapters owner have copies of modules of the backbone"):
        many(tiny.pixel_values, adapter_names=["owner", "deep", "deep", "deep"])
    many.add_adapter("other", PromptConfig(modules_to_save=["layernorm"], bias="all"))
    with pytest.raises(AdapterError, match="The adapters other, owner have copies of modules of the backbone"):
        many(tiny.pixel_values, adapter_names=["deep", "other", "owner", "__base__"])
    many.set_adapter("owner")
    expected = logits(many, tiny.pixel_values)
    assert torch.equal(logits(many, tiny.pixel_values, adapter_names=["owner"] * 4), expected)


@pytest.mark.parametrize("deep", [True, False])
def test_dropout_in_a_mixed_batch_differs_between_the_images_of_an_adapter(tiny: Tiny, deep: bool) -> None:
    vpt = tiny.prompted(deep=deep, dropout=0.5).train()
    vpt.add_adapter("plain", PromptConfig(num_tokens=3))
    same, names = tiny.pixel_values[:1].expand(4, -1, -1, -1), ["default", "plain", "default", "plain"]
    dropped = logits(vpt, same, adapter_names=names)
    assert (dropped[0] - dropped[2]).abs().max() > 1e-4
    torch.testing.assert_close(dropped[1], dropped[3], atol=1e-6, rtol=0)
    whole = logits(vpt.eval(), same, adapter_names=names)
    torch.testing.assert_close(whole[0], whole[2], atol=1e-6, rtol=0)


def test_labels_with_mixed_batches_are_refused(tiny: Tiny, many: VPTModel) -> None:
    with pytest.raises(AdapterError, match="labels cannot be given with adapter_names"):
        many(tiny.pixel_values, labels=tiny.labels, adapter_names=["deep"] * 4)
