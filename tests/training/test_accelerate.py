"""A hand-written loop with accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, load_checkpoint_in_model
from accelerate.state import AcceleratorState
from helpers.models import Tiny, assert_same, tiny_vit
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from vpt_peft import VPTModel, adamw, get_adapter_state_dict


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def prepare(tiny: Tiny, **config: Any) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(cpu=True, **config)
    vpt = tiny.prompted().train()
    optimizer_class, groups = adamw(vpt)
    batches = DataLoader(list(zip(tiny.pixel_values, tiny.labels, strict=True)), batch_size=2)  # type: ignore[arg-type]
    return accelerator, *accelerator.prepare(vpt, optimizer_class(**groups), batches)


def train(accelerator: Accelerator, model: Any, optimizer: Any, batches: Any) -> None:
    for images, labels in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(images, labels=labels).loss)
            optimizer.step()
            optimizer.zero_grad()


def state(model: VPTModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in get_adapter_state_dict(model).items()}


def test_a_saved_state_holds_the_adapter_and_training_goes_on_bit_for_bit(tiny: Tiny, new: Any, tmp_path: Path) -> None:
    accelerator, model, optimizer, batches = prepare(tiny)
    train(accelerator, model, optimizer, batches)
    accelerator.save_state(str(tmp_path))
    assert all(name.startswith("adapters.default.") for name in load_file(tmp_path / "model.safetensors"))
    train(accelerator, model, optimizer, batches)
    expected = state(accelerator.unwrap_model(model))

    AcceleratorState._reset_state(True)
    accelerator, model, optimizer, batches = prepare(new())
    accelerator.load_state(str(tmp_path))
    train(accelerator, model, optimizer, batches)
    assert_same(state(accelerator.unwrap_model(model)), expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_unwrapped_model_is_saved_as_scripts_do_it(tiny: Tiny, new: Any, precision: str, tmp_path: Path) -> None:
    accelerator, model, optimizer, batches = prepare(tiny, mixed_precision=precision, gradient_accumulation_steps=2)
    train(accelerator, model, optimizer, batches)
    unwrapped = accelerator.unwrap_model(model)
    assert isinstance(unwrapped, VPTModel)
    unwrapped.save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert_same(state(VPTModel.from_pretrained(new().model, tmp_path)), state(unwrapped))


@pytest.mark.heavy
def test_a_compiled_model_is_saved_likewise(vit: Tiny, tmp_path: Path) -> None:
    accelerator, model, optimizer, batches = prepare(vit, dynamo_backend="eager")
    train(accelerator, model, optimizer, batches)
    given = accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    assert all(name.startswith("_orig_mod.") for name in given) and isinstance(unwrapped, VPTModel)
    unwrapped.save_pretrained(tmp_path, state_dict=given)
    assert_same(state(VPTModel.from_pretrained(tiny_vit().model, tmp_path)), state(unwrapped))
    accelerator.save_state(str(tmp_path / "state"))
    unwrapped.save_pretrained(tmp_path / "state")  # which holds no model
    other = tiny_vit().prompted()
    other.load_state_dict(given)
    assert_same(state(other), state(unwrapped))


def test_what_accelerate_saves_of_a_model_comes_back(tiny: Tiny, new: Any, tmp_path: Path) -> None:
    accelerator, model, optimizer, batches = prepare(tiny)
    train(accelerator, model, optimizer, batches)
    accelerator.save_model(model, str(tmp_path))
    other = new().prompted()
    load_checkpoint_in_model(other, str(tmp_path))
    assert_same(state(other), state(accelerator.unwrap_model(model)))
    other.save_pretrained(tmp_path)  # that folder holds no model: it may become an adapter's
    assert_same(state(VPTModel.from_pretrained(new().model, tmp_path)), state(other))


def test_a_process_that_is_not_the_main_one_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    tiny.prompted().save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_a_state_dict_that_lacks_tensors_is_refused_and_nothing_is_written(tiny: Tiny, tmp_path: Path) -> None:
    vpt = tiny.prompted()
    given = vpt.state_dict()
    del given["adapters.default.prompts.0"]
    with pytest.raises(ValueError, match=r"lacks adapters\.default\.prompts\.0"):
        vpt.save_pretrained(tmp_path / "x", state_dict=given)
    assert not (tmp_path / "x").exists()


def test_outputs_are_in_float32_under_mixed_precision(vit: Tiny) -> None:
    model = prepare(vit, mixed_precision="bf16")[1]
    assert model(vit.pixel_values).logits.dtype == torch.float32, "accelerate's promise"
