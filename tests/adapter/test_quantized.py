"""Quantised backbones: prompts and a dense head train on top of weights of 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Tiny, assert_same, logits, tiny_vit
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig, Trainer, TrainingArguments
from transformers import ViTForImageClassification as Classifier

from vpt_peft import ConfigError, PromptConfig, VPTModel, adamw, get_adapter_state_dict, get_vpt_model
from vpt_peft.adapter import dequantize, is_quantized

pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning")
SIZE = {"hidden_size": 128, "intermediate_size": 256}
Load = Callable[..., PreTrainedModel]


def torchao(**_: Any) -> Any:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes(**bits: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**bits)


QUANTIZERS: dict[str, Callable[[], Any]] = {
    "torchao int8": torchao,
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    # its 4-bit kernel for the CPU needs a number of labels that is a multiple of its blocks
    "bitsandbytes 4 bits": lambda: bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["classifier"]),
}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the same tiny ViT anew, quantised or not."""
    folder = tmp_path / "backbone"
    tiny_vit(**SIZE).model.save_pretrained(folder)

    def make(quantizer: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        config = QUANTIZERS[quantizer]() if quantizer else None
        return Classifier.from_pretrained(folder, quantization_config=config, dtype=dtype)

    return make


def prompted(model: PreTrainedModel, **config: Any) -> VPTModel:
    torch.manual_seed(0)
    return get_vpt_model(model, PromptConfig(num_tokens=5, **config))


def train(vpt: VPTModel, tiny: Tiny, *rates: float) -> list[float]:
    """The losses of six steps of AdamW."""
    optimizer_class, groups = adamw(vpt, *rates)
    optimizer, losses = optimizer_class(**groups), []
    for _ in range(6):
        loss = vpt(tiny.pixel_values, labels=tiny.labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_prompts_train_on_a_quantised_backbone_and_come_back(quantizer: str, load: Load, tmp_path: Path) -> None:
    tiny, model = tiny_vit(**SIZE), load(quantizer)
    assert is_quantized(model.get_submodule("vit.layers.0.attention.q_proj"))
    with torch.no_grad():
        bare = load(quantizer)(tiny.pixel_values).logits
    vpt = prompted(model).train()
    assert all(type(own) is torch.nn.Parameter and own.dtype == torch.float32 for own in vpt.adapters.parameters())

    losses = train(vpt, tiny, 1e-2, 1e-2)
    assert losses[-1] < losses[0] / 2

    with torch.no_grad():
        trained = vpt.eval()(tiny.pixel_values).logits
    vpt.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(vpt.unload()(tiny.pixel_values).logits, bare)
        loaded = VPTModel.from_pretrained(load(quantizer), tmp_path / "adapter")
        assert torch.equal(loaded(tiny.pixel_values).logits, trained)
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_prefix_starts_without_effect_on_a_quantised_backbone_and_trains(quantizer: str, load: Load) -> None:
    tiny, model = tiny_vit(**SIZE), load(quantizer)
    vpt = prompted(model, kind="prefix", bias="all")
    keys = vpt.adapters["default"].prefix[0]["key"]
    assert keys.dtype == torch.float32 and keys.abs().mean() > 0.01
    without = get_vpt_model(load(quantizer), PromptConfig(num_tokens=0, bias="all"))
    assert torch.equal(logits(vpt, tiny.pixel_values), logits(without, tiny.pixel_values))
    losses = train(vpt.train(), tiny)
    assert losses[-1] < losses[0] / 2, losses


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_gradients_are_those_of_a_dense_backbone_with_the_same_weights(quantizer: str, load: Load) -> None:
    tiny, found = tiny_vit(**SIZE), []
    same = dequantize(load(quantizer).train(), "model").eval()  # with the weights that are left after quantising
    assert not any(map(is_quantized, same.modules()))
    for model in (same, load(quantizer)):
        vpt = prompted(model, deep=False).train()
        vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
        found.append(vpt.adapters["default"].prompts[0].grad)
    assert torch.cosine_similarity(*(gradient.flatten() for gradient in found), dim=0) > 0.95


def test_a_quantised_head_starts_as_the_dense_one_that_computes_the_same(load: Load) -> None:
    model = load("torchao int8")
    features = torch.randn(3, 128)
    with torch.no_grad():
        theirs = model.classifier(features)
        head = prompted(model, deep=True).adapters["default"].replacement("classifier")
        torch.testing.assert_close(head(features), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_quantised_backbone_of_half_precision_takes_prompts(quantizer: str, load: Load) -> None:
    tiny, vpt = tiny_vit(**SIZE), prompted(load(quantizer, torch.bfloat16)).train()
    vpt(tiny.pixel_values.bfloat16(), labels=tiny.labels).loss.backward()
    gradients = [own.grad for own in vpt.adapters.parameters()]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_trainer_trains_on_a_quantised_backbone(load: Load, tmp_path: Path) -> None:
    tiny, vpt = tiny_vit(**SIZE), prompted(load("torchao int8"))
    before = {name: tensor.clone() for name, tensor in get_adapter_state_dict(vpt).items()}
    images = [{"pixel_values": one, "labels": label} for one, label in zip(tiny.pixel_values, tiny.labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(vpt, arguments, train_dataset=images).train()  # type: ignore[arg-type]
    loaded = VPTModel.from_pretrained(load("torchao int8"), tmp_path / "out" / "checkpoint-2")
    assert_same(get_adapter_state_dict(loaded), get_adapter_state_dict(vpt))
    assert not torch.equal(before["prompts.0"], get_adapter_state_dict(vpt)["prompts.0"])


def test_a_copy_of_a_quantised_module_is_dense(load: Load) -> None:
    tiny = tiny_vit(**SIZE)
    vpt = prompted(load("torchao int8"), modules_to_save=["layers.3.mlp"]).train()
    vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
    mlp = vpt.adapters["default"].replacement("vit.layers.3.mlp")
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in mlp.parameters())


class Int8Linear(torch.nn.Linear):
    """A linear layer with integer weights and a scale for each output, as quantisation libraries keep them."""

    def __init__(self, dense: torch.nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, dense.bias is not None)
        self.scale = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        quantized = (dense.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(quantized, requires_grad=False)
        self.bias = dense.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale.to(inputs.dtype), self.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [24, 300], ids=["narrow", "wider_than_a_part"])
def test_the_copy_of_an_integer_head_computes_the_same_with_its_bias_once(bias: bool, width: int) -> None:
    tiny = tiny_vit(hidden_size=width, num_hidden_layers=1)
    head = tiny.model.classifier = Int8Linear(torch.nn.Linear(width, 7, bias))
    if bias:
        torch.nn.init.uniform_(head.bias, 1, 2)
    assert is_quantized(head)
    torch.nn.init.uniform_(tiny.model.vit.layernorm.bias)  # else features sum to 0, and hide what is added to weights
    expected = logits(tiny.model, tiny.pixel_values)
    vpt = get_vpt_model(tiny.model, PromptConfig(num_tokens=0))
    torch.testing.assert_close(logits(vpt, tiny.pixel_values), expected, atol=1e-4, rtol=0)
    state = get_adapter_state_dict(vpt)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    torch.testing.assert_close(state["head.classifier.weight"], head.weight * head.scale, atol=1e-6, rtol=0)
    assert ("head.classifier.bias" in state) == bias
    if bias:
        assert torch.equal(state["head.classifier.bias"], head.bias)


def test_the_copy_of_an_integer_module_computes_the_same_with_its_biases_once() -> None:
    tiny = tiny_vit()
    mlp = tiny.model.vit.layers[1].mlp
    for name, layer in [(name, layer) for name, layer in mlp.named_children() if isinstance(layer, torch.nn.Linear)]:
        torch.nn.init.uniform_(layer.bias, 1, 2)
        setattr(mlp, name, Int8Linear(layer))
    assert sum(map(is_quantized, mlp.modules())) == 2
    expected = logits(tiny.model, tiny.pixel_values)
    vpt = get_vpt_model(tiny.model, PromptConfig(num_tokens=0, modules_to_save=["layers.1.mlp"]))
    torch.testing.assert_close(logits(vpt, tiny.pixel_values), expected, atol=1e-4, rtol=0)
    vpt.train()(tiny.pixel_values, labels=tiny.labels).loss.backward()
    assert all(parameter.grad is not None for parameter in vpt.adapters.parameters())


def test_biases_are_trained_on_integer_layers() -> None:
    tiny = tiny_vit()
    attention = tiny.model.vit.layers[1].attention
    attention.v_proj = Int8Linear(attention.v_proj)
    expected = logits(tiny.model, tiny.pixel_values)
    vpt = get_vpt_model(tiny.model, PromptConfig(num_tokens=0, bias="all"))
    assert torch.equal(logits(vpt, tiny.pixel_values), expected)
    with torch.no_grad():
        vpt.get_parameter("adapters.default.bias.vit.layers.1.attention.v_proj").add_(1)
        attention.v_proj.bias.add_(1)
    assert torch.equal(logits(vpt, tiny.pixel_values), logits(tiny.model, tiny.pixel_values))


def test_what_is_quantised_and_no_linear_layer_is_refused() -> None:
    tiny = tiny_vit()
    tiny.model.classifier = torch.nn.Conv1d(1, 1, 1)
    tiny.model.classifier.weight = torch.nn.Parameter(torch.zeros(1, 1, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"got Conv1d at 'classifier' with a weight of torch\.int8"):
        tiny.prompted()
