"""BEiT: scaled residuals, relative position bias, a norm behind the mean over tokens; and its other classes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import BEIT, Tiny, logits, stirred, tiny_beit
from torch import Tensor, nn
from transformers import BeitConfig, BeitForMaskedImageModeling, BeitModel

from vpt_peft import ConfigError, PromptConfig, VPTModel, get_vpt_model

BIASES: dict[str, dict[str, Any]] = {
    "shared_bias": {},
    "own_biases": {"use_shared_relative_position_bias": False, "use_relative_position_bias": True},
    "no_bias": {"use_shared_relative_position_bias": False},
    "no_scale": {"layer_scale_init_value": 0.0},
}


class Padded(nn.Module):
    """A relative position bias with zeros for prompts, which stand behind ``[CLS]``."""

    def __init__(self, bias: nn.Module, num_prompts: int) -> None:
        super().__init__()
        self.bias, self.num_prompts = bias, num_prompts

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        bias, gap = self.bias(*args, **kwargs), self.num_prompts
        padded = bias.new_zeros(*bias.shape[:2], bias.shape[2] + gap, bias.shape[3] + gap)
        image = [0, *range(gap + 1, padded.shape[2])]
        padded[:, :, torch.tensor(image)[:, None], torch.tensor(image)] = bias
        return padded


def concatenated(model: Any, vpt: VPTModel, pixel_values: Tensor, deep: bool) -> Tensor:
    """Logits by the paper's definition: ``L_i([x, P, E])`` with whole layers of the bare model."""
    prompts = {
        name: tensor for name, tensor in vpt.adapters["default"].state_dict(keep_vars=True).items() if "prompts" in name
    }
    num_prompts = len(prompts["prompts.0"])
    beit = model.beit
    hidden = beit.embeddings(pixel_values)
    bias = None
    if beit.shared_position_bias is not None:
        bias = Padded(beit.shared_position_bias, num_prompts)((4, 4), dim_size=hidden.shape[1])
    hidden = torch.cat([hidden[:, :1], prompts["prompts.0"].expand(len(hidden), -1, -1), hidden[:, 1:]], dim=1)
    for number, layer in enumerate(beit.layers):
        if deep:
            fresh = prompts[f"prompts.{number}"].expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :1], fresh, hidden[:, num_prompts + 1 :]], dim=1)
        if layer.relative_position_bias is not None:
            layer.relative_position_bias = Padded(layer.relative_position_bias, num_prompts)
        hidden = layer(hidden, attention_mask=bias, resolution=(32, 32))
    hidden = beit.layernorm(torch.cat([hidden[:, :1], hidden[:, num_prompts + 1 :]], dim=1))
    return model.classifier(beit.pooler(hidden))


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("route", ["auto", "tokens"])
def test_prompts_are_what_concatenating_them_to_whole_layers_gives(
    bias: dict[str, Any], deep: bool, route: str
) -> None:
    tiny = tiny_beit(**bias)
    vpt = tiny.prompted(deep=deep, route=route)
    ours = logits(vpt, tiny.pixel_values)
    with torch.no_grad():
        expected = concatenated(tiny_beit(**bias).model, vpt, tiny.pixel_values, deep)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_gradients_agree_with_concatenating(bias: dict[str, Any]) -> None:
    tiny = tiny_beit(**bias)
    vpt = tiny.prompted(deep=False)
    prompts = vpt.adapters["default"].state_dict(keep_vars=True)["prompts.0"]
    (ours,) = torch.autograd.grad(vpt(tiny.pixel_values).logits.sin().sum(), prompts)
    by_definition = concatenated(tiny_beit(**bias).model, vpt, tiny.pixel_values, deep=False)
    (expected,) = torch.autograd.grad(by_definition.sin().sum(), prompts)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


class Logits(nn.Module):
    """A model whose output is a tensor, as ``torch.jit.trace`` needs it."""

    def __init__(self, vpt: VPTModel) -> None:
        super().__init__()
        self.vpt = vpt

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vpt(pixel_values).logits  # type: ignore[no-any-return]


def jit_trace(model: nn.Module, images: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(model, images, check_trace=False)


TRACERS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, images: torch.export.export(model, (images,), strict=False).module(),
    "compile": lambda model, _: torch.compile(model, backend="eager", fullgraph=True),
    "jit": jit_trace,
}


@pytest.mark.parametrize("tracer", TRACERS.values(), ids=TRACERS)
@pytest.mark.parametrize("bias", ["shared_bias", "own_biases", "no_bias"])
def test_traced_graphs_weigh_prompts_and_image_alike(bias: str, tracer: Callable[[nn.Module, Tensor], Any]) -> None:
    """There, transformers makes a boolean mask, which BEiT adds to its position bias."""
    tiny = tiny_beit(**BIASES[bias])
    model = Logits(tiny.prompted())
    with torch.no_grad():
        traced = tracer(model, tiny.pixel_values)(tiny.pixel_values)
        torch.testing.assert_close(traced, model(tiny.pixel_values), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_mean_pooling", [True, False])
def test_pooling_over_the_image_takes_the_norm_that_the_backbone_has(use_mean_pooling: bool) -> None:
    tiny = tiny_beit(use_mean_pooling=use_mean_pooling)
    default = logits(tiny.prompted(), tiny.pixel_values)
    tiny = tiny_beit(use_mean_pooling=use_mean_pooling)
    pooled = logits(tiny.prompted(pooling="image"), tiny.pixel_values)
    assert torch.allclose(default, pooled, atol=1e-6) == use_mean_pooling  # else the default reads [CLS]


def test_images_of_another_size_are_taken_as_the_backbone_takes_them() -> None:
    tiny = tiny_beit()
    images = torch.randn(2, 3, 48, 40)
    vpt = tiny.prompted(deep=False)
    assert logits(vpt, images, interpolate_pos_encoding=True).shape == (2, 7)
    alone = torch.cat([logits(vpt, image[None], interpolate_pos_encoding=True) for image in images])
    torch.testing.assert_close(logits(vpt, images, interpolate_pos_encoding=True), alone, atol=1e-6, rtol=0)


def test_masked_image_modeling_gives_the_backbones_loss_with_the_adapters_head() -> None:
    torch.manual_seed(0)
    model = stirred(BeitForMaskedImageModeling(BeitConfig(**BEIT, vocab_size=11)).eval())
    images, masked = torch.randn(4, 3, 32, 32), torch.rand(4, 16) < 0.5
    tokens = torch.randint(0, 11, (int(masked.sum()),))
    with torch.no_grad():
        bare = model(images, bool_masked_pos=masked, labels=tokens)
    vpt = get_vpt_model(model, PromptConfig(num_tokens=5)).train()
    output = vpt(images, bool_masked_pos=masked, labels=tokens)
    assert output.keys() == bare.keys() and output.logits.shape == bare.logits.shape == (4, 16, 11)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits[masked], tokens))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in vpt.parameters() if parameter.requires_grad)


def test_the_model_without_head() -> None:
    torch.manual_seed(0)
    model = BeitModel(BeitConfig(**BEIT)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        bare = model(images)
        ours = get_vpt_model(model, PromptConfig(num_tokens=5))(images)
    assert ours.keys() == bare.keys() and ours.last_hidden_state.shape == bare.last_hidden_state.shape
    assert (ours.last_hidden_state - bare.last_hidden_state).abs().max() > 1e-3


def test_a_classifier_that_is_no_layer_of_outputs_is_refused_with_other_labels() -> None:
    tiny: Tiny = tiny_beit()
    tiny.model.classifier = nn.Sequential(nn.Linear(24, 7))
    vpt = tiny.prompted()
    with pytest.raises(
        ConfigError, match=r"can replace a linear layer or a convolution, got Sequential at 'classifier'"
    ):
        vpt.add_adapter("other", PromptConfig(), num_labels=3)
