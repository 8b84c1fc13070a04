"""An adapter loads onto the backbone that it was trained on, and on no other."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import VIT, Tiny, logits, tiny_vit
from torch import nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from vpt_peft import AdapterError, AutoVPTModel, CheckpointError, PromptConfig, VPTModel, get_vpt_model

CONFIG = PromptConfig(num_tokens=5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with a pretrained ViT."""
    tiny_vit().model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def load(checkpoint: Path) -> Callable[..., Any]:
    return lambda **options: ViTForImageClassification.from_pretrained(checkpoint, **options)


def attach(model: PreTrainedModel, config: PromptConfig = CONFIG) -> VPTModel:
    """Attaches an adapter to a backbone with random parts, which is warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_vpt_model(model, config)


def fine_tune(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.vit.layers[2].mlp.fc1.weight.mul_(1.01)


def test_another_random_patch_embedding_is_an_error(load: Any, tmp_path: Path) -> None:
    options = {"num_channels": 4, "ignore_mismatched_sizes": True}
    attach(load(**options)).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"not the one .* vit\.embeddings\.patch_embeddings\.projection\.weight"):
        VPTModel.from_pretrained(load(**options), tmp_path / "a")


def test_another_checkpoint_of_equal_shape_is_an_error(load: Any, tmp_path: Path) -> None:
    get_vpt_model(load(), CONFIG).save_pretrained(tmp_path / "a")
    other = tiny_vit().model
    nn.init.normal_(other.vit.layers[3].attention.v_proj.weight)
    with pytest.raises(CheckpointError, match=r"layers\.3\.attention\.v_proj\.weight: expected \[.*\], got \["):
        VPTModel.from_pretrained(other, tmp_path / "a")
    vpt = get_vpt_model(other, CONFIG)
    for name in ("new", "default"):  # also onto an existing adapter
        with pytest.raises(CheckpointError, match=r"layers\.3\.attention\.v_proj\.weight"):
            vpt.load_adapter(tmp_path / "a", name)
    assert list(vpt.adapters) == ["default"]
    vpt.load_adapter(tmp_path / "a", "new", check_backbone=False)
    vpt.unload()
    assert VPTModel.from_pretrained(other, tmp_path / "a", check_backbone=False).active_adapter == "default"


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 2}, {"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"qkv_bias": False}]
)
def test_another_function_of_equal_weights_is_an_error(load: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    get_vpt_model(load(), CONFIG).save_pretrained(tmp_path / "a")
    (name,) = changes
    with pytest.raises(CheckpointError, match=f"{name}: expected .*, got "):
        VPTModel.from_pretrained(load(**changes), tmp_path / "a")


def test_a_backbone_that_was_fine_tuned_before_is_not_taken_from_its_folder(load: Any, tmp_path: Path) -> None:
    model = load()
    fine_tune(model)
    get_vpt_model(model, CONFIG).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.fc1\.weight"):
        AutoVPTModel.from_pretrained(tmp_path / "a")


def test_a_random_pooler_is_warned_about_and_not_mistaken_for_another(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"pooler\.dense\.weight.* were not in its checkpoint"):
        vpt = get_vpt_model(ViTModel.from_pretrained(checkpoint), CONFIG)
    vpt.save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.weight"):
        AutoVPTModel.from_pretrained(tmp_path / "a")


def test_a_warning_that_is_an_error_leaves_the_backbone_bare(checkpoint: Path) -> None:
    model = ViTModel.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="were not in its checkpoint"):
            get_vpt_model(model, CONFIG)
    attach(model).unload()


def test_a_part_that_is_saved_with_the_adapter_may_differ(checkpoint: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vpt = get_vpt_model(ViTModel.from_pretrained(checkpoint), CONFIG.replace(modules_to_save=["pooler"])).eval()
    vpt.save_pretrained(tmp_path / "a")
    loaded = AutoVPTModel.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(loaded(images).pooler_output, vpt(images).pooler_output)


@pytest.mark.parametrize("config", [{"bias": "all"}, {"modules_to_save": ["layernorm_after"]}])
def test_copies_of_biases_and_modules_are_not_compared(load: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    vpt = get_vpt_model(load(), CONFIG.replace(**config))
    vpt.save_pretrained(tmp_path / "a")
    model = load()
    with torch.no_grad():
        (model.vit.layers[0].mlp.fc1 if "bias" in config else model.vit.layers[0].layernorm_after).bias.add_(1)
    assert VPTModel.from_pretrained(model, tmp_path / "a").active_adapter == "default"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_of_the_checkpoint_in_half_precision_pass(tiny: Tiny, new: Any, tmp_path: Path, dtype: Any) -> None:
    tiny.prompted().save_pretrained(tmp_path / "full")
    half = new().model.to(dtype)
    VPTModel.from_pretrained(half, tmp_path / "full").save_pretrained(tmp_path / "half")
    assert VPTModel.from_pretrained(new().model, tmp_path / "half").active_adapter == "default"
    back = new().model.to(dtype).float()
    assert VPTModel.from_pretrained(back, tmp_path / "full").active_adapter == "default"


def test_an_adapter_of_a_quantised_copy_loads_onto_the_checkpoint_and_the_reverse(tmp_path: Path) -> None:
    def quantised() -> PreTrainedModel:
        model = tiny_vit().model
        for layer in model.vit.layers:
            layer.mlp.fc1 = Int8Linear(layer.mlp.fc1)
        return model

    tiny_vit().prompted().save_pretrained(tmp_path / "dense")
    VPTModel.from_pretrained(quantised(), tmp_path / "dense").save_pretrained(tmp_path / "int8")
    VPTModel.from_pretrained(tiny_vit().model, tmp_path / "int8")
    other = quantised()
    other.vit.layers[1].mlp.fc1 = Int8Linear(nn.Linear(24, 48))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.fc1\.weight"):
        VPTModel.from_pretrained(other, tmp_path / "dense")


class Int8Linear(nn.Linear):
    """A linear layer quantised to 8 bits with one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight.float() * self.scale, self.bias)


def test_a_tensor_that_was_renamed_is_found_by_its_values(load: Any, tmp_path: Path) -> None:
    get_vpt_model(load(), CONFIG).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    tensors = config["fingerprint"]["tensors"]
    tensors["vit.old_name.weight"] = tensors.pop("vit.layers.1.mlp.fc1.weight")
    path.write_text(json.dumps(config))
    VPTModel.from_pretrained(load(), tmp_path / "a")
    tensors["vit.old_name.weight"] = "1 2 3 4"
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"old_name\.weight: expected \[2, 3, 4\], got no such tensor"):
        VPTModel.from_pretrained(load(), tmp_path / "a")


@pytest.mark.parametrize(
    "damage", [{}, [], "x", {"config": {}, "precision": "x", "tensors": {}}, {"tensors": {"a": 1}}]
)
def test_a_damaged_fingerprint_is_an_error(load: Any, tmp_path: Path, damage: Any) -> None:
    get_vpt_model(load(), CONFIG).save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": damage}))
    with pytest.raises(CheckpointError, match="fingerprint"):
        VPTModel.from_pretrained(load(), tmp_path / "a")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_backbone_with_values_that_are_not_finite_matches_itself_alone(tmp_path: Path, value: float) -> None:
    def backbone(value: float) -> PreTrainedModel:
        model = tiny_vit().model
        nn.init.constant_(model.vit.layers[0].mlp.fc1.bias, value)
        return model

    get_vpt_model(backbone(value), CONFIG).save_pretrained(tmp_path)
    VPTModel.from_pretrained(backbone(value), tmp_path)
    for other in {0.0, 1.0, float("inf")} - {value}:
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.fc1\.bias"):
            VPTModel.from_pretrained(backbone(other), tmp_path)


def test_the_fingerprint_of_vit_b_takes_less_than_20_kb() -> None:
    from vpt_peft.backbones import find_backbone
    from vpt_peft.io import take_fingerprint

    backbone = find_backbone(ViTForImageClassification(ViTConfig()))
    size = len(json.dumps(take_fingerprint(backbone).to_dict(), indent=2))
    assert size < 20_000, f"{size:,} bytes"


def test_a_backbone_with_lora_is_refused(load: Any) -> None:
    peft = pytest.importorskip("peft")
    model = load()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"layers of PEFT.*merge"):
        get_vpt_model(model, CONFIG)
    assert logits(load(), torch.zeros(1, 3, 32, 32)).shape == (1, VIT.get("num_labels", 7))
