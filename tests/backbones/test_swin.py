"""Swin: prompts inside windows, on images of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.models import SWIN, Tiny, assert_same, gradients, logits, tiny_swin
from torch import nn
from transformers import SwinBackbone, SwinConfig, SwinForMaskedImageModeling, SwinModel

from vpt_peft import ConfigError, PromptConfig, UnsupportedModelError, get_adapter_state_dict, get_vpt_model

CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"deep": False},
    "carried": {"layers_to_transform": [0, 1]},
    "pooled": {"deep": False, "pooling": "global"},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "padding": ({}, (40, 56)),  # 10 x 14 patches: no multiple of the window
    "odd_merging": ({}, (36, 52)),  # 9 x 13 patches
    "window_7": ({"window_size": 7, "image_size": 56}, (56, 56)),
    "window_12": ({"window_size": 12, "image_size": 96}, (96, 100)),
    "not_of_patches": ({}, (62, 45)),
}


@each_config
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("route", ["auto", "tokens"])
def test_images_of_any_size(config: dict[str, Any], shape: tuple[dict[str, Any], tuple[int, int]], route: str) -> None:
    tiny = tiny_swin(**shape[0])
    images = torch.randn(3, 3, *shape[1])
    vpt = tiny.prompted(**config, route=route)
    tiny.model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        ours, bare = vpt(images, **wanted), tiny.model(images, **wanted)
        alone = torch.cat([vpt(image[None]).logits for image in images])
    torch.testing.assert_close(ours.logits, alone, atol=1e-6, rtol=0)
    for name in ("hidden_states", "reshaped_hidden_states"):
        assert [state.shape for state in ours[name]] == [state.shape for state in bare[name]]
    assert [weights.shape[:3] for weights in ours.attentions] == [weights.shape[:3] for weights in bare.attentions]


@each_config
@pytest.mark.parametrize("name", ["padding", "odd_merging", "window_7"])
def test_both_routes_agree_on_any_size(config: dict[str, Any], name: str) -> None:
    results = []
    for route in ("auto", "tokens"):
        tiny = tiny_swin(**SHAPES[name][0])
        torch.manual_seed(3)
        images = torch.randn(2, 3, *SHAPES[name][1])
        vpt = tiny.prompted(**config, route=route).train()
        output = vpt(images, labels=tiny.labels[:2])
        output.loss.backward()
        results.append((output.logits, gradients(vpt)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    assert_same(results[0][1], results[1][1], 1e-5)


@each_config
def test_an_input_never_changes_the_next_ones_result(swin: Tiny, config: dict[str, Any]) -> None:
    """The bare backbone forgets its cyclic shift for good once a stage's resolution equals the window."""
    vpt = swin.prompted(**config)
    sizes = (64, 32, 96, 40, 64)
    images = {size: torch.randn(2, 3, size, size) for size in sizes}
    fresh = {}
    for size in set(sizes):
        other = tiny_swin()
        fresh[size] = logits(other.prompted(**config), images[size])
    for size in sizes:
        assert torch.equal(logits(vpt, images[size]), fresh[size]), size


@each_config
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_image_smaller_than_the_window_fails_as_in_the_backbone_and_harms_nothing(
    swin: Tiny, config: dict[str, Any], attention: str
) -> None:
    too_small = torch.randn(1, 3, 16, 16)  # 2 x 2 patches in the last stage
    bare = tiny_swin().model
    vpt = swin.prompted(**config)
    expected = logits(vpt, swin.pixel_values)
    for model in (bare, swin.model):
        model.set_attn_implementation(attention)
    with pytest.raises(RuntimeError) as theirs:
        logits(bare, too_small)
    with pytest.raises(RuntimeError) as ours:
        logits(vpt, too_small)
    assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))
    swin.model.set_attn_implementation("sdpa")
    assert torch.equal(logits(vpt, swin.pixel_values), expected)


class CountingHook(ModelHook):  # type: ignore[misc]
    """A hook of accelerate that counts the calls of its module."""

    def __init__(self) -> None:
        self.before = self.after = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.before += 1
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.after += 1
        return output


@each_config
def test_hooks_of_accelerate_on_layers_run_once_a_forward(swin: Tiny, config: dict[str, Any]) -> None:
    """Layers without hooks run on a copy of themselves, by the forward of their class, which would skip the hook."""
    expected = logits(tiny_swin().prompted(**config), swin.pixel_values)
    hooks = [CountingHook() for _ in range(4)]
    layers = [block for stage in swin.model.swin.encoder.layers for block in stage.blocks]
    for layer, hook in zip(layers, hooks, strict=True):
        add_hook_to_module(layer, hook)
    forwards = [layer.forward for layer in layers]
    vpt = swin.prompted(**config)
    for number in (1, 2):
        assert torch.equal(logits(vpt, swin.pixel_values), expected)
        assert [(hook.before, hook.after) for hook in hooks] == [(number, number)] * 4
    vpt.unload()
    for layer, forward in zip(layers, forwards, strict=True):
        assert layer.forward is forward
    logits(swin.model, swin.pixel_values)
    assert [(hook.before, hook.after) for hook in hooks] == [(3, 3)] * 4


def test_prompts_are_as_wide_as_their_stage(swin: Tiny) -> None:
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in swin.prompted().adapters["default"].state_dict(keep_vars=True).items()
    }
    assert shapes == {
        "prompts.0": (5, 8), "prompts.1": (5, 8), "prompts.2": (5, 16), "prompts.3": (5, 16),
        "head.classifier.weight": (7, 16), "head.classifier.bias": (7,),
    }  # fmt: skip


def test_a_projection_for_each_width(swin: Tiny) -> None:
    names = swin.prompted(projection_dim=6, shared=True).adapters["default"].state_dict(keep_vars=True).keys()
    assert names - {"head.classifier.weight", "head.classifier.bias"} == {
        "prompts.0", "projection.8.weight", "projection.8.bias", "projection.16.weight", "projection.16.bias",
    }  # fmt: skip


def test_prompts_are_shared_only_where_widths_allow(swin: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"shared=True needs layers of one width, got layers of widths \[8, 16\]"):
        swin.prompted(shared=True)
    vpt = swin.prompted(shared=True, layers_to_transform=[2, 3])
    assert "prompts.2" in vpt.adapters["default"].state_dict(keep_vars=True)


@pytest.mark.parametrize("build", [SwinModel, SwinBackbone, SwinForMaskedImageModeling])
@each_config
def test_every_swin_class(build: Any, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = build(SwinConfig(**SWIN, encoder_stride=8, out_features=["stage1", "stage2"])).eval()
    if "pooling" in config:
        with pytest.raises(ConfigError, match="needs an image classifier"):
            get_vpt_model(model, PromptConfig(**config))
        return
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        bare = model(images)
        ours = get_vpt_model(model, PromptConfig(num_tokens=5, **config))(images)
    assert ours.keys() == bare.keys()
    for name, theirs in bare.items():
        for ours_one, theirs_one in zip(_tuple(ours[name]), _tuple(theirs), strict=True):
            assert ours_one.shape == theirs_one.shape
    last = _tuple(next(iter(bare.values())))[-1], _tuple(next(iter(ours.values())))[-1]
    assert (last[0] - last[1]).abs().max() > 1e-3


@pytest.mark.parametrize("last", ["stage1", "stage2"])
def test_a_backbone_has_prompts_and_biases_as_far_as_it_is_read(last: str) -> None:
    model = SwinBackbone(SwinConfig(**SWIN, out_features=[last]))
    vpt = get_vpt_model(model, PromptConfig(num_tokens=5, bias="all"))
    sum(feature.sum() for feature in vpt(torch.randn(2, 3, 64, 64)).feature_maps).backward()
    assert not [name for name, one in vpt.named_parameters() if one.requires_grad and one.grad is None]
    prompts = [name for name in get_adapter_state_dict(vpt) if name.startswith("prompts.")]
    assert len(prompts) == {"stage1": 2, "stage2": 4}[last]


def test_a_backbone_that_gives_the_embeddings_alone_has_nothing_to_prompt() -> None:
    model = SwinBackbone(SwinConfig(**SWIN, out_features=["stem"]))
    with pytest.raises(UnsupportedModelError, match="must include at least one layer"):
        get_vpt_model(model, PromptConfig(num_tokens=5))


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
