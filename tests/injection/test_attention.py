"""Every attention implementation that the backbone supports keeps working, at any time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.models import Tiny, logits
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from vpt_peft import PromptConfig, RouteError, get_vpt_model
from vpt_peft.injection import AdapterBatch, ForwardContext
from vpt_peft.injection.prompt_batch import LayerPrompts, batch_prompts

CONFIGS = [{}, {"deep": False}, {"pooling": "global"}]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=["deep", "shallow", "pooled"])


@pytest.fixture
def counting() -> Iterator[list[Any]]:
    """A custom implementation, "counting", and the list of the masks it was called with."""
    calls: list[Any] = []

    def attention(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, dropout: float = 0.0
    ) -> Any:
        assert module.config._attn_implementation == "counting"
        calls.append(mask)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout)

    AttentionInterface.register("counting", attention)
    AttentionMaskInterface.register("counting", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    yield calls


@each_config
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "counting"])
def test_switching_the_implementation_keeps_the_prompts(
    tiny: Tiny, counting: list[Any], config: dict[str, Any], implementation: str
) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(**config)
    expected = logits(vpt, tiny.pixel_values)
    vpt.set_attn_implementation(implementation)
    torch.testing.assert_close(logits(vpt, tiny.pixel_values), expected, atol=1e-5, rtol=0)
    assert (expected - bare).abs().max() > 1e-3
    torch.testing.assert_close(logits(tiny.model, tiny.pixel_values), bare, atol=1e-5, rtol=0)
    assert vpt.unload().config._attn_implementation == implementation
    torch.testing.assert_close(logits(tiny.model, tiny.pixel_values), bare, atol=1e-5, rtol=0)


@each_config
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.heavy
def test_flex_attention(vit: Tiny, config: dict[str, Any], masked: bool) -> None:
    vpt = vit.prompted(**config)
    mask = {"attention_mask": torch.tensor([[1] * 17, [1] * 9 + [0] * 8] * 2)} if masked else {}
    expected = logits(vpt, vit.pixel_values, **mask)
    vit.model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits(vpt, vit.pixel_values, **mask), expected, atol=1e-5, rtol=0)


@each_config
def test_masked_patches_have_no_influence(vit: Tiny, config: dict[str, Any]) -> None:
    """Also not through prompts that see them."""
    vpt = vit.prompted(**config)
    mask = torch.ones(4, 17).long()
    mask[:, -4:] = 0  # the lowest row of patches
    changed = vit.pixel_values.clone()
    changed[:, :, 24:] = 7.0
    if "pooling" in config:
        vpt.unload()
        vpt = vit.prompted(pooling="prompt")
    for implementation in ("sdpa", "eager"):
        vit.model.set_attn_implementation(implementation)
        seen = [logits(vpt, images, attention_mask=mask) for images in (vit.pixel_values, changed)]
        torch.testing.assert_close(*seen, atol=1e-6, rtol=0)


@each_config
def test_boolean_and_additive_masks_leave_prompts_visible_alike(vit: Tiny, config: dict[str, Any]) -> None:
    vpt = vit.prompted(**config)
    mask = torch.tensor([[1] * 17, [1] * 9 + [0] * 8] * 2)
    found = []
    for implementation in ("sdpa", "eager"):  # the first gets a boolean mask, the second an additive one
        vit.model.set_attn_implementation(implementation)
        found.append(logits(vpt, vit.pixel_values, attention_mask=mask))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)
    with vpt.disable_adapter():
        bare = logits(vpt, vit.pixel_values, attention_mask=mask)
    assert ((found[0] - bare).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize(("implementation", "boolean"), [("sdpa", True), ("sdpa", False), ("eager", False)])
def test_prompts_see_every_token_that_any_token_sees(vit: Tiny, implementation: str, boolean: bool) -> None:
    """Each image token sees only itself and the prompts, so patches reach the classifier through prompts or not."""
    visible = torch.eye(17).bool().expand(4, 1, 17, 17)
    mask = visible if boolean else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    changed = vit.pixel_values.clone()
    changed[:, :, 24:] = 7.0
    vit.model.set_attn_implementation(implementation)
    for deep in (True, False):
        vpt = vit.prompted(deep=deep)
        seen = [logits(vpt, images, attention_mask=mask) for images in (vit.pixel_values, changed)]
        assert torch.equal(*seen) == deep
        assert deep or ((seen[0] - seen[1]).abs().amax(1) > 1e-4).all()
        vpt.unload()


def test_no_mask_is_made_where_none_was(vit: Tiny, counting: list[Any]) -> None:
    """So that kernels without masks, such as flash attention's, keep working."""
    vpt = vit.prompted(pooling="global")
    vit.model.set_attn_implementation("counting")
    logits(vpt, vit.pixel_values)
    assert counting == [None] * 4


def test_weights_show_prompts_as_keys_behind_the_image(tiny: Tiny) -> None:
    tiny.model.set_attn_implementation("eager")
    vpt = tiny.prompted(deep=False)
    with torch.no_grad():
        bare = tiny.model(tiny.pixel_values, output_attentions=True).attentions
        ours = vpt(tiny.pixel_values, output_attentions=True).attentions
    for theirs, weights in zip(bare, ours, strict=True):
        assert weights.shape == (*theirs.shape[:-1], theirs.shape[-1] + 5)


def test_the_model_says_which_route_each_layer_takes(tiny: Tiny) -> None:
    def routes(**config: Any) -> dict[int, str]:
        vpt = get_vpt_model(tiny.model, PromptConfig(num_tokens=2, **config))
        found = vpt.routes
        vpt.unload()
        return found

    kv, tokens = "key_value", "tokens"
    assert routes() == dict.fromkeys(range(4), kv)
    assert routes(deep=False) == {0: tokens, 1: tokens, 2: tokens, 3: kv}
    assert routes(layers_to_transform=[0, 1]) == {0: kv, 1: tokens, 2: tokens, 3: kv}
    assert routes(layers_to_transform=[0, 1], carry=False) == {0: kv, 1: kv}
    assert routes(layers_to_transform=[2, 3]) == {2: kv, 3: kv}
    assert routes(pooling="prompt") == {0: kv, 1: kv, 2: kv, 3: tokens}
    assert routes(route="tokens") == dict.fromkeys(range(4), tokens)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"deep": False}, r"in layers \[0, 1, 2\] they are inputs of the next layer"),
        ({"pooling": "prompt"}, r"in layers \[3\] the pooling reads them"),
    ],
)
def test_keys_and_values_are_refused_where_they_are_not_exact(tiny: Tiny, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RouteError, match=message):
        tiny.prompted(route="key_value", **config)


@each_config
def test_serving_computes_keys_and_values_once_and_never_serves_stale_ones(
    tiny: Tiny, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    vpt = tiny.prompted(**config)
    calls = []
    projection = vpt.backbone.layers[0].part("k_proj")
    projection.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    expected = logits(vpt, tiny.pixel_values)
    with vpt.serving():
        calls.clear()
        for _ in range(3):
            assert torch.equal(logits(vpt, tiny.pixel_values), expected)
        assert calls.count(5) == 1, f"the prompts' keys were computed {calls.count(5)} times"

        def answers_afresh() -> bool:
            cached = logits(vpt, tiny.pixel_values.to(vpt.dtype)).float()
            serving, vpt._serving = vpt._serving, []
            fresh = logits(vpt, tiny.pixel_values.to(vpt.dtype)).float()
            vpt._serving = serving
            return torch.equal(cached, fresh)

        with torch.no_grad():
            vpt.adapters["default"].prompts[0].add_(0.5)
        assert answers_afresh() and not torch.equal(logits(vpt, tiny.pixel_values), expected)
        with torch.no_grad():
            projection.weight.mul_(2)
        assert answers_afresh()
        vpt.to(torch.bfloat16)
        assert answers_afresh()
        vpt.to(torch.float32)
        assert answers_afresh()
        vpt.add_adapter("other", PromptConfig(num_tokens=5, **config))
        vpt.set_adapter("other")
        assert answers_afresh()
        with torch.inference_mode():
            vpt(tiny.pixel_values)
        assert answers_afresh()
        vpt.train()(tiny.pixel_values, labels=tiny.labels).loss.backward()
        assert all(parameter.grad is not None for parameter in vpt.adapters["other"].parameters())
    assert not vpt._caches


def test_prompts_of_a_mixed_batch_are_gathered_on_the_device_of_each_layer(vit: Tiny) -> None:
    """A model that is spread over several devices has layers on each; "meta" stands for a second one."""
    vpt = vit.prompted()
    batches = [AdapterBatch(rows=(number,)) for number in range(2)]
    forward = ForwardContext(vpt.backbone, 2, batches, training=False)
    for device in ("cpu", "meta"):
        prompts = [
            LayerPrompts(number, batch, torch.zeros(1, 3 + number, 24, device=device), fresh=True, needs_output=False)
            for number, batch in enumerate(batches)
        ]
        batch = batch_prompts(prompts, forward)
        assert batch.prompt_index is not None and batch.valid_mask is not None
        assert {part.device.type for part in (batch.tokens, batch.prompt_index, batch.valid_mask)} == {device}
