"""Prompts that start as tokens of images: compared with the hidden states of the bare model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.invariants import assert_unchanged, snapshot
from helpers.models import SEGMENTERS, Tiny, assert_same, logits, tiny_beit, tiny_vit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BatchFeature, PreTrainedModel

from vpt_peft import AdapterError, ConfigError, PromptConfig, VPTError, VPTModel, get_adapter_state_dict

METHODS = ("sample", "kmeans", "mean")
STARTS = [0, 2]  # the first layer of each stage, in Swin: their inputs are hidden states
TOLERANCE = 1e-5

each_method = pytest.mark.parametrize("method", METHODS)


def layer_inputs(model: PreTrainedModel, images: Tensor, **kwargs: object) -> dict[int, Tensor]:
    """``{layer: (num_images, num_patches, width)}`` of the bare model."""
    with torch.no_grad():
        states = model(images, output_hidden_states=True, **kwargs).hidden_states
    if model.config.model_type == "upernet":  # its other hidden states are from before patch merging
        return {0: states[0].flatten(2).mT}
    if model.config.model_type == "swin":
        return dict(zip(STARTS, states, strict=False))
    return {layer: state[:, 1:] for layer, state in enumerate(states[:-1])}


def prompts_of(vpt: VPTModel) -> dict[int, Tensor]:
    found = {key: tensor.clone() for key, tensor in vpt.get_adapter_state_dict().items()}
    return {int(key.split(".")[1]): tensor for key, tensor in found.items() if key.startswith("prompts.")}


def nearest(vectors: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference of each vector from the candidate next to it, and which one that is."""
    distances = (vectors[:, None] - candidates[None]).abs().amax(-1)
    return distances.min(1)


def assert_different_ones_of(vectors: Tensor, candidates: Tensor) -> None:
    difference, index = nearest(vectors, candidates)
    torch.testing.assert_close(difference, torch.zeros_like(difference), atol=TOLERANCE, rtol=0)
    assert len(set(index.tolist())) == len(vectors), "one vector was taken twice"


def inertia(centres: Tensor, tokens: Tensor) -> float:
    """What k-means minimises: the sum of squared distances to the closest centre."""
    return float((torch.cdist(tokens, centres).amin(1) ** 2).sum())


def batches(tiny: Tiny, size: int = 2) -> DataLoader[Any]:
    data: Any = [
        {"pixel_values": image, "labels": label} for image, label in zip(tiny.pixel_values, tiny.labels, strict=True)
    ]
    return DataLoader(data, batch_size=size)


# -- where prompts start ----------------------------------------------------------------------------------------------


def test_sampled_prompts_are_image_tokens_of_their_layers(tiny: Tiny) -> None:
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(7, layers_to_transform=STARTS)
    vpt.init_prompts(batches(tiny), "sample")
    found = prompts_of(vpt)
    assert list(found) == STARTS
    for layer, prompts in found.items():
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1))


def test_the_keys_of_a_prefix_become_those_of_image_tokens(tiny: Tiny) -> None:
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(7, kind="prefix", layers_to_transform=STARTS)
    before = {key: tensor.clone() for key, tensor in vpt.get_adapter_state_dict().items()}
    vpt.init_prompts(batches(tiny), "sample")
    for layer in STARTS:
        own = vpt.backbone.layers[layer]
        with torch.no_grad():
            keys = own.part("k_proj")(own.part("norm")(inputs[layer].flatten(0, 1)))
        assert_different_ones_of(vpt.get_adapter_state_dict()[f"prefix.{layer}.key"], keys)
    assert_same({key: tensor for key, tensor in vpt.get_adapter_state_dict().items() if "key" not in key},
                {key: tensor for key, tensor in before.items() if "key" not in key}, 0)  # fmt: skip


@pytest.mark.parametrize("location", ["add", "add-shared", "pixel"])
def test_prompts_that_are_no_tokens_cannot_start_as_tokens(vit: Tiny, location: str) -> None:
    vpt = vit.prompted(location=location)
    before = {key: tensor.clone() for key, tensor in vpt.get_adapter_state_dict().items()}
    with pytest.raises(ConfigError, match=f'Prompts at location="{location}" are no tokens'):
        vpt.init_prompts(batches(vit))
    assert_same(vpt.get_adapter_state_dict(), before, 0)


def test_every_image_token_may_become_a_prompt(tiny: Tiny) -> None:
    number = layer_inputs(tiny.model, tiny.pixel_values)[2].flatten(0, 1).shape[0]
    vpt = tiny.prompted(number, layers_to_transform=[2])
    vpt.init_prompts(batches(tiny, 3), "sample")
    assert_different_ones_of(prompts_of(vpt)[2], layer_inputs(tiny.model, tiny.pixel_values)[2].flatten(0, 1))


def test_means_are_those_of_single_images(tiny: Tiny) -> None:
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(4, layers_to_transform=STARTS)
    vpt.init_prompts(batches(tiny, 3), "mean")
    for layer, prompts in prompts_of(vpt).items():
        assert_different_ones_of(prompts, inputs[layer].mean(1))


def test_centres_are_closer_to_the_tokens_than_sampled_ones(tiny: Tiny) -> None:
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(4, layers_to_transform=STARTS)
    vpt.init_prompts(batches(tiny), "sample")
    sampled = prompts_of(vpt)
    vpt.init_prompts(batches(tiny), "kmeans")
    for layer, centres in prompts_of(vpt).items():
        tokens = inputs[layer].flatten(0, 1)
        assert inertia(centres, tokens) < 0.9 * inertia(sampled[layer], tokens)


def test_centres_are_the_means_of_their_clusters(vit: Tiny) -> None:
    tokens = layer_inputs(vit.model, vit.pixel_values)[2].flatten(0, 1)
    vpt = vit.prompted(2, layers_to_transform=[2])
    vpt.init_prompts(batches(vit), "kmeans")  # which uses 32 tokens for each centre: all 64
    centres = prompts_of(vpt)[2]
    clusters = torch.cdist(tokens, centres).argmin(1)
    means = torch.stack([tokens[clusters == number].mean(0) for number in range(2)])
    torch.testing.assert_close(centres, means, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("builder", [tiny_vit, tiny_beit])
def test_each_layer_of_vpt_deep_gets_its_own_tokens(builder: Callable[[], Tiny]) -> None:
    tiny = builder()
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(5)
    vpt.init_prompts(batches(tiny))
    found = prompts_of(vpt)
    assert list(found) == [0, 1, 2, 3]
    for layer, prompts in found.items():
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1))
        others = torch.cat([inputs[other].flatten(0, 1) for other in inputs if other != layer])
        assert nearest(prompts, others)[0].min() > 100 * TOLERANCE


def test_vpt_shallow_gets_tokens_of_the_embeddings(tiny: Tiny) -> None:
    tokens = layer_inputs(tiny.model, tiny.pixel_values)[0].flatten(0, 1)
    vpt = tiny.prompted(6, deep=False)
    vpt.init_prompts(batches(tiny))
    assert list(prompts_of(vpt)) == [0]
    assert_different_ones_of(prompts_of(vpt)[0], tokens)


def test_shared_prompts_get_tokens_of_all_their_layers(vit: Tiny) -> None:
    inputs = layer_inputs(vit.model, vit.pixel_values)
    means = torch.cat([inputs[layer].mean(1) for layer in (1, 2, 3)])
    vpt = vit.prompted(12, shared=True, layers_to_transform=[1, 2, 3])
    vpt.init_prompts(batches(vit), "mean")  # 12 prompts of 4 images in 3 layers: all of them
    found = prompts_of(vpt)
    assert list(found) == [1]
    assert_different_ones_of(found[1], means)


@pytest.mark.parametrize("name", SEGMENTERS)
def test_segmentation_models_get_tokens_too(name: str) -> None:
    tiny = SEGMENTERS[name]()
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(5)
    before = prompts_of(vpt)
    vpt.init_prompts(batches(tiny))
    found = prompts_of(vpt)
    assert all(not torch.isclose(prompts, before[layer]).any() for layer, prompts in found.items())
    for layer in found.keys() & inputs.keys():
        assert_different_ones_of(found[layer], inputs[layer].flatten(0, 1))


def test_the_backbone_that_is_seen_is_bare(vit: Tiny) -> None:
    inputs = layer_inputs(vit.model, vit.pixel_values)
    vpt = vit.prompted(5, bias="all")
    with torch.no_grad():
        for parameter in vpt.adapters.parameters():
            parameter.normal_()
    vpt.train().init_prompts(batches(vit))
    for layer, prompts in prompts_of(vpt).items():
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1))


def test_a_backbone_in_training_mode_is_seen_in_eval_mode() -> None:
    tiny = tiny_vit(hidden_dropout_prob=0.5)
    inputs = layer_inputs(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(5)
    tiny.model.train()
    vpt.init_prompts(batches(tiny))
    assert tiny.model.training and tiny.model.vit.layers[0].training
    for layer, prompts in prompts_of(vpt).items():
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1))


def test_images_take_the_precision_of_the_backbone(vit: Tiny) -> None:
    model = vit.model.to(torch.bfloat16)
    inputs = layer_inputs(model, vit.pixel_values.to(torch.bfloat16))
    vpt = vit.prompted(5)
    vpt.init_prompts([vit.pixel_values])
    for layer, prompts in prompts_of(vpt).items():
        assert prompts.dtype == torch.float32
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1).float())


def test_images_of_another_size(vit: Tiny) -> None:
    images = torch.randn(3, 3, 48, 40)
    inputs = layer_inputs(vit.model, images, interpolate_pos_encoding=True)
    vpt = vit.prompted(5)
    vpt.init_prompts([images], interpolate_pos_encoding=True)
    for layer, prompts in prompts_of(vpt).items():
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1))


# -- the dataloader ---------------------------------------------------------------------------------------------------


@each_method
def test_all_kinds_of_batches_are_read_alike(vit: Tiny, method: str) -> None:
    vpt, images, labels = vit.prompted(3), vit.pixel_values, vit.labels
    kinds: list[Any] = [
        images,
        (images, labels),
        [images, labels],
        {"labels": labels, "pixel_values": images, "mask": None},
        BatchFeature({"pixel_values": images}),
    ]
    found = []
    for kind in kinds:
        torch.manual_seed(3)
        vpt.init_prompts(iter([kind]), method)
        found.append({str(layer): prompts for layer, prompts in prompts_of(vpt).items()})
    for other in found[1:]:
        assert_same(other, found[0])


def test_exactly_num_images_are_read(vit: Tiny) -> None:
    means = layer_inputs(vit.model, vit.pixel_values)[0].mean(1)
    read = []

    def loader() -> Iterator[Tensor]:
        for number, batch in enumerate(vit.pixel_values.split(2)):
            read.append(number)
            yield batch
        raise AssertionError("one batch too many was read")

    vpt = vit.prompted(3, deep=False)
    vpt.init_prompts(loader(), "mean", num_images=3)
    assert read == [0, 1]
    assert_different_ones_of(prompts_of(vpt)[0], means[:3])
    vpt.init_prompts(vit.pixel_values.split(2), "mean", num_images=4)


@each_method
def test_the_seed_determines_the_prompts(tiny: Tiny, method: str) -> None:
    vpt, found = tiny.prompted(3), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        vpt.init_prompts(batches(tiny), method)
        found.append({str(layer): prompts for layer, prompts in prompts_of(vpt).items()})
    assert_same(found[0], found[1])
    assert any(not torch.equal(found[0][layer], found[2][layer]) for layer in found[0])


# -- nothing else changes ---------------------------------------------------------------------------------------------


@each_method
def test_only_the_prompts_of_the_active_adapter_change(tiny: Tiny, method: str) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(3, bias="all")
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    before, model = {key: tensor.clone() for key, tensor in vpt.state_dict().items()}, snapshot(tiny.model)
    vpt.train().init_prompts(batches(tiny), method)
    assert_unchanged(model, snapshot(tiny.model))
    after = vpt.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if key.startswith("adapters.default.prompts.")}
    assert vpt.training and vpt.adapters["default"].training
    assert all(prompts.requires_grad for prompts in vpt.adapters["default"].prompts.parameters())
    assert torch.equal(logits(vpt.unload(), tiny.pixel_values), bare)


def test_the_second_adapter_gets_prompts_when_it_is_active(vit: Tiny) -> None:
    vpt = vit.prompted(3)
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    first = {key: tensor.clone() for key, tensor in get_adapter_state_dict(vpt, "default").items()}
    vpt.set_adapter("other")
    vpt.init_prompts(batches(vit), "mean")
    assert_same(get_adapter_state_dict(vpt, "default"), first)
    means = layer_inputs(vit.model, vit.pixel_values)[1].mean(1)
    assert_different_ones_of(get_adapter_state_dict(vpt, "other")["prompts.1"], means)


@pytest.mark.heavy
def test_a_compiled_model_is_not_skipped(vit: Tiny) -> None:
    inputs = layer_inputs(vit.model, vit.pixel_values)
    vpt = vit.prompted(5)
    vpt.compile(backend="eager")
    before = logits(vpt, vit.pixel_values)
    with vpt.disable_adapter():
        logits(vpt, vit.pixel_values)  # compiled without hooks
    vpt.init_prompts([vit.pixel_values])
    for layer, prompts in prompts_of(vpt).items():
        assert_different_ones_of(prompts, inputs[layer].flatten(0, 1))
    after = logits(vpt, vit.pixel_values)
    assert not torch.equal(before, after)
    uncompiled = tiny_vit().prompted(5)
    uncompiled.load_state_dict(vpt.state_dict())
    torch.testing.assert_close(after, logits(uncompiled, vit.pixel_values), atol=TOLERANCE, rtol=0)


def test_a_serving_model_answers_with_the_new_prompts(vit: Tiny) -> None:
    vpt = vit.prompted(5)
    with vpt.serving():
        before = logits(vpt, vit.pixel_values)
        vpt.init_prompts([vit.pixel_values])
        served = logits(vpt, vit.pixel_values)
    assert torch.equal(served, logits(vpt, vit.pixel_values)) and not torch.equal(served, before)


# -- errors -----------------------------------------------------------------------------------------------------------

IMAGES = torch.randn(4, 3, 32, 32)
REFUSED: dict[str, tuple[dict[str, Any], Any, dict[str, Any], type[Exception], str]] = {
    "method": ({}, [IMAGES], {"method": "median"}, ConfigError, "one of 'sample', 'kmeans', 'mean', got 'median'"),
    "no_images_wanted": ({}, [IMAGES], {"num_images": 0}, ConfigError, "integer of at least 1, got 0"),
    "half_an_image": ({}, [IMAGES], {"num_images": 2.5}, ConfigError, "integer of at least 1, got 2.5"),
    "no_prompts": ({"num_tokens": 0}, [IMAGES], {}, ConfigError, "must have prompts, got num_tokens=0"),
    "projected": ({"projection_dim": 6}, [IMAGES], {}, ConfigError, "fit into their width, got projection_dim=6"),
    "empty": ({}, [], {}, AdapterError, "as many image tokens as prompts, 5, got 0 in layer 0"),
    "empty_kmeans": ({}, [], {"method": "kmeans"}, AdapterError, "as many image tokens as prompts, 5, got 0"),
    "few_tokens": ({"num_tokens": 65}, [IMAGES], {}, AdapterError, "image tokens as prompts, 65, got 64 in layer 0"),
    "few_images": ({}, [IMAGES], {"method": "mean"}, AdapterError, "as many images as prompts, 5, got 4 in layer 0"),
    "no_pixel_values": ({}, [{"image": IMAGES, "label": 0}], {}, AdapterError, "pixel_values, got 'image', 'label'"),
    "a_dict": ({}, {"pixel_values": IMAGES}, {}, AdapterError, "tensor of images, got 'pixel_values'"),
    "a_number": ({}, [7], {}, AdapterError, "a tensor of images, got 7"),
    "an_empty_tuple": ({}, [()], {}, AdapterError, r"a tensor of images, got \(\)"),
    "bytes": ({}, [(IMAGES * 50).byte()], {}, AdapterError, "must be a floating-point tensor"),
    "single_images": ({}, IMAGES, {}, AdapterError, r"got a tensor of torch.float32 and shape \(3, 32, 32\)"),
    "late": ({}, [IMAGES, IMAGES, "end"], {}, AdapterError, "tensor of images, got 'end'"),
    "infinite": ({}, [IMAGES, IMAGES * torch.inf], {}, AdapterError, "must be finite, got NaN or infinite .* layer 0"),
    "other_size": ({}, [IMAGES, IMAGES[..., :24]], {}, ValueError, "doesn't match model"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "loader", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_an_error_says_what_is_missing_and_changes_nothing(
    vit: Tiny, config: dict[str, Any], loader: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    vpt = vit.prompted(**config).train()
    vit.model.train()
    before = {key: tensor.clone() for key, tensor in vpt.state_dict().items()}
    model, modes = snapshot(vit.model), [module.training for module in vpt.modules()]
    with pytest.raises(error, match=message):
        vpt.init_prompts(loader, **options)
    assert_same(vpt.state_dict(), before)
    assert_unchanged(model, snapshot(vit.model))
    assert modes == [module.training for module in vpt.modules()]
    assert torch.is_grad_enabled() and vpt.get_model_status().enabled


def test_an_error_of_the_dataloader_leaves_no_hook(vit: Tiny) -> None:
    def broken() -> Iterator[Tensor]:
        yield vit.pixel_values
        raise OSError("the disk is gone")

    vpt = vit.prompted()
    model = snapshot(vit.model)
    with pytest.raises(OSError, match="the disk is gone"):
        vpt.init_prompts(broken())
    assert_unchanged(model, snapshot(vit.model))


def test_a_layer_that_does_not_run_is_an_error(vit: Tiny) -> None:
    vpt = vit.prompted()
    layers = vit.model.vit.layers
    skipped, layers[2] = layers[2], nn.Identity()
    layers[2].forward = lambda hidden, *_, **__: hidden
    with pytest.raises(VPTError, match="got 0 in layer 2"):
        vpt.init_prompts([vit.pixel_values])
    layers[2] = skipped


def test_kmeans_without_scikit_learn_names_the_package(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    vpt = vit.prompted()
    loader: Iterator[Tensor] = iter([vit.pixel_values])
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        vpt.init_prompts(loader, "kmeans")
    assert next(loader, None) is not None, "the images were read before"
    vpt.init_prompts([vit.pixel_values], "sample")


def test_an_unloaded_model_is_refused(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.unload()
    with pytest.raises(AdapterError, match="was unloaded"):
        vpt.init_prompts([vit.pixel_values])
