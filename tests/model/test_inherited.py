"""What a VPTModel inherits from PreTrainedModel: every public method and property answers for a model with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import Tiny, tiny_vit
from torch import nn
from transformers import PreTrainedModel

from vpt_peft import AdapterError, VPTModel
from vpt_peft.model.pretrained import UNSUPPORTED

UNSUPPORTED_NAMES = {name for names in UNSUPPORTED.values() for name in names}
# PEFT's verbs and what Trainer uses, tested where they are at home.
TESTED_ELSEWHERE = {
    "activation_checkpointing_disable", "activation_checkpointing_enable", "add_adapter", "delete_adapter",
    "from_pretrained", "gradient_checkpointing_disable", "gradient_checkpointing_enable", "load_adapter",
    "loss_function", "push_to_hub", "save_pretrained", "set_adapter",
}  # fmt: skip


def same_as_backbone(name: str) -> Callable[[VPTModel], bool]:
    """A check that an attribute, or the result of a method without arguments, is the backbone's own."""

    def check(vpt: VPTModel) -> bool:
        values = [getattr(model, name) for model in (vpt, vpt.get_base_model())]
        if callable(values[0]):
            values = [value() for value in values]
        return values[0] is values[1] or bool(values[0] == values[1])

    return check


def has_both_dtypes(vpt: VPTModel) -> bool:
    return vpt.dtype == torch.float32 and vpt.to(torch.bfloat16).dtype == torch.bfloat16


SENSIBLE: dict[str, Callable[[VPTModel], bool]] = {
    "active_adapters": lambda vpt: vpt.active_adapters == ["default"],
    "base_model": lambda vpt: vpt.base_model is vpt.get_base_model(),
    "can_generate": lambda vpt: not vpt.can_generate(),
    "device": lambda vpt: vpt.device == torch.device("cpu"),
    "disable_input_require_grads": lambda vpt: vpt.disable_input_require_grads() is None,  # type: ignore[func-returns-value]
    "dtype": has_both_dtypes,
    "dummy_inputs": lambda vpt: vpt.dummy_inputs.keys() == vpt.get_base_model().dummy_inputs.keys(),
    "enable_input_require_grads": lambda vpt: vpt.enable_input_require_grads() is None,  # type: ignore[func-returns-value]
    "get_adapter_state_dict": lambda vpt: "prompts.0" in vpt.get_adapter_state_dict(),
    "get_correct_attn_implementation": lambda vpt: vpt.get_correct_attn_implementation("eager") == "eager",
    "get_expanded_tied_weights_keys": lambda vpt: vpt.get_expanded_tied_weights_keys() == {},
    "get_memory_footprint": lambda vpt: (
        vpt.get_memory_footprint()
        == vpt.get_base_model().get_memory_footprint() + sum(p.nbytes for p in vpt.adapters.parameters())
    ),
    "get_parameter_or_buffer": lambda vpt: (
        vpt.get_parameter_or_buffer("adapters.default.prompts.0") is vpt.adapters.default.prompts[0]
    ),
    "is_activation_checkpointing": lambda vpt: not vpt.is_activation_checkpointing,
    "is_backend_compatible": lambda vpt: not vpt.is_backend_compatible(),
    "is_custom_code": lambda vpt: vpt.is_custom_code(),  # defined outside of transformers
    "is_gradient_checkpointing": lambda vpt: not vpt.is_gradient_checkpointing,
    "is_remote_code": lambda vpt: not vpt.is_remote_code(),
    "named_non_persistent_buffers": lambda vpt: list(vpt.named_non_persistent_buffers()) == [],
    "num_parameters": lambda vpt: vpt.num_parameters() == vpt.get_nb_trainable_parameters()[1],
    "set_attn_implementation": lambda vpt: (
        vpt.set_attn_implementation("eager") is None and vpt.get_base_model().config._attn_implementation == "eager"
    ),
    "supports_context_parallel": lambda vpt: not vpt.supports_context_parallel,
    "supports_pp_plan": lambda vpt: not vpt.supports_pp_plan,
    "supports_tp_plan": lambda vpt: not vpt.supports_tp_plan,
    **{
        name: same_as_backbone(name)
        for name in (
            "can_record_outputs", "ep_plan", "fsdp_plan", "fsdp_size", "get_decoder", "get_encoder",
            "get_input_embeddings", "get_output_embeddings", "is_distributed_loading_by_transformers", "pp_plan",
            "supports_gradient_checkpointing", "tie_weights", "tp_plan", "tp_size", "use_kernels",
        )
    },
}  # fmt: skip


def inherited() -> list[str]:
    """Public methods and properties of PreTrainedModel that are not those of every module."""
    return [
        name
        for name in dir(PreTrainedModel)
        if not name.startswith("_") and not hasattr(nn.Module, name)
        if callable(value := inspect.getattr_static(PreTrainedModel, name)) or hasattr(value, "__get__")
        if not isinstance(value, type)
    ]  # fmt: skip


@pytest.mark.parametrize("name", inherited())
def test_an_inherited_method_or_property_answers_for_a_model_with_adapters(name: str, vit: Tiny) -> None:
    vpt = vit.prompted()
    if name in UNSUPPORTED_NAMES:
        advice = next(advice for advice, names in UNSUPPORTED.items() if name in names)
        with pytest.raises(AdapterError) as error:
            getattr(vpt, name)()
        assert str(error.value) == f"{name}() does not apply to a VPTModel. {advice}"
    elif name not in TESTED_ELSEWHERE:
        assert SENSIBLE[name](vpt)


def test_the_tables_name_no_method_twice() -> None:
    assert not UNSUPPORTED_NAMES & (SENSIBLE.keys() | TESTED_ELSEWHERE) and not SENSIBLE.keys() & TESTED_ELSEWHERE


def test_setting_the_attention_of_the_model_changes_the_backbones(vit: Tiny) -> None:
    before: Any = vit.prompted()(vit.pixel_values).logits
    vpt = tiny_vit().prompted()
    vpt.set_attn_implementation("eager")
    torch.testing.assert_close(vpt(vit.pixel_values).logits, before, atol=1e-5, rtol=0)
