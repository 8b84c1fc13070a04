"""Every family of backbones, in every way that prompts can act, against prompts concatenated by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import (
    NUM_IMAGES,
    NUM_LABELS,
    Family,
    all_families,
    attended_apart,
    concatenated,
    difference,
    each_family,
    enlarge,
    run,
    some_images,
    tensors,
)
from helpers.invariants import assert_unchanged, snapshot
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vpt_peft import PromptConfig, RouteError, VPTModel, get_vpt_model
from vpt_peft.backbones import ARCHITECTURES, find_backbone, list_classes

TOLERANCE = 1e-4
WAYS: dict[str, dict[str, Any]] = {
    "key_value": {},
    "tokens": {"route": "tokens"},
    "shallow": {"deep": False},
    "carried": {"layers_to_transform": [0, 1]},
}
KEY_VALUE_WAYS: dict[str, dict[str, Any]] = {
    "key_value": {},
    "some_layers": {"layers_to_transform": [0, 2], "carry": False},
}
# compiled in every run: each way of computing attention; the others in thorough ones
COMPILED = (
    "DINOv3ViTModel", "Dinov2ForImageClassification", "Data2VecVisionModel", "InternVLVisionModel", "Blip2VisionModel",
    "CLIPVisionModel", "Siglip2VisionModel", "Swinv2Model", "HieraModel", "YolosModel", "VJEPA2Model",
)  # fmt: skip
each_classifier = each_family(lambda family: family.classifier)


def fresh_prompts(vpt: VPTModel) -> dict[int, Tensor]:
    """The prompts of each layer that has its own."""
    prompts: Any = vpt.adapters["default"].prompts
    return {int(name): prompts.detach() for name, prompts in prompts.named_parameters()}


def total(output: Any) -> Tensor:
    """A scalar that depends on all of an output, differently on each value."""
    generator = torch.Generator().manual_seed(5)
    parts = [(value * torch.randn(value.shape, generator=generator)).sum() for value in tensors(output)]
    return torch.stack(parts).sum()


@each_family()
def test_prompts_act_as_if_concatenated_to_the_tokens_of_each_layer(family: Family) -> None:
    images, model = some_images(), family.bare()
    bare = run(model, images, family)
    for way, config in (KEY_VALUE_WAYS if family.key_value_only else WAYS).items():
        vpt = family.prompted(**config)
        with concatenated(family, model, fresh_prompts(vpt)):
            expected = run(model, images, family)
        ours = run(vpt, images, family)
        assert type(ours) is type(expected) and ours.keys() == expected.keys()
        assert difference(ours, expected) < TOLERANCE, way
        assert difference(ours, bare) > 0.03, way


@each_family()
def test_a_prefix_is_attended_to_apart_from_the_image_and_changes_nothing_untrained(family: Family) -> None:
    images, model = some_images(), family.bare().requires_grad_(False)  # frozen weights may take another kernel
    bare = run(model, images, family)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3, kind="prefix")).eval()
    for own, other in zip(tensors(run(vpt, images, family)), tensors(bare), strict=True):
        assert torch.equal(own, other)
    ours = run(enlarge(vpt), images, family)
    pairs: Any = vpt.adapters["default"].prefix
    reference = family.bare()
    for module in reference.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config._attn_implementation = "sdpa"  # the reference needs it, and GIT does not choose it
    prefixes = [(pair["key"].detach(), pair["value"].detach()) for pair in pairs.children()]
    with attended_apart(family, reference, prefixes):
        expected = run(reference, images, family)
    assert difference(ours, expected) < TOLERANCE
    assert difference(ours, bare) > 0.03


@each_classifier
def test_the_classifier_reads_what_the_pooling_says(family: Family) -> None:
    images, model = some_images(), family.bare()
    norm = model.get_submodule(family.final_norm) if family.final_norm and family.normed else nn.Identity()
    found: list[Tensor] = []
    layer = family.find_layers(model)[-1]
    for pooling in ("image",) if family.key_value_only else ("image", "prompt", "global"):
        vpt = family.prompted(pooling=pooling)
        with concatenated(family, model, fresh_prompts(vpt)) as became:
            override = layer.forward
            layer.forward = lambda *args, override=override, **kwargs: keep(found, override(*args, **kwargs))
            run(model, images, family)
        tokens = found[-1]
        with torch.no_grad():
            image = norm(tokens)[:, family.num_prefix_tokens :]
            prompts = norm(became[0]) if became else image[:, :0]
            shown = family.arguments(images).get("pixel_attention_mask", torch.ones(image.shape[:2]))
            weights = torch.cat([shown if pooling != "prompt" else 0 * shown, torch.ones(prompts.shape[:2])], dim=1)
            weights = weights[:, : image.shape[1]] if pooling == "image" else weights
            averaged = (torch.cat([image, prompts], dim=1)[:, : weights.shape[1]] * weights.unsqueeze(-1)).sum(1)
            read = averaged / weights.sum(1, keepdim=True)
            if family.pooled_norm:
                read = model.get_submodule(family.pooled_norm)(read)
            if family.joins_class_token:
                read = torch.cat([norm(tokens)[:, 0], read], dim=1)
            expected = model.get_submodule(str(family.classifier))(read)
        ours = run(vpt, images, family).logits
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda m, p=pooling: f"{p}: {m}")


def keep(found: list[Tensor], output: Any) -> Any:
    """Appends the tokens that a layer returns to a list, and returns its output."""
    found.append(output[0] if isinstance(output, tuple) else output)
    return output


@each_family()
def test_every_trained_tensor_gets_a_gradient(family: Family) -> None:
    vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=3, bias="all")).train()
    total(vpt(**{**family.arguments(some_images()), **family.training_inputs})).backward()
    trained = {name: parameter for name, parameter in vpt.named_parameters() if parameter.requires_grad}
    assert [name for name in trained if ".bias." in name]
    unread = [name for name, parameter in trained.items() if parameter.grad is None]
    assert [name for name in unread if family.never_read is None or family.never_read not in name] == []
    for name in unread:
        del trained[name]
    # a bias of all keys does not change the attention
    still = [name for name, parameter in trained.items() if not parameter.grad.abs().max() > 1e-6]
    assert [name for name in still if not any(key in name for key in ("k_proj", "key", "k_norm"))] == []


@each_family()
def test_prompts_train_after_passes_in_inference_mode(family: Family) -> None:
    """Nothing that such a pass has computed is used in training, for which PyTorch refuses it."""
    arguments = {**family.arguments(some_images()), **family.training_inputs}
    with torch.no_grad():
        family.bare()(**arguments)  # transformers keeps Data2Vec's indices of the first pass for all other tests too
    vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=3, bias="all"))
    with torch.inference_mode():
        vpt.eval()(**arguments)
        with vpt.serving():
            vpt(**arguments)
    total(vpt.train()(**arguments)).backward()
    assert any(parameter.grad is not None for parameter in vpt.adapters["default"].prompts.parameters())


@each_family()
def test_a_mixed_batch_agrees_with_one_call_for_each_task(family: Family) -> None:
    vpt = family.prompted()
    labels = {"num_labels": NUM_LABELS - 2} if family.classifier else {}
    bias = "all" if family.mixes_biases else "none"
    shallow = {"deep": False, "bias": bias, **family.ends}
    others: list[dict[str, Any]] = [shallow, {"kind": "prefix", "bias": bias}]
    if family.classifier:
        others.append({"num_tokens": 4, "pooling": "image" if family.key_value_only else "global"})
    for number, config in enumerate(others):
        vpt.add_adapter(f"other{number}", PromptConfig(**{"num_tokens": 2, **config}), **labels)
        enlarge(vpt, f"other{number}", seed=number)
    names = ["other0", "default", *(f"other{number}" for number in range(1, len(others))), "__base__"]
    images = torch.cat([some_images(1), some_images(2)])[: len(names)]
    mixed = run(vpt, images, family, adapter_names=names)
    for row, name in enumerate(names):
        alone = run(vpt, images[row : row + 1], family, adapter_names=[name])
        for own, other in zip(tensors(mixed), tensors(alone), strict=True):
            own = own[row : row + 1, : other.shape[1]] if other.ndim > 1 else own[row : row + 1]
            torch.testing.assert_close(own, other, atol=TOLERANCE, rtol=TOLERANCE)


@each_family(lambda family: not family.mixes_biases)
def test_biases_that_cannot_be_mixed_are_refused(family: Family) -> None:
    vpt = family.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2, bias="all"))
    with pytest.raises(RouteError, match=r"cannot be mixed on a \w+, whose linear layers are not all applied along"):
        run(vpt, some_images(), family, adapter_names=["other", "default", "other"])


@each_family()
def test_a_saved_adapter_is_loaded_bit_for_bit(family: Family, tmp_path: Path) -> None:
    vpt = family.prompted(deep=False, bias="all", **family.ends)
    expected = run(vpt, some_images(), family)
    vpt.save_pretrained(tmp_path)
    loaded = run(VPTModel.from_pretrained(family.bare(), tmp_path), some_images(), family)
    for own, other in zip(tensors(loaded), tensors(expected), strict=True):
        assert torch.equal(own, other)


@each_classifier
def test_another_number_of_labels_has_a_head_of_its_own(family: Family) -> None:
    vpt = family.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2), num_labels=NUM_LABELS + 2)
    vpt.set_adapter("other")
    output = vpt(labels=torch.arange(NUM_IMAGES), **family.arguments(some_images()))
    assert output.logits.shape == (NUM_IMAGES, NUM_LABELS + 2)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in vpt.adapters["other"].parameters())


@each_family(lambda family: family.classifier and family.needs_no_labels)
def test_a_model_without_labels_gets_a_head_of_its_width(family: Family) -> None:
    vpt = get_vpt_model(family.bare(num_labels=0), PromptConfig(num_tokens=2)).eval()
    vpt.add_adapter("other", PromptConfig(num_tokens=2), num_labels=3)
    features = run(vpt, some_images(), family).logits
    mixed = run(vpt, some_images(), family, adapter_names=["other", "default", "__base__"])
    assert mixed.num_labels.tolist() == [3, features.shape[1], features.shape[1]]
    torch.testing.assert_close(mixed.logits[1], features[1], atol=TOLERANCE, rtol=TOLERANCE)
    vpt.set_adapter("other")
    logits = run(vpt, some_images(), family).logits
    torch.testing.assert_close(mixed.logits[0, :3], logits[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_model_with_two_classifiers_has_both_of_its_own_and_trains_them() -> None:
    family = all_families()["deit_with_teacher"]
    vpt = family.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2, pooling="global"), num_labels=NUM_LABELS - 2)
    mixed = run(vpt, some_images(), family, adapter_names=["other", "default", "other"])
    for logits in (mixed.logits, mixed.cls_logits, mixed.distillation_logits):
        assert logits.isneginf().sum(1).tolist() == [2, 0, 2]
    vpt.set_adapter("other")
    output = vpt(pixel_values=some_images(), labels=torch.arange(NUM_IMAGES))
    expected = nn.functional.cross_entropy((output.cls_logits + output.distillation_logits) / 2, torch.arange(3))
    torch.testing.assert_close(output.loss, expected)
    as_tuple = vpt(pixel_values=some_images(), labels=torch.arange(NUM_IMAGES), return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in vpt.adapters["other"].parameters())


@each_family()
def test_gradient_checkpointing_changes_no_gradient(family: Family) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=3, deep=False, **family.ends)).train()
        if checkpointing:
            vpt.gradient_checkpointing_enable()
        output = vpt(**family.arguments(some_images()))
        total(output).backward()
        found.append((tensors(output)[0], next(vpt.adapters["default"].prompts.parameters()).grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


@each_family(lambda family: not family.same_layers and family.model_class not in COMPILED)
@pytest.mark.thorough
def test_every_other_model_compiles_to_one_graph(family: Family) -> None:
    check_compiles(family)


@each_family(lambda family: not family.same_layers and family.model_class in COMPILED)
@pytest.mark.heavy
def test_a_model_compiles_to_one_graph(family: Family) -> None:
    check_compiles(family)


def check_compiles(family: Family) -> None:
    vpt = family.prompted()
    if family.reads_hidden_states:
        run(vpt, some_images(), family)
    compiled: Any = torch.compile(vpt, fullgraph=True, backend="eager")
    assert difference(run(compiled, some_images(), family), run(vpt, some_images(), family)) < TOLERANCE


@each_family()
@pytest.mark.thorough
def test_an_exported_graph_agrees(family: Family) -> None:
    vpt = family.prompted()
    program: Any = torch.export.export(vpt, (), family.arguments(some_images()), strict=False).module()
    assert difference(run(program, some_images(), family), run(vpt, some_images(), family)) < TOLERANCE


@each_family()
def test_a_model_in_bfloat16_agrees_up_to_its_precision(family: Family) -> None:
    config = {"layers_to_transform": [0, 1], **family.ends}  # both routes
    expected = run(family.prompted(**config), some_images(), family)
    vpt = enlarge(get_vpt_model(family.bare().to(torch.bfloat16), PromptConfig(num_tokens=3, **config)).eval())
    ours = run(vpt, some_images().to(torch.bfloat16), family)
    assert difference([value.float() for value in tensors(ours)], expected) < 0.15


@each_family()
def test_unload_leaves_the_model_as_it_was(family: Family) -> None:
    model = family.bare().train()
    bare, before = run(model.eval(), some_images(), family), snapshot(model)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3, bias="all"))
    total(vpt(**family.arguments(some_images()))).backward()
    assert vpt.unload() is model
    assert_unchanged(before, snapshot(model))
    for own, other in zip(tensors(run(model, some_images(), family)), tensors(bare), strict=True):
        assert torch.equal(own, other)


@each_family(lambda family: not family.classifier)
def test_the_output_is_behind_the_final_norm_as_declared(family: Family) -> None:
    """A classifier that is added reads ``[CLS]`` behind it."""
    model = family.bare()
    backbone = find_backbone(model)
    normed: list[Tensor] = []
    backbone.final_norm.register_forward_hook(lambda _, args, output: normed.append(output))
    found: list[Any] = []
    backbone.encoder.register_forward_hook(lambda _, args, output: found.append(output.get("last_hidden_state")))
    run(model, some_images(), family)
    if found[0] is None or isinstance(backbone.final_norm, nn.Identity):
        pytest.skip("no tokens as output, or no final norm")
    is_normed = any(output.shape == found[0].shape and torch.equal(output, found[0]) for output in normed)
    assert is_normed == backbone.architecture.normed_output


@each_family()
def test_models_of_the_published_size_are_supported(family: Family) -> None:
    backbone = find_backbone(family.full_size())
    assert len(backbone.layers) > 5
    assert backbone.num_prefix_tokens >= 0 and backbone.patch_size > 1
    assert not family.takes_pixels or min(backbone.image_size) > 1


@each_family(lambda family: family.takes_pixels and not family.key_value_only)
def test_prompts_are_added_to_each_token(family: Family) -> None:
    images, model = some_images(), family.bare()
    vpt = enlarge(get_vpt_model(family.bare(), PromptConfig(num_tokens=1, location="add")).eval())
    layers = family.find_layers(model)
    for index, prompts in fresh_prompts(vpt).items():
        layers[index].register_forward_pre_hook(lambda _, args, prompts=prompts: (args[0] + prompts, *args[1:]))
    assert difference(run(vpt, images, family), run(model, images, family)) < TOLERANCE


@each_family(lambda family: family.takes_pixels and not family.key_value_only)
@pytest.mark.parametrize("location", ["pixel", "channel"])
def test_prompts_in_the_image_go_through_the_patch_embedding(family: Family, location: str) -> None:
    images, model = some_images(), family.bare()
    layers = family.first_layers if location == "pixel" else None
    config = PromptConfig(num_tokens=2, location=location, deep=location == "pixel", layers_to_transform=layers)
    vpt = get_vpt_model(family.bare(), config).eval()
    adapter: Any = vpt.adapters["default"]
    (projection,) = (one for one in model.modules() if isinstance(one, nn.Conv2d) and one.in_channels == 3)
    if location == "pixel":
        norm = model.get_submodule(family.patch_norm) if family.patch_norm else nn.Identity()
        with torch.no_grad():
            prompts = {layer: norm(projection(patch).flatten(1)) for layer, patch in fresh_prompts(vpt).items()}
        with concatenated(family, model, prompts):
            expected = run(model, images, family)
    else:
        own = adapter.replacement(adapter.patch_embedding[0])
        with torch.no_grad():
            added = nn.functional.conv2d(
                adapter.prompts["channels"][None], own.weight[:, 3:], None, own.stride, own.padding
            )
        hook = projection.register_forward_hook(lambda module, args, output: output + added)
        expected = run(model, images, family)
        hook.remove()
    assert difference(run(vpt, images, family), expected) < TOLERANCE


def test_every_declared_class_is_in_the_table() -> None:
    elsewhere = ("swin", "beit", "upernet")  # in tests of their own
    declared = [one for model_type, known in ARCHITECTURES.items() if model_type not in elsewhere for one in known]
    assert set(list_classes(declared)) == {family.model_class for family in all_families().values()}
