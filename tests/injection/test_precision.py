"""Lower precision, gradient checkpointing and compiled graphs give the eager float32 result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.invariants import on_backbones
from helpers.models import Tiny, assert_same, logits, loss_and_gradients, saved_bytes
from torch._dynamo.utils import counters

from vpt_peft import PromptConfig, RouteError, VPTModel
from vpt_peft.injection import overrides

CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"deep": False},
    "pooled": {"pooling": "global"},
    "projected": {"projection_dim": 6},
    "biases": {"bias": "all"},
    "prefix": {"kind": "prefix", "bias": "all"},
    "modules": {"modules_to_save": ["layernorm_before"]},
}
each_config = on_backbones(CONFIGS, ("deep", "shallow", "pooled", "prefix"))


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Same keys, and the difference of all tensors together within 5 % of their norm."""
    assert ours.keys() == theirs.keys() and ours
    difference, norm = (
        torch.cat([tensor.flatten() for tensor in tensors]).norm()
        for tensors in ([ours[name].float() - theirs[name] for name in ours], list(theirs.values()))
    )
    assert difference < 0.05 * norm, f"difference {difference}, norm {norm}"


@on_backbones({**CONFIGS, "dropout": {"dropout": 0.5}}, ("deep", "shallow", "dropout"))
def test_gradient_checkpointing_gives_identical_gradients(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt = tiny.prompted(**config).train()
    loss, expected = loss_and_gradients(vpt, tiny)
    vpt.gradient_checkpointing_enable()
    checkpointed_loss, checkpointed = loss_and_gradients(vpt, tiny)
    assert torch.equal(loss, checkpointed_loss)
    assert_same(checkpointed, expected)
    assert not any(module.training for module in tiny.model.modules())
    vpt.gradient_checkpointing_disable()
    assert_same(loss_and_gradients(vpt, tiny)[1], expected)


@pytest.mark.parametrize("deep", [True, False])
def test_gradient_checkpointing_saves_memory(tiny: Tiny, deep: bool) -> None:
    vpt = tiny.prompted(deep=deep).train()
    outputs = []
    plain = saved_bytes(vpt, lambda: outputs.append(vpt(tiny.pixel_values, labels=tiny.labels)))
    vpt.activation_checkpointing_enable()
    checkpointed = saved_bytes(vpt, lambda: outputs.append(vpt(tiny.pixel_values, labels=tiny.labels)))
    assert checkpointed * 4 < plain, f"{checkpointed} bytes with checkpointing, {plain} without"


def test_reentrant_checkpointing_is_refused(tiny: Tiny) -> None:
    vpt = tiny.prompted().train()
    vpt.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RouteError, match="must be non-reentrant"):
        vpt(tiny.pixel_values, labels=tiny.labels)


@each_config
def test_autocast(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt = tiny.prompted(**config).train()
    loss, expected = loss_and_gradients(vpt, tiny)
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss, autocast = loss_and_gradients(vpt, tiny)
    torch.testing.assert_close(autocast_loss, loss, atol=0.05, rtol=0)
    assert_near(autocast, expected)


@each_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones(tiny: Tiny, config: dict[str, Any], dtype: torch.dtype) -> None:
    vpt = tiny.prompted(**config).train()
    loss, expected = loss_and_gradients(vpt, tiny)
    state = {name: tensor.clone() for name, tensor in vpt.adapters["default"].state_dict().items()}
    vpt.unload().to(dtype)
    vpt = tiny.prompted(**config).train()
    vpt.adapters["default"].load_state_dict(state)
    assert {parameter.dtype for parameter in vpt.adapters.parameters()} == {torch.float32}
    half_loss, half = loss_and_gradients(vpt, replace(tiny, pixel_values=tiny.pixel_values.to(dtype)))
    torch.testing.assert_close(half_loss, loss, atol=0.05, rtol=0)
    assert_near(half, expected)


@on_backbones(CONFIGS, ("deep", "pooled", "prefix"))
@pytest.mark.heavy
def test_compiled_graphs_have_no_breaks_and_do_not_recompile_when_prompts_change(
    tiny: Tiny, config: dict[str, Any]
) -> None:
    vpt = tiny.prompted(**config).train()
    compiled = torch.compile(vpt, fullgraph=True, dynamic=False, backend="aot_eager")
    counters.clear()
    for _ in range(2):
        loss, expected = loss_and_gradients(vpt, tiny)
        compiled_loss, ours = loss_and_gradients(vpt, tiny, compiled)
        torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=0)
        assert_same(ours, expected, 1e-5)
        with torch.no_grad():
            for parameter in vpt.adapters.parameters():
                parameter.add_(0.01)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("kind", ["token", "prefix"])
@pytest.mark.heavy
def test_the_default_compiler(vit: Tiny, kind: str) -> None:
    vpt = vit.prompted(kind=kind).train()
    loss, expected = loss_and_gradients(vpt, vit)
    compiled_loss, ours = loss_and_gradients(vpt, vit, torch.compile(vpt, fullgraph=True, dynamic=False))
    torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=0)
    assert_same(ours, expected, 1e-5)


def _stirred(vpt: VPTModel) -> VPTModel:
    """Adapters that answer quite otherwise than the bare backbone, those without prompts too."""
    with torch.no_grad():
        for parameter in vpt.adapters.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    return vpt


BROKEN = {"deep": {}, "linear": {"num_tokens": 0}, "biases": {"num_tokens": 0, "bias": "all"}}
each_broken = pytest.mark.parametrize("config", BROKEN.values(), ids=BROKEN)


@each_broken
@pytest.mark.heavy
def test_where_a_graph_breaks_the_parts_see_the_adapter_too(vit: Tiny, config: dict[str, Any]) -> None:
    vpt = _stirred(vit.prompted(**config))
    compiled = torch.compile(vpt, backend="eager")
    counters.clear()
    for images in (vit.pixel_values, vit.pixel_values[:3]):
        with torch.no_grad():
            ours, expected = (model(images, output_hidden_states=True) for model in (compiled, vpt))
        torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=0)
    assert counters["graph_break"]


@pytest.mark.heavy
def test_where_a_graph_breaks_images_of_many_tasks_see_their_own_adapters(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("shallow", PromptConfig(num_tokens=3, deep=False), num_labels=2)
    vpt.add_adapter("biases", PromptConfig(num_tokens=0, bias="all"))
    compiled = torch.compile(_stirred(vpt), backend="eager")
    for names in (["default", "shallow", "__base__", "default"], ["biases"] * 4):
        with torch.no_grad():
            ours, expected = (
                model(vit.pixel_values, adapter_names=names, output_hidden_states=True) for model in (compiled, vpt)
            )
        torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [BROKEN["deep"], BROKEN["biases"]], ids=["deep", "biases"])
@pytest.mark.heavy
def test_layers_compiled_one_by_one_see_the_adapter(vit: Tiny, config: dict[str, Any]) -> None:
    vpt = _stirred(vit.prompted(**config)).train()
    loss, expected = loss_and_gradients(vpt, vit)
    for layer in vpt.backbone.layers:
        layer.module.compile(backend="eager")
    compiled_loss, ours = loss_and_gradients(vpt, vit)
    torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=0)
    assert_same(ours, expected, 1e-5)


@each_broken
@pytest.mark.heavy
def test_gradient_checkpointing_where_it_breaks_a_compiled_graph(vit: Tiny, config: dict[str, Any]) -> None:
    vpt = _stirred(vit.prompted(**config)).train()
    loss, expected = loss_and_gradients(vpt, vit)
    vpt.gradient_checkpointing_enable()
    compiled_loss, ours = loss_and_gradients(vpt, vit, torch.compile(vpt, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss, atol=1e-5, rtol=0)
    assert_same(ours, expected, 1e-5)


def test_inference_mode(tiny: Tiny) -> None:
    vpt = tiny.prompted(deep=False)
    expected = logits(vpt, tiny.pixel_values)
    with torch.inference_mode():
        ours = vpt(tiny.pixel_values).logits
    assert torch.equal(ours, expected)


def test_the_bias_of_a_layer_norm_has_a_gradient_where_pytorch_gives_none(
    tiny: Tiny, new: Callable[[], Tiny], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA, with many tokens and a frozen weight: the bias is added apart, which must change nothing else."""
    results = []
    for apart in (False, True):
        monkeypatch.setattr(overrides, "lacks_bias_gradient", lambda tokens, apart=apart: apart)
        other = new()
        vpt = other.prompted(bias="all").train()
        results.append(loss_and_gradients(vpt, other))
    (loss, fused), (other_loss, added) = results
    torch.testing.assert_close(loss, other_loss, atol=1e-6, rtol=0)
    assert_same(fused, added, tolerance=1e-5)
    assert any("norm" in name and gradient.any() for name, gradient in added.items())
