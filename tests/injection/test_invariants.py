"""The promises that hold for every adapter on every backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.invariants import assert_unchanged, each_config, snapshot, train_a_little
from helpers.models import Tiny, assert_same, gradients, logits

from vpt_peft import PromptConfig, RouteError, VPTError, get_vpt_model
from vpt_peft.injection import has_overrides


@each_config
def test_training_changes_the_adapter_and_nothing_of_the_backbone(tiny: Tiny, config: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(**config).train()
    own = {name: tensor.detach().clone() for name, tensor in vpt.adapters["default"].state_dict(keep_vars=True).items()}
    train_a_little(vpt, tiny)
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    for name, tensor in vpt.adapters["default"].state_dict(keep_vars=True).items():
        # a key's bias moves all of a query's scores alike, so it has no gradient but rounding
        assert not torch.equal(own[name], tensor) or "k_proj" in name or "mask_token" in name, name
    torch.testing.assert_close(logits(tiny.model, tiny.pixel_values), bare, atol=0, rtol=0)


@each_config
def test_unload_returns_the_model_as_it_was(tiny: Tiny, config: dict[str, Any]) -> None:
    tiny.model.train()
    next(tiny.model.parameters()).requires_grad_(False)
    before = snapshot(tiny.model)
    vpt = tiny.prompted(**config)
    train_a_little(vpt, tiny)
    model = vpt.unload()
    assert model is tiny.model and not has_overrides(model)
    assert_unchanged(before, snapshot(model))
    with pytest.raises(VPTError, match="was unloaded"):
        vpt(tiny.pixel_values)


@each_config
def test_an_image_does_not_depend_on_the_others_in_its_batch(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt = tiny.prompted(**config)
    together = logits(vpt, tiny.pixel_values)
    alone = torch.cat([logits(vpt, image[None]) for image in tiny.pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


@each_config
def test_both_routes_agree(tiny: Tiny, new: Callable[[], Tiny], config: dict[str, Any]) -> None:
    if config.get("num_tokens") == 0 or config.get("kind") == "prefix":
        pytest.skip("no prompts that are tokens")
    results = []
    for route in ("auto", "tokens"):
        vpt = new().prompted(**config, route=route).train()
        output = vpt(tiny.pixel_values, labels=tiny.labels)
        output.loss.backward()
        results.append((output.logits, gradients(vpt), set(vpt.routes.values())))
    (auto, auto_gradients, _), (tokens, tokens_gradients, routes) = results
    assert routes == {"tokens"}
    torch.testing.assert_close(auto, tokens, atol=1e-5, rtol=0)
    assert_same(auto_gradients, tokens_gradients, 1e-5)


@each_config
def test_prompts_do_not_leak_into_what_users_see(tiny: Tiny, config: dict[str, Any]) -> None:
    tiny.model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        bare = tiny.model(tiny.pixel_values, **wanted)
        ours = tiny.prompted(**config)(tiny.pixel_values, **wanted)
    assert ours.keys() == bare.keys()
    shapes = [[tuple(state.shape) for state in output.hidden_states] for output in (bare, ours)]
    assert shapes[0] == shapes[1]
    queries = [[tuple(weights.shape[:3]) for weights in output.attentions] for output in (bare, ours)]
    assert queries[0] == queries[1]
    for weights in ours.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@each_config
def test_prompts_take_effect(tiny: Tiny, config: dict[str, Any]) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    ours = logits(tiny.prompted(**config), tiny.pixel_values)
    changes = config.get("num_tokens") != 0
    assert ((ours - bare).abs().max() > 1e-3) == changes


def test_the_backbone_stays_in_eval_mode_while_training(tiny: Tiny) -> None:
    vpt = tiny.prompted(dropout=0.5)
    assert vpt.train() is vpt and vpt.eval() is vpt
    vpt.train()
    assert vpt.training and not any(module.training for module in tiny.model.modules())
    assert vpt.adapters["default"].prompts.training
    assert not torch.equal(logits(vpt, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    vpt.eval()
    assert torch.equal(logits(vpt, tiny.pixel_values), logits(vpt, tiny.pixel_values))


def test_the_mode_is_left_as_given(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    assert not vpt.training
    vpt.unload().train()
    assert tiny.prompted().training


def test_dropout_differs_between_images(tiny: Tiny) -> None:
    vpt = tiny.prompted(dropout=0.5).train()
    same = logits(vpt, tiny.pixel_values[:1].expand(4, -1, -1, -1))
    assert (same[0] - same[1]).abs().max() > 1e-4


def test_prompts_that_cannot_reach_a_layer_are_an_error(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    attention = vpt.backbone.layers[1].part("attention")
    attention.config = tiny.model.config  # as if the code ignored the attention interface
    with pytest.raises(RouteError, match="did not reach the attention of layer 1"):
        vpt(tiny.pixel_values)


def test_a_skipped_layer_is_an_error(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    layer = vpt.backbone.layers[-1].module
    layer.forward = copy.copy(layer.forward).forward  # the layer runs, but without its hook
    with pytest.raises(RouteError, match=r"must reach 4 layers, but reached 3"):
        vpt(tiny.pixel_values)


def test_a_failing_call_leaves_nothing_behind(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    before = logits(vpt, tiny.pixel_values)
    bare = logits(vpt.get_base_model(), tiny.pixel_values)
    with pytest.raises(Exception):  # noqa: B017  the backbone's own error, whatever it is
        vpt(tiny.pixel_values[:, :2])
    assert torch.equal(logits(vpt, tiny.pixel_values), before)
    assert torch.equal(logits(vpt.get_base_model(), tiny.pixel_values), bare)


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [9]},
        {"layers_to_transform": [0], "carry": False, "pooling": "prompt"},
        {"modules_to_save": ["nothing_of_that_name"]},
        {"route": "key_value", "deep": False},
        {"task_type": "SEMANTIC_SEGMENTATION"},
    ],
)
def test_a_config_that_does_not_fit_changes_nothing(tiny: Tiny, config: dict[str, Any]) -> None:
    before = snapshot(tiny.model)
    with pytest.raises(VPTError):
        get_vpt_model(tiny.model, PromptConfig(**config))
    assert_unchanged(before, snapshot(tiny.model))


def test_a_deep_copy_is_independent(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    before = logits(vpt, tiny.pixel_values)
    copied = copy.deepcopy(vpt)
    assert torch.equal(logits(copied, tiny.pixel_values), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits(vpt, tiny.pixel_values), before)
    assert copied.unload() is not tiny.model


def checkpointing(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """The settings of gradient checkpointing of each module."""
    return {
        name: {key: value for key, value in vars(module).items() if "gradient_checkpointing" in key}
        for name, module in model.named_modules()
    }


def test_unload_restores_gradient_checkpointing_that_was_on(tiny: Tiny) -> None:
    tiny.model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    before = checkpointing(tiny.model)
    vpt = tiny.prompted()
    vpt.gradient_checkpointing_disable()
    assert not tiny.model.is_gradient_checkpointing
    model = vpt.unload()
    assert model.is_gradient_checkpointing and checkpointing(model) == before
    settings = [own["_gradient_checkpointing_func"].keywords for own in before.values() if own]
    assert settings and all(own == {"use_reentrant": False, "preserve_rng_state": False} for own in settings)


def test_unload_ends_gradient_checkpointing_that_was_off(tiny: Tiny) -> None:
    before = checkpointing(tiny.model)
    vpt = tiny.prompted()
    vpt.gradient_checkpointing_enable()
    assert tiny.model.is_gradient_checkpointing and checkpointing(tiny.model) != before
    model = vpt.unload()
    assert not model.is_gradient_checkpointing and checkpointing(model) == before


def test_unload_restores_the_function_of_gradient_checkpointing(tiny: Tiny) -> None:
    tiny.model.gradient_checkpointing_enable({"use_reentrant": True})
    before = checkpointing(tiny.model)
    vpt = tiny.prompted()
    vpt.gradient_checkpointing_enable({"use_reentrant": False})
    assert checkpointing(tiny.model) != before
    assert checkpointing(vpt.unload()) == before
