"""Copies of the model's modules that belong to an adapter: heads, and what modules_to_save names."""

from __future__ import annotations

import copy
from threading import Lock
from typing import Any

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from helpers.models import Tiny, logits
from torch import nn

from vpt_peft import PromptConfig


def with_two_layers_in_the_head(tiny: Tiny) -> nn.Sequential:
    """Replaces the classifier by one with two linear layers."""
    width, num_labels = tiny.model.classifier.in_features, tiny.model.classifier.out_features
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_labels))
    tiny.model.classifier = head
    return head


def count_calls(module: nn.Module, register: str) -> list[nn.Module]:
    """Registers a hook, and returns the list of the modules that it runs for."""
    called: list[nn.Module] = []

    def hook(module: nn.Module, *_: Any) -> None:
        called.append(module)

    getattr(module, register)(hook)
    return called


def test_a_hook_on_one_part_of_a_copied_head_runs_for_no_other(tiny: Tiny) -> None:
    with_two_layers_in_the_head(tiny)
    vpt = tiny.prompted()
    first, _, last = vpt.get_submodule("adapters.default.head.classifier")
    kinds = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    called = {(part, kind): count_calls(part, kind) for part in (first, last) for kind in kinds}
    vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
    for (part, _), modules in called.items():
        assert modules == [part]


def test_hooks_on_the_models_head_do_not_run_for_copies_of_it(tiny: Tiny) -> None:
    head = with_two_layers_in_the_head(tiny)
    called = [
        count_calls(part, kind)
        for part in (head, *head)
        for kind in ("register_forward_hook", "register_forward_pre_hook")
    ]
    vpt = tiny.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2, modules_to_save=["layernorm"]))
    logits(vpt, tiny.pixel_values)
    assert [len(modules) for modules in called] == [1, 1] + [0, 0] * 3  # the model calls its head, and gets the copy's
    vpt.unload()
    logits(tiny.model, tiny.pixel_values)
    assert [len(modules) for modules in called] == [2, 2] + [1, 1] * 3


class Uncopyable:
    """A hook, or a module's forward, that refers to what no copy can be made of."""

    def __init__(self, function: Any = None) -> None:
        self.function, self.lock = function, Lock()

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if self.function else None


def test_copies_leave_out_what_hooks_and_forwards_refer_to(tiny: Tiny) -> None:
    head = with_two_layers_in_the_head(tiny)
    head[0].register_forward_hook(Uncopyable())
    head[0].register_forward_pre_hook(Uncopyable())
    head[0].register_full_backward_hook(Uncopyable())
    head[2].forward = Uncopyable(head[2].forward)  # type: ignore[method-assign]
    expected = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(num_tokens=0)
    assert torch.equal(logits(vpt, tiny.pixel_values), expected)


def test_modules_that_share_their_hooks_have_copies_that_do_not(tiny: Tiny) -> None:
    """A shallow copy of a module has the dictionaries of the original."""
    head = with_two_layers_in_the_head(tiny)
    head[1] = copy.copy(head[0])
    vpt = tiny.prompted()
    first, second, _ = vpt.get_submodule("adapters.default.head.classifier")
    called = count_calls(first, "register_forward_hook")
    logits(vpt, tiny.pixel_values)
    assert called == [first] and first is not second


def test_a_copy_of_a_module_with_another_librarys_forward_computes_with_its_own_weights(tiny: Tiny) -> None:
    expected = logits(tiny.model, tiny.pixel_values)
    add_hook_to_module(tiny.model.classifier, ModelHook())
    vpt = tiny.prompted(num_tokens=0)
    assert torch.equal(logits(vpt, tiny.pixel_values), expected)
    with torch.no_grad():
        for parameter in vpt.adapters.parameters():
            parameter.zero_()
    assert not logits(vpt, tiny.pixel_values).any()
    with vpt.disable_adapter():
        assert torch.equal(logits(vpt, tiny.pixel_values), expected)
