"""Prompts at other locations than before the tokens: added to them, as patches, around the image, and as channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.invariants import assert_unchanged, on_backbones, snapshot, train_a_little
from helpers.models import (
    SEGMENTERS,
    VIT,
    Tiny,
    assert_same,
    gradients,
    logits,
    loss_and_gradients,
    tiny_swin,
    tiny_vit,
)
from torch._dynamo.utils import counters
from transformers import ViTConfig, ViTForMaskedImageModeling

from vpt_peft import (
    AdapterError,
    ConfigError,
    PromptConfig,
    RouteError,
    UnsupportedModelError,
    VPTModel,
    get_adapter_state_dict,
    get_vpt_model,
    set_adapter_state_dict,
)

BORDER = 5
LOCATIONS: dict[str, dict[str, Any]] = {
    "add": {"location": "add"},
    "add_shallow": {"location": "add", "deep": False},
    "add_some": {"location": "add", "layers_to_transform": [1, 3]},
    "add_shared": {"location": "add-shared"},
    "pixel": {"location": "pixel", "deep": False},
    "pixel_some": {"location": "pixel", "layers_to_transform": [0, 1], "carry": False},
    "border": {"location": "border", "deep": False},
    "channel": {"location": "channel", "deep": False},
}
each_location = on_backbones(LOCATIONS, ("add", "add_shared", "pixel", "border", "channel"))
once_each = on_backbones({name: LOCATIONS[name] for name in ("add", "add_shared", "pixel", "border", "channel")}, ())


def prompted(tiny: Tiny, **config: Any) -> tuple[VPTModel, Tiny]:
    """The model with prompts of visible size, and images that fit them."""
    vpt = tiny.prompted(BORDER, **config)
    with torch.no_grad():
        for parameter in vpt.adapters["default"].prompts.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return vpt, fitting(tiny, **config)


def fitting(tiny: Tiny, **config: Any) -> Tiny:
    """The same images without what a border takes the place of."""
    border = BORDER if config.get("location") == "border" else 0
    size = tiny.pixel_values.shape[-1] - border
    return replace(tiny, pixel_values=tiny.pixel_values[..., border:size, border:size])


# -- what prompts do at each location -------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["add", "add-shared"])
def test_vectors_are_added_to_the_tokens_that_enter_a_layer(tiny: Tiny, location: str) -> None:
    vpt, _ = prompted(tiny, location=location, layers_to_transform=[1, 2])
    prompts = get_adapter_state_dict(vpt)
    ours = logits(vpt, tiny.pixel_values)
    assert vpt.routes == {1: "add", 2: "add"}
    for layer in (1, 2):
        vector = prompts[f"prompts.{layer}"]
        module = vpt.backbone.layers[layer].module
        module.register_forward_pre_hook(lambda _, args, vector=vector: (args[0] + vector, *args[1:]))
    torch.testing.assert_close(logits(vpt.unload(), tiny.pixel_values), ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("deep", [True, False])
def test_patches_of_pixels_act_as_the_tokens_that_the_patch_embedding_makes_of_them(tiny: Tiny, deep: bool) -> None:
    config = {"layers_to_transform": [0, 1]} if deep else {"deep": False}
    vpt, _ = prompted(tiny, location="pixel", **config)
    ours, patches = logits(vpt, tiny.pixel_values), get_adapter_state_dict(vpt)
    embeddings = vpt.unload().base_model.embeddings
    after = embeddings.norm if tiny.name == "swin" else torch.nn.Identity()
    tokens = {
        name: after(embeddings.patch_embeddings.projection(value).flatten(1)) if name.startswith("prompts") else value
        for name, value in patches.items()
    }
    vpt = tiny.prompted(BORDER, **config)
    set_adapter_state_dict(vpt, tokens)
    torch.testing.assert_close(logits(vpt, tiny.pixel_values), ours, atol=1e-6, rtol=0)


def test_a_border_in_pixel_space_makes_an_image_larger(tiny: Tiny) -> None:
    vpt, fit = prompted(tiny, location="border", deep=False)
    ours, prompts = logits(vpt, fit.pixel_values), get_adapter_state_dict(vpt)
    assert vpt.routes == {}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    whole = torch.empty_like(tiny.pixel_values[0])
    whole[:, :BORDER], whole[:, -BORDER:] = prompts["prompts.top"], prompts["prompts.bottom"]
    whole[:, BORDER:-BORDER, :BORDER] = prompts["prompts.left"]
    whole[:, BORDER:-BORDER, -BORDER:] = prompts["prompts.right"]
    whole = ((whole - mean.view(3, 1, 1)) / std.view(3, 1, 1)).repeat(4, 1, 1, 1)
    whole[..., BORDER:-BORDER, BORDER:-BORDER] = fit.pixel_values
    torch.testing.assert_close(logits(vpt.unload(), whole), ours, atol=1e-5, rtol=0)


def test_channels_enter_through_new_weights_of_a_copied_patch_embedding(tiny: Tiny) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(location="channel", deep=False)
    state = get_adapter_state_dict(vpt)
    projection = tiny.model.base_model.embeddings.patch_embeddings.projection
    path = next(path for path, module in tiny.model.named_modules() if module is projection)
    weight = state[f"modules_to_save.{path}.weight"]
    assert weight.shape == (projection.out_channels, 8, *projection.kernel_size)
    assert torch.equal(weight[:, :3], projection.weight) and weight[:, 3:].abs().max() > 0
    assert torch.equal(state[f"modules_to_save.{path}.bias"], projection.bias)
    assert (logits(vpt, tiny.pixel_values) - bare).abs().max() > 1e-3
    state["prompts.channels"].zero_()
    torch.testing.assert_close(logits(vpt, tiny.pixel_values), bare, atol=1e-5, rtol=0)


@pytest.mark.parametrize("location", ["add", "add-shared", "pixel", "border", "channel"])
def test_no_tokens_are_no_prompts_at_any_location(tiny: Tiny, location: str) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(0, location=location, deep=False)
    assert {name.partition(".")[0] for name in get_adapter_state_dict(vpt)} == {"head"} and vpt.routes == {}
    torch.testing.assert_close(logits(vpt, tiny.pixel_values), bare, atol=0, rtol=0)


def test_shared_vectors_are_added_at_each_layer(vit: Tiny) -> None:
    vpt, _ = prompted(vit, location="add", shared=True)
    assert [name for name in get_adapter_state_dict(vpt) if name.startswith("prompts")] == ["prompts.0"]
    ours, state = logits(vpt, vit.pixel_values), get_adapter_state_dict(vpt)
    vpt.unload()
    vpt = vit.prompted(location="add")
    set_adapter_state_dict(vpt, state | {f"prompts.{layer}": state["prompts.0"] for layer in range(4)})
    assert torch.equal(logits(vpt, vit.pixel_values), ours)


def test_initial_values_are_those_that_the_config_describes(vit: Tiny) -> None:
    for location in ("add", "pixel", "channel", "border"):
        vpt = vit.prompted(location=location, deep=False)
        values = torch.cat([own.detach().flatten() for own in vpt.adapters["default"].prompts.parameters()])
        low, high = (0.0, 1.0) if location == "border" else (-0.18, 0.18)  # sqrt(6 / (3 · 8² + 8)) is the widest
        assert low <= values.min() < low + 0.1 and high - 0.1 < values.max() <= high
        vpt.unload()
        vpt = vit.prompted(location=location, deep=False, init="normal")
        values = torch.cat([own.detach().flatten() for own in vpt.adapters["default"].prompts.parameters()])
        assert 0.015 < values.std() < 0.025
        vpt.unload()


# -- what holds at each location ------------------------------------------------------------------------------------


@each_location
def test_training_changes_the_adapter_and_nothing_of_the_backbone(tiny: Tiny, config: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    vpt, fit = prompted(tiny, **config)
    vpt.train()
    own = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    train_a_little(vpt, fit)
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    for name, tensor in get_adapter_state_dict(vpt).items():
        assert not torch.equal(own[name], tensor), name


@each_location
def test_unload_returns_the_model_as_it_was(tiny: Tiny, config: dict[str, Any]) -> None:
    tiny.model.train()
    before = snapshot(tiny.model)
    vpt, fit = prompted(tiny, **config)
    train_a_little(vpt, fit)
    assert_unchanged(before, snapshot(vpt.unload()))


@each_location
def test_prompts_act_and_the_bare_backbone_stays_bare(tiny: Tiny, config: dict[str, Any]) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    vpt, fit = prompted(tiny, **config)
    ours = logits(vpt, fit.pixel_values)
    assert (ours - bare).abs().max() > 1e-3
    assert torch.equal(logits(vpt.base_model, tiny.pixel_values), bare)
    with vpt.disable_adapter():
        assert torch.equal(logits(vpt, tiny.pixel_values), bare)
    assert torch.equal(logits(vpt, fit.pixel_values), ours)


@each_location
def test_an_image_does_not_depend_on_the_others_in_its_batch(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config)
    alone = torch.cat([logits(vpt, image[None]) for image in fit.pixel_values])
    torch.testing.assert_close(logits(vpt, fit.pixel_values), alone, atol=1e-5, rtol=0)


@each_location
def test_users_see_shapes_of_the_backbone(tiny: Tiny, config: dict[str, Any]) -> None:
    tiny.model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    vpt, fit = prompted(tiny, **config)
    with torch.no_grad():
        bare, ours = tiny.model(tiny.pixel_values, **wanted), vpt(fit.pixel_values, **wanted)
    assert ours.keys() == bare.keys()
    for name in ("hidden_states", "attentions"):
        shapes = [[tuple(tensor.shape)[:3] for tensor in output[name]] for output in (bare, ours)]
        assert shapes[0] == shapes[1]


@each_location
def test_a_reloaded_adapter_agrees_bit_for_bit(
    tiny: Tiny, new: Callable[[], Tiny], config: dict[str, Any], tmp_path: Path
) -> None:
    vpt, fit = prompted(tiny, **config)
    vpt.save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(new().model, tmp_path)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt))
    assert torch.equal(logits(loaded, fit.pixel_values), logits(vpt, fit.pixel_values))
    assert loaded.routes == vpt.routes


@each_location
def test_gradient_checkpointing_gives_identical_gradients(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config, dropout=0.5)
    vpt.train()
    loss, expected = loss_and_gradients(vpt, fit)
    vpt.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed = loss_and_gradients(vpt, fit)
    assert torch.equal(loss, checkpointed_loss)
    assert_same(checkpointed, expected)


@each_location
def test_dropout_differs_between_images_and_only_in_training(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config, dropout=0.5)
    same = fit.pixel_values[:1].expand(4, -1, -1, -1)
    dropped = logits(vpt.train(), same)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-5
    whole = logits(vpt.eval(), same)
    torch.testing.assert_close(whole[0], whole[1], atol=1e-6, rtol=0)


@each_location
def test_lower_precision_gives_nearly_the_same(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config)
    expected = logits(vpt, fit.pixel_values)
    tolerance = 0.05 * expected.abs().max().item() + 0.05
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(logits(vpt, fit.pixel_values).float(), expected, atol=tolerance, rtol=0)
    state = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    vpt.unload().to(torch.bfloat16)
    vpt = tiny.prompted(BORDER, **config)
    set_adapter_state_dict(vpt, state)
    assert {parameter.dtype for parameter in vpt.adapters.parameters()} == {torch.float32}
    half = logits(vpt, fit.pixel_values.bfloat16())
    torch.testing.assert_close(half.float(), expected, atol=tolerance, rtol=0)


@on_backbones({name: LOCATIONS[name] for name in ("add", "pixel", "border", "channel")}, ("add",))
@pytest.mark.heavy
def test_compiled_graphs_have_no_breaks(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config)
    vpt.train()
    compiled = torch.compile(vpt, fullgraph=True, dynamic=False, backend="aot_eager")
    counters.clear()
    for _ in range(2):
        loss, expected = loss_and_gradients(vpt, fit)
        compiled_loss, ours = loss_and_gradients(vpt, fit, compiled)
        torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=0)
        assert_same(ours, expected, 1e-5)
        train_a_little(vpt, fit)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@once_each
def test_a_copied_model_answers_as_the_original(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config)
    copied = copy.deepcopy(vpt)
    assert torch.equal(logits(copied, fit.pixel_values), logits(vpt, fit.pixel_values))


@once_each
def test_serving_notices_new_prompts(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, fit = prompted(tiny, **config)
    with vpt.serving():
        before = logits(vpt, fit.pixel_values)
        assert torch.equal(logits(vpt, fit.pixel_values), before)
        with torch.no_grad():
            parameter = next(vpt.adapters["default"].prompts.parameters())
            parameter.add_(torch.randn_like(parameter))
        after = logits(vpt, fit.pixel_values)
    assert (after - before).abs().max() > 1e-3
    assert torch.equal(logits(vpt, fit.pixel_values), after)


# -- mixed batches --------------------------------------------------------------------------------------------------

TASKS: dict[str, dict[str, Any]] = {
    "add": {"location": "add"},
    "same": {"location": "add-shared", "deep": False},
    "pixel": {"location": "pixel", "deep": False},
    "tokens": {},
}
MIXES = [
    ["add", "same", "pixel", "tokens"],
    ["add", "__base__", "add", "same"],
    ["pixel", "pixel", "tokens", "add"],
    ["same", "same", "same", "same"],
]


def with_all_tasks(tiny: Tiny, **config: Any) -> VPTModel:
    vpt = get_vpt_model(tiny.model, PromptConfig(**TASKS["add"], **config), "add")
    for name in ("same", "pixel", "tokens"):
        vpt.add_adapter(name, PromptConfig(num_tokens=3, **TASKS[name], **config))
    with torch.no_grad():
        for name in TASKS:
            for parameter in vpt.adapters[name].prompts.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return vpt


@pytest.mark.parametrize("names", MIXES, ids="-".join)
def test_a_mixed_batch_agrees_with_one_pass_for_each_task(tiny: Tiny, names: list[str]) -> None:
    vpt = with_all_tasks(tiny)
    together = logits(vpt, tiny.pixel_values, adapter_names=names)
    for row, name in enumerate(names):
        image = tiny.pixel_values[row : row + 1]
        torch.testing.assert_close(together[row], logits(vpt, image, adapter_names=[name])[0], atol=1e-5, rtol=0)
    assert (together - logits(tiny.model, tiny.pixel_values)).abs().amax(1).gt(1e-3).tolist() == [
        name != "__base__" for name in names
    ]


@pytest.mark.parametrize("name", ["add", "same", "pixel"])
def test_dropout_in_a_mixed_batch_differs_between_the_images_of_an_adapter(vit: Tiny, name: str) -> None:
    vpt = with_all_tasks(vit, dropout=0.5)
    same, names = vit.pixel_values[:1].expand(4, -1, -1, -1), [name, "__base__", name, "tokens"]
    dropped = logits(vpt.train(), same, adapter_names=names)
    assert (dropped[0] - dropped[2]).abs().max() > 1e-4
    whole = logits(vpt.eval(), same, adapter_names=names)
    torch.testing.assert_close(whole[0], whole[2], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:Only the active adapter of a mixed batch gets gradients")
def test_gradients_of_a_mixed_batch_reach_only_the_images_of_the_adapter(vit: Tiny) -> None:
    vpt, _ = prompted(vit, location="add")
    vpt.add_adapter("other", PromptConfig(location="add-shared"))
    vpt.train()
    output = vpt(vit.pixel_values, adapter_names=["default", "other", "__base__", "default"]).logits
    output[1:3].sum().backward(retain_graph=True)
    assert all(not gradient.any() for gradient in gradients(vpt).values())
    output[[0, 3]].sum().backward()
    mixed = {name: gradient.clone() for name, gradient in gradients(vpt).items()}
    vpt.zero_grad()
    vpt(vit.pixel_values[[0, 3]]).logits.sum().backward()
    assert_same(mixed, gradients(vpt), 1e-5)


@pytest.mark.parametrize("location", ["border", "channel"])
def test_prompts_in_the_image_need_a_pass_of_their_own(vit: Tiny, location: str) -> None:
    reason = r'The adapters default have prompts in the image itself \(location="border" or "channel"\)'
    vpt, fit = prompted(vit, location=location, deep=False)
    vpt.add_adapter("tokens", PromptConfig(num_tokens=3))
    for other in ("tokens", "__base__"):
        with pytest.raises(AdapterError, match=f"{reason}, so they cannot be mixed with {other}"):
            vpt(fit.pixel_values, adapter_names=["default", other, "default", "default"])
    alone = logits(vpt, fit.pixel_values, adapter_names=["default"] * 4)
    assert torch.equal(alone, logits(vpt, fit.pixel_values))


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("add", 'location="add" has prompts for images of {0} x {0} pixels, got {1} x {1}'),
        ("channel", 'location="channel" has prompts for images of {0} x {0} pixels, got {1} x {1}'),
        ("border", 'location="border" has prompts for images of {2} x {2} pixels, got {1} x {1}'),
    ],
)
def test_images_of_another_size_are_a_clear_error(tiny: Tiny, location: str, message: str) -> None:
    vpt, fit = prompted(tiny, location=location, deep=False)
    size = tiny.pixel_values.shape[-1]
    message = message.format(size, size + 16, size - 2 * BORDER)
    larger = torch.randn(2, 3, size + 16, size + 16)
    options: dict[str, Any] = {} if tiny.name == "beit" else {"interpolate_pos_encoding": True}
    with pytest.raises(AdapterError, match=message):
        vpt(larger, **options)
    with pytest.raises(AdapterError, match=f"got {size // 2} x {2 * size}"):
        vpt(torch.randn(2, 3, size // 2, 2 * size), **options)  # as many tokens, but others
    vpt(fit.pixel_values)


@pytest.mark.parametrize("location", ["add-shared", "pixel"])
def test_images_of_another_size_are_welcome_where_prompts_do_not_depend_on_it(vit: Tiny, location: str) -> None:
    vpt, _ = prompted(vit, location=location, deep=False)
    larger = torch.randn(2, 3, 48, 48)
    ours = logits(vpt, larger, interpolate_pos_encoding=True)
    with vpt.disable_adapter():
        assert (logits(vpt, larger, interpolate_pos_encoding=True) - ours).abs().max() > 1e-3


def test_a_layer_that_gets_another_number_of_tokens_is_an_error(vit: Tiny) -> None:
    vpt, _ = prompted(vit, location="add")
    vit.model.vit.layers[1].register_forward_pre_hook(lambda _, args: (args[0][:, :9], *args[1:]))
    with pytest.raises(RouteError, match=r"Expected 17 tokens as the first argument of layer 1.*got \(4, 9, 24\)"):
        vpt(vit.pixel_values)


@once_each
def test_prompts_that_did_not_act_are_an_error(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt, _ = prompted(tiny, **config)
    module, message = {
        "border": (tiny.model, "Prompts must reach the image, but did not"),
        "channel": (tiny.model.vit.embeddings.patch_embeddings.projection, "Prompts must reach the image, but did not"),
    }.get(config["location"], (vpt.backbone.layers[-1].module, "Prompts must reach 4 layers, but reached 3"))
    override = module.forward
    module.forward = override.forward  # the module runs, but without its prompts
    with pytest.raises(RouteError, match=message):
        vpt(tiny.pixel_values)
    module.forward = override


def test_a_replaced_patch_embedding_is_noticed(vit: Tiny) -> None:
    vpt, _ = prompted(vit, location="channel", deep=False)
    vit.model.vit.embeddings.patch_embeddings.projection = torch.nn.Conv2d(3, 24, 8, 8)
    with pytest.raises(RouteError, match=r"The module 'projection' of .* was replaced"):
        vpt(vit.pixel_values)


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (tiny_swin, {"location": "pixel"}, r"width of the patch embedding, 8, got layers \[2, 3\] of widths"),
        (tiny_vit, {"location": "border", "num_tokens": 16}, "must leave a part of the 32 x 32 pixels.*num_tokens=16"),
        (
            lambda: tiny_vit(num_channels=1), {"location": "border"}, r"needs images of 3 channels \(RGB\), got 1",
        ),
        (
            tiny_vit, {"location": "channel", "modules_to_save": ["patch_embeddings"]},
            "modules_to_save with 'vit.embeddings.patch_embeddings', which contains it",
        ),
        (
            SEGMENTERS["upernet"], {"location": "border"}, "a model without outputs for places in the image, got Uper",
        ),
        (SEGMENTERS["beit_segmenter"], {"location": "border"}, "needs a model without outputs for places in the image"),
        (tiny_swin, {"location": "add", "shared": True, "deep": True}, "shared=True needs layers of one width"),
    ],
)  # fmt: skip
def test_a_location_that_does_not_fit_the_backbone_changes_nothing(
    build: Callable[[], Tiny], config: dict[str, Any], message: str
) -> None:
    tiny = build()
    before = snapshot(tiny.model)
    deep = config.get("location") in ("pixel", "add")
    with pytest.raises(ConfigError, match=message):
        get_vpt_model(tiny.model, PromptConfig(**{"deep": deep, "num_tokens": 3, **config}))
    assert_unchanged(before, snapshot(tiny.model))


@pytest.mark.parametrize("location", ["pixel", "channel"])
def test_a_patch_embedding_that_is_no_convolution_is_refused(vit: Tiny, location: str) -> None:
    vit.model.vit.embeddings.patch_embeddings.projection = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 8, 8))
    with pytest.raises(UnsupportedModelError, match=r"Expected the convolution that embeds patches.*got Sequential"):
        vit.prompted(location=location, deep=False)


def test_a_patch_embedding_of_ones_own_class_is_not_copied_as_another(vit: Tiny) -> None:
    class Standardised(torch.nn.Conv2d):
        pass

    vit.model.vit.embeddings.patch_embeddings.projection = Standardised(3, 24, 8, 8)
    with pytest.raises(ConfigError, match=r"adds channels to a plain torch\.nn\.Conv2d, got Standardised at 'vit\."):
        vit.prompted(location="channel", deep=False)


def test_tensors_of_another_size_are_refused_when_loading(vit: Tiny, tmp_path: Path) -> None:
    vpt, _ = prompted(vit, location="add")
    vpt.save_pretrained(tmp_path)
    larger = tiny_vit(image_size=48).model
    with pytest.raises(ValueError, match=r"prompts\.0: expected \(37, 24\), got \(17, 24\)"):
        VPTModel.from_pretrained(larger, tmp_path, check_backbone=False)


# -- together with other options and models -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", ".patch_embeddings", ".patch_embeddings.projection"])
def test_patches_go_through_the_adapters_own_patch_embedding(vit: Tiny, part: str) -> None:
    path = f"vit.embeddings{part}"
    vpt, _ = prompted(vit, location="pixel", deep=False, modules_to_save=[path])
    with torch.no_grad():
        for parameter in vpt.adapters["default"].modules_to_save.parameters():
            parameter *= 1.5
    ours, state = logits(vpt, vit.pixel_values), get_adapter_state_dict(vpt)
    model = vpt.unload()
    for parameter in model.get_submodule(path).parameters():
        parameter.data *= 1.5
    vpt = vit.prompted(location="pixel", deep=False)
    set_adapter_state_dict(vpt, {name: state[name] for name in get_adapter_state_dict(vpt)})
    torch.testing.assert_close(logits(vpt, vit.pixel_values), ours, atol=1e-5, rtol=0)


@once_each
def test_biases_train_along(tiny: Tiny, config: dict[str, Any], tmp_path: Path) -> None:
    vpt, fit = prompted(tiny, **config, bias="all")
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    train_a_little(vpt.train(), fit)
    after = get_adapter_state_dict(vpt)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name for name in after if name not in moved and "k_proj" not in name} == set()
    vpt.save_pretrained(tmp_path)
    loaded = VPTModel.from_pretrained(tiny_vit().model, tmp_path)
    assert torch.equal(logits(loaded, fit.pixel_values), logits(vpt.eval(), fit.pixel_values))


@pytest.mark.parametrize("location", ["add", "add-shared", "pixel", "border", "channel"])
def test_pooling_reads_image_tokens(vit: Tiny, location: str) -> None:
    vpt, fit = prompted(vit, location=location, deep=False, pooling="image")
    with torch.no_grad():
        output = vpt(fit.pixel_values, output_hidden_states=True)
        pooled = vit.model.vit.layernorm(output.hidden_states[-1])[:, 1:].mean(1)
        expected = vpt.adapters["default"].head.find("classifier")(pooled)
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", SEGMENTERS)
@pytest.mark.parametrize("location", ["add", "add-shared", "pixel", "channel"])
def test_segmentation_models_train_with_prompts_at_each_location_but_the_border(kind: str, location: str) -> None:
    tiny = SEGMENTERS[kind]()
    bare = logits(tiny.model, tiny.pixel_values)
    vpt, _ = prompted(tiny, location=location, deep=False)
    ours = logits(vpt, tiny.pixel_values)
    assert ours.shape == bare.shape and (ours - bare).abs().max() > 1e-4
    vpt.train()(tiny.pixel_values, labels=tiny.labels).loss.backward()
    assert all(gradients(vpt)[name].any() for name in get_adapter_state_dict(vpt) if name.startswith("prompts."))


@pytest.mark.parametrize("location", ["add", "pixel", "border", "channel"])
def test_masked_patches_are_reconstructed_with_prompts(location: str) -> None:
    model = ViTForMaskedImageModeling(ViTConfig(**VIT, encoder_stride=8)).eval()
    vpt = get_vpt_model(model, PromptConfig(num_tokens=2, location=location, deep=False))
    side = 28 if location == "border" else 32
    images, masked = torch.randn(2, 3, side, side), torch.arange(16).expand(2, -1) % 2 == 0
    output = vpt(images, bool_masked_pos=masked)
    assert output.reconstruction.shape == (2, 3, 32, 32) and output.loss.isfinite()
    output.loss.backward()
    assert all(parameter.grad.any() for parameter in vpt.adapters["default"].prompts.parameters())
