"""No tool runs an adapter with tensors that were not loaded, or were made for something else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.models import VIT, Tiny, logits, tiny_vit
from torch import Tensor
from transformers import AutoModelForImageClassification

pytest.importorskip("peft", minversion="0.21")

import peft
from peft import LoraConfig, PeftModel, get_peft_model

from vpt_peft import AdapterError, CheckpointError, PromptConfig, VPTError, VPTModel, get_vpt_model
from vpt_peft.peft import VPTConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def lacking(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "prompts.2"}


def lacking_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}


def shorter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:1] if name == "prompts.2" else tensor for name, tensor in tensors.items()}


def not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor * torch.nan if name == "prompts.2" else tensor for name, tensor in tensors.items()}


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def further(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "prompts.9": tensors["prompts.2"].clone()}


@pytest.fixture
def damaged(fresh_vit: Any, save: Any) -> Callable[[Any], Path]:
    """An adapter whose tensors have been changed, in a file of another tool."""

    def make(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        folder: Path = save(fresh_vit(), "deep")[0]
        file = folder / "adapter_model.safetensors"
        file.write_bytes(safetensors.torch.save(change(safetensors.torch.load(file.read_bytes()))))
        return folder

    return make


@pytest.mark.parametrize("change", [lacking, lacking_head, shorter, not_finite, renamed, further])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}, {"low_cpu_mem_usage": True}])
def test_peft_refuses_a_file_that_does_not_fit(
    fresh_vit: Any, damaged: Any, change: Any, options: dict[str, Any]
) -> None:
    folder = damaged(change)
    with pytest.raises(CheckpointError, match=r"tensors do not match the adapter|not finite"):
        PeftModel.from_pretrained(fresh_vit(), folder, **options)


@pytest.mark.parametrize("change", [lacking, lacking_head, shorter, not_finite, renamed])
def test_a_model_of_transformers_never_runs_with_a_file_that_does_not_fit(
    vit: Tiny, fresh_vit: Any, damaged: Any, change: Any
) -> None:
    folder = damaged(change)
    model = fresh_vit()
    with pytest.raises((AdapterError, RuntimeError), match=r"have not been loaded|[Mm]ismatch"):
        model.load_adapter(folder)
        logits(model, vit.pixel_values)
    with pytest.raises(AdapterError, match="have not been loaded"):
        model.load_adapter(folder, "again", ignore_mismatched_sizes=True)
        logits(model, vit.pixel_values)
    with pytest.raises((AdapterError, RuntimeError), match=r"have not been loaded|[Mm]ismatch"):
        logits(AutoModelForImageClassification.from_pretrained(folder), vit.pixel_values)


def test_the_config_of_a_saved_adapter_does_not_make_a_new_one(vit: Tiny, fresh_vit: Any, save: Any) -> None:
    config = peft.PeftConfig.from_pretrained(save(fresh_vit(), "deep")[0])
    model = get_peft_model(fresh_vit(), config)
    with pytest.raises(
        AdapterError, match=r"have not been loaded: prompts\.0.*for a new adapter, make a new VPTConfig"
    ):
        model(vit.pixel_values)
    with pytest.raises(VPTError, match="not finite"):
        model.save_pretrained(save(fresh_vit(), "long")[0])
    with model.disable_adapter():
        assert logits(model, vit.pixel_values).isfinite().all()


def test_another_backbone_is_refused(fresh_vit: Any, save: Any) -> None:
    folder = save(fresh_vit(), "deep")[0]
    for change, match in (({"num_hidden_layers": 3}, "of widths"), ({}, "not the one that the adapter was trained on")):
        other = tiny_vit(**change).model
        with torch.no_grad():
            other.vit.layers[1].mlp.fc1.weight.mul_(1.5)
        modules = list(other.modules())
        for load in (PeftModel.from_pretrained, lambda model, folder: model.load_adapter(folder)):
            with pytest.raises(CheckpointError, match=match):
                load(other, folder)
        assert list(other.modules()) == modules and VIT["num_hidden_layers"] == 4


def test_a_config_without_fingerprint_lets_an_adapter_load_onto_another_backbone(
    vit: Tiny, fresh_vit: Any, save: Any
) -> None:
    folder = save(fresh_vit(), "deep")[0]
    other = tiny_vit().model
    with torch.no_grad():
        other.vit.layers[1].mlp.fc1.weight.mul_(1.5)
    config = peft.PeftConfig.from_pretrained(folder)
    config.fingerprint = None
    model = PeftModel.from_pretrained(copy.deepcopy(other), folder, config=config)
    expected = VPTModel.from_pretrained(other, folder, check_backbone=False)
    assert torch.equal(logits(model, vit.pixel_values), logits(expected, vit.pixel_values))


def test_a_config_of_another_adapter_is_refused(fresh_vit: Any, save: Any) -> None:
    folder = save(fresh_vit(), "deep")[0]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_tokens": 5}))
    with pytest.raises(CheckpointError, match=r"prompts.0: expected \(5, 24\), got \(3, 24\)"):
        PeftModel.from_pretrained(fresh_vit(), folder)


# -- LoRA and prompts -----------------------------------------------------------------------------------------------

LORA = {"r": 2, "target_modules": ["q_proj", "query"], "init_lora_weights": False}
HOW = r"merge.*\(merge_and_unload\(\)\).* save the result as a checkpoint"


def add_lora_first(model: Any) -> None:
    get_peft_model(get_peft_model(model, LoraConfig(**LORA)), VPTConfig())


def add_native_lora_first(model: Any) -> None:
    model.add_adapter(LoraConfig(**LORA), "lora")
    model.add_adapter(VPTConfig(), "vpt")


def add_lora_to_a_peft_model(model: Any) -> None:
    get_peft_model(get_peft_model(model, VPTConfig()), LoraConfig(**LORA))


def add_lora_to_a_vpt_model(model: Any) -> None:
    get_peft_model(get_vpt_model(model, PromptConfig()), LoraConfig(**LORA))


def add_native_lora(model: Any) -> None:
    model.add_adapter(VPTConfig(), "vpt")
    model.add_adapter(LoraConfig(**LORA), "lora")


def wrap_native_prompts(model: Any) -> None:
    model.add_adapter(VPTConfig(), "vpt")
    get_peft_model(model, LoraConfig(**LORA))


@pytest.mark.filterwarnings("ignore:You are trying to modify:UserWarning", "ignore:Already found:UserWarning")
@pytest.mark.parametrize(
    "add",
    [
        add_lora_first, add_native_lora_first, add_lora_to_a_peft_model, add_lora_to_a_vpt_model, add_native_lora,
        wrap_native_prompts,
    ],
)  # fmt: skip
def test_lora_and_prompts_on_one_backbone_are_refused_with_how_to_have_both(add: Any, vit: Tiny) -> None:
    with pytest.raises(AdapterError, match=rf"(?si){HOW}"):
        add(vit.model)


@pytest.mark.filterwarnings("ignore:Already found:UserWarning")
def test_prompts_work_on_after_lora_was_refused(vit: Tiny) -> None:
    vit.model.add_adapter(VPTConfig(num_tokens=3), "vpt")
    vit.model.eval()
    before, modules = logits(vit.model, vit.pixel_values), list(vit.model.modules())
    with pytest.raises(AdapterError):
        vit.model.add_adapter(LoraConfig(**LORA), "lora")
    assert torch.equal(logits(vit.model, vit.pixel_values), before)
    assert list(vit.model.modules()) == modules and list(vit.model.peft_config) == ["vpt"]


def test_lora_that_was_merged_and_prompts_act_together(vit: Tiny, fresh_vit: Any, tmp_path: Path) -> None:
    merged = get_peft_model(fresh_vit(), LoraConfig(**LORA)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = type(vit.model).from_pretrained(tmp_path / "merged")
    assert not torch.allclose(logits(merged, vit.pixel_values), logits(vit.model, vit.pixel_values))
    model = get_peft_model(merged, VPTConfig(num_tokens=3)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = VPTModel.from_pretrained(type(vit.model).from_pretrained(tmp_path / "merged"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, vit.pixel_values), logits(model, vit.pixel_values))
    with pytest.raises(CheckpointError, match="not the one that the adapter was trained on"):
        VPTModel.from_pretrained(fresh_vit(), tmp_path / "adapter")
