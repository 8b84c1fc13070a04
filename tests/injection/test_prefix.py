"""Prefixes: keys and values that are learned directly, and attended to apart from the image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import BUILDERS, Tiny, assert_same, gradients, logits, tiny_vit
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from vpt_peft import PromptConfig, VPTModel, get_adapter_state_dict, get_vpt_model
from vpt_peft.injection.prefix_attention import prefix_attention


def fresh(tiny: Tiny, **config: Any) -> VPTModel:
    """With values that are zero, as they start."""
    torch.manual_seed(1)
    return get_vpt_model(tiny.model, PromptConfig(**{"num_tokens": 5, "kind": "prefix", **config})).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [{}, {"projection_dim": 6}, {"shared": True, "projection_dim": 6}, {"bias": "all"}])
def test_an_untrained_prefix_leaves_all_features_to_the_last_bit(
    tiny: Tiny, config: dict[str, Any], attention: str
) -> None:
    tiny.model.set_attn_implementation(attention)
    with torch.no_grad():
        bare = tiny.model(tiny.pixel_values, output_hidden_states=True)
        ours = fresh(tiny, **config)(tiny.pixel_values, output_hidden_states=True)
    assert torch.equal(ours.logits, bare.logits)
    for own, other in zip(ours.hidden_states, bare.hidden_states, strict=True):
        assert torch.equal(own, other)


def test_values_start_at_zero_and_keys_as_those_of_drawn_prompts(vit: Tiny) -> None:
    vpt = fresh(vit, num_tokens=50)
    tokens = torch.empty(5000, 24).uniform_(-1, 1)
    for index, layer in enumerate(vit.model.vit.layers):
        key, value = (vpt.adapters["default"].prefix[index][part].detach() for part in ("key", "value"))
        with torch.no_grad():
            expected = layer.attention.k_proj(layer.layernorm_before(tokens))  # the norm takes the scale out
        assert not value.any()
        assert key.mean(0) == pytest.approx(expected.mean(0).tolist(), abs=0.75 * expected.std().item())
        assert key.std().item() == pytest.approx(expected.std().item(), rel=0.2)


def with_two_softmaxes(parts: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> str:
    """An attention implementation that writes the formula of a prefix out: each query attends to both apart."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        output = torch.softmax(scores if mask is None else scores + mask, -1) @ value
        for head in range(query.shape[1]):
            columns = slice(head * query.shape[-1], (head + 1) * query.shape[-1])
            own_key, own_value = (part[:, columns] for part in parts(module))
            weights = torch.softmax(query[:, head] @ own_key.T / query.shape[-1] ** 0.5, -1)
            output = output + torch.nn.functional.one_hot(torch.tensor(head), query.shape[1])[None, :, None, None] * (
                weights @ own_value
            ).unsqueeze(1)
        return output.transpose(1, 2), None

    AttentionInterface.register("two_softmaxes", attend)
    return "two_softmaxes"


def test_logits_and_gradients_are_those_of_the_formula_written_out(tiny: Tiny, new: Callable[[], Tiny]) -> None:
    vpt = tiny.prompted(kind="prefix").train()
    vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
    ours = gradients(vpt)

    other = new()
    linear = get_vpt_model(other.model, PromptConfig(num_tokens=0)).train()
    for name, tensor in linear.adapters["default"].head.state_dict(keep_vars=True).items():
        tensor.data = vpt.adapters["default"].head.state_dict()[name]
    state = {name: tensor.clone().requires_grad_() for name, tensor in get_adapter_state_dict(vpt).items()}
    attentions = [layer.part("attention") for layer in linear.backbone.layers]

    def parts(module: nn.Module) -> tuple[Tensor, Tensor]:
        layer = next(i for i, found in enumerate(attentions) if found.q_proj is module.q_proj)
        return state[f"prefix.{layer}.key"], state[f"prefix.{layer}.value"]

    other.model.set_attn_implementation(with_two_softmaxes(parts))
    output = linear(other.pixel_values, labels=other.labels)
    output.loss.backward()
    torch.testing.assert_close(output.logits, vpt(tiny.pixel_values).logits, atol=1e-5, rtol=0)
    theirs = {name: tensor.grad for name, tensor in state.items() if name.startswith("prefix")}
    assert_same({name.removeprefix("adapters.default."): ours[name] for name in ours if "prefix" in name}, theirs, 1e-5)


def test_the_attention_to_the_image_is_called_as_without_prompts(tiny: Tiny) -> None:
    calls: list[tuple[Any, ...]] = []
    eager = next(iter(tiny.prompted().backbone.layers)).part("attention").config.override.eager

    def noting(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        calls.append((query.shape, key.shape, None if mask is None else mask.shape))
        return eager(module, query, key, value, mask, **kwargs)

    tiny = BUILDERS[tiny.name]()
    AttentionInterface.register("noting", noting)
    tiny.model.set_attn_implementation("noting")
    logits(tiny.model, tiny.pixel_values)
    bare, calls[:] = list(calls), []
    logits(tiny.prompted(kind="prefix"), tiny.pixel_values)
    assert calls == bare and calls


def test_weights_and_routes_of_a_prefix(tiny: Tiny) -> None:
    tiny.model.set_attn_implementation("eager")
    vpt = tiny.prompted(kind="prefix", layers_to_transform=[2, 3])
    assert vpt.routes == {2: "prefix", 3: "prefix"}
    with torch.no_grad():
        bare = tiny.model(tiny.pixel_values, output_attentions=True).attentions
        ours = vpt(tiny.pixel_values, output_attentions=True).attentions
    assert [weights.shape for weights in ours] == [weights.shape for weights in bare]
    assert torch.equal(ours[0], bare[0])  # of layer 0, in Swin of its first stage


def test_the_keys_of_the_file(tmp_path: Path) -> None:
    for kind, widths in {"vit": [24] * 4, "swin": [8, 8, 16, 16]}.items():
        state = get_adapter_state_dict(BUILDERS[kind]().prompted(kind="prefix"))
        expected = {
            f"prefix.{layer}.{part}": (5, width) for layer, width in enumerate(widths) for part in ("key", "value")
        }
        assert {name: tuple(tensor.shape) for name, tensor in state.items() if "prefix" in name} == expected
        assert not any(name.startswith("prompts") for name in state)
    state = get_adapter_state_dict(BUILDERS["swin"]().prompted(kind="prefix", projection_dim=3, shared=True))
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if "head" not in name} == {
        "prefix.0.key": (5, 3), "prefix.0.value": (5, 3),
        **{f"projection.{width}.{part}.weight": (width, 3) for width in (8, 16) for part in ("key", "value")},
        **{f"projection.{width}.{part}.bias": (width,) for width in (8, 16) for part in ("key", "value")},
    }  # fmt: skip


def test_dropout_is_drawn_for_each_image_while_training(tiny: Tiny) -> None:
    vpt = tiny.prompted(kind="prefix", dropout=0.5).train()
    same = tiny.pixel_values[:1].expand(4, -1, -1, -1)
    dropped = logits(vpt, same)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-4
    whole = logits(vpt.eval(), same)
    torch.testing.assert_close(whole[0], whole[1], atol=1e-6, rtol=0)


def test_serving_and_disabling_a_prefix(tiny: Tiny) -> None:
    vpt = tiny.prompted(kind="prefix", projection_dim=6).eval()
    bare, expected = logits(tiny.model, tiny.pixel_values), logits(vpt, tiny.pixel_values)
    assert not torch.equal(bare, expected)
    with vpt.serving():
        for _ in range(2):
            assert torch.equal(logits(vpt, tiny.pixel_values), expected)
        for parameter in vpt.adapters["default"].prefix.parameters():
            parameter.data.mul_(2)
        changed = logits(vpt, tiny.pixel_values)
    assert torch.equal(logits(vpt, tiny.pixel_values), changed) and not torch.equal(changed, expected)
    with vpt.disable_adapter():
        assert torch.equal(logits(vpt, tiny.pixel_values), bare)


def test_a_run_with_a_prefix_learns_from_the_first_step() -> None:
    """The gradient of values that are zero is not zero, and after one step that of the keys is not either."""
    tiny = tiny_vit()
    vpt = fresh(tiny).train()
    optimizer = torch.optim.SGD([p for p in vpt.adapters["default"].prefix.parameters()], lr=0.1)
    for parts in (("value",), ("value", "key")):
        optimizer.zero_grad()
        vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
        for layer in range(4):
            pair = vpt.adapters["default"].prefix[layer]
            assert {name for name in pair if pair[name].grad.any()} == set(parts)
        optimizer.step()


def test_no_query_of_a_mixed_batch_is_left_without_a_key(vit: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose adapter has no prefix sees values of zero: not all kernels give zero where nothing is visible."""
    vpt = vit.prompted(3, kind="prefix")
    vpt.add_adapter("longer", PromptConfig(num_tokens=5, kind="prefix"))
    vpt.add_adapter("none", PromptConfig(num_tokens=0))
    masks: list[Tensor] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, valid_mask: Tensor) -> Tensor:
        masks.append(valid_mask)
        assert not value[2].any()
        return prefix_attention(query, key, value, valid_mask)

    monkeypatch.setattr("vpt_peft.injection.attention.prefix_attention", watched)
    names = ["default", "longer", "none", "default"]
    mixed = logits(vpt, vit.pixel_values, adapter_names=names)
    assert [mask.sum(1).tolist() for mask in masks] == [[3, 5, 5, 3]] * 4
    vpt.set_adapter("none")
    torch.testing.assert_close(mixed[2], logits(vpt, vit.pixel_values)[2], atol=1e-5, rtol=0)
