"""Where attention is not our own, autograd keeps the parts of joined keys and values, through the hooks of others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from helpers.models import BUILDERS, Tiny, assert_same, gradients, saved_bytes, step
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from vpt_peft import PromptConfig, VPTModel
from vpt_peft.injection import attention
from vpt_peft.injection.joined import keep_parts

CONFIGS: dict[str, dict[str, Any]] = {"deep": {}, "shallow": {"deep": False}}


@pytest.fixture(autouse=True)
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where PyTorch's own function is called."""
    monkeypatch.setattr(attention, "is_fused", lambda *_: False)


@contextmanager
def joined_tensors_kept() -> Iterator[list[torch.Size]]:
    """Gives the shapes of the keys."""
    shapes: list[torch.Size] = []

    def keep_all(joined: Sequence[Tensor], *_: Any) -> AbstractContextManager[None]:
        shapes.append(joined[0].shape)
        return nullcontext()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "keep_parts", keep_all)
        yield shapes


def count_kept(vpt: VPTModel, tiny: Tiny) -> int:
    return saved_bytes(vpt, lambda: vpt(tiny.pixel_values, labels=tiny.labels))


def test_kept_bytes_do_not_grow_with_copies_of_the_prompts(tiny: Tiny) -> None:
    few, many = 20, 120

    def growth() -> int:
        models = [BUILDERS[tiny.name]() for _ in range(2)]
        kept = [count_kept(one.prompted(p).train(), one) for one, p in zip(models, (few, many), strict=True)]
        return kept[1] - kept[0]

    ours = growth()
    with joined_tensors_kept() as shapes:
        copied = growth()
    layers = tiny.prompted(1).backbone.layers
    rows = [shape[0] for shape in shapes[-len(layers) :]]  # images, or windows of all images
    saved = sum(2 * 4 * (many - few) * layer.width * (row - 1) for layer, row in zip(layers, rows, strict=True))
    assert copied - ours == saved > 0, f"{copied} and {ours} bytes more"
    if tiny.name == "vit":  # the others keep masks, padded for the prompts
        of_prompts = 4 * (many - few) * sum(layer.width for layer in layers)
        assert of_prompts < ours < 3.5 * of_prompts, f"{ours} bytes more"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_equal_to_the_bit(tiny: Tiny, config: dict[str, Any], implementation: str) -> None:
    vpt = tiny.prompted(5, **config).train()
    vpt.set_attn_implementation(implementation)
    logits, ours = step(vpt, tiny)
    with joined_tensors_kept():
        expected, theirs = step(vpt, tiny)
    assert torch.equal(logits, expected)
    assert_same(ours, theirs, 0)
    assert max(gradient.abs().max() for name, gradient in ours.items() if "prompts" in name) > 1e-4


def test_gradients_of_mixed_batches(tiny: Tiny) -> None:
    vpt = tiny.prompted(5)
    vpt.add_adapter("longer", PromptConfig(num_tokens=9))
    vpt.train()

    def run() -> Tensor:
        return vpt(tiny.pixel_values, adapter_names=["default", "longer"] * 2).logits.square().sum()

    parameters = [parameter for parameter in vpt.parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(run(), parameters)
    with joined_tensors_kept():
        theirs = torch.autograd.grad(run(), parameters)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=0, rtol=0)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_checkpointing_keeps_as_little_and_gives_the_same_gradients(
    tiny: Tiny, config: dict[str, Any]
) -> None:
    vpt = tiny.prompted(5, **config).train()
    _, expected = step(vpt, tiny)
    plain = count_kept(vpt, tiny)
    vpt.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = step(vpt, tiny)
    assert_same(found, expected, 1e-6)
    kept = count_kept(vpt, tiny)
    with joined_tensors_kept():
        assert kept == count_kept(vpt, tiny)
    assert kept < plain, f"{kept} and {plain} bytes"


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy)])
def test_hooks_that_are_there_already_see_all_that_is_kept(
    tiny: Tiny, hooks: Callable[[], AbstractContextManager[Any]]
) -> None:
    vpt = tiny.prompted(5).train()
    _, expected = step(vpt, tiny)
    vpt.zero_grad()
    with hooks():
        loss = vpt(tiny.pixel_values, labels=tiny.labels).loss
    loss.backward()
    assert_same(gradients(vpt), expected, 0)


def test_batches_of_images_by_vmap(tiny: Tiny) -> None:
    vpt = tiny.prompted(5).train()
    _, expected = step(vpt, tiny)
    vpt.zero_grad()
    logits = torch.func.vmap(lambda image: vpt(image.unsqueeze(0)).logits[0])(tiny.pixel_values)
    torch.nn.functional.cross_entropy(logits, tiny.labels).backward()
    assert_same(gradients(vpt), expected, 1e-6)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def join(*parts: Tensor) -> Tensor:
    return torch.cat(parts)


def test_a_change_in_place_is_an_error() -> None:
    """As it is without hooks."""
    left, right = rows(3, 4) * 2, rows(2, 4) * 2
    factor = rows(5, 4)
    joined = join(left, right)
    with keep_parts([joined], [(left, right)], join):
        product = (joined * factor).sum()
    right.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"A tensor \(2, 4\) .* was changed in place"):
        product.backward()


def test_second_derivatives_and_a_second_backward_pass() -> None:
    left, right, factor = rows(3, 4), rows(2, 4), rows(5, 4)

    def run() -> Tensor:
        joined = join(left, right)
        with keep_parts([joined], [(left, right)], join):
            return (joined.T.square() @ factor).square().sum()

    first = torch.autograd.grad(run(), [left, right, factor], create_graph=True)
    found = torch.autograd.grad(sum(part.square().sum() for part in first), [left, right, factor])
    x = torch.cat([left, right]).detach().requires_grad_()
    first = torch.autograd.grad((x.T.square() @ factor).square().sum(), [x, factor], create_graph=True)
    of_joined, of_factor = torch.autograd.grad(sum(part.square().sum() for part in first), [x, factor])
    for own, other in zip(found, [of_joined[:3], of_joined[3:], of_factor], strict=True):
        torch.testing.assert_close(own, other, atol=1e-3, rtol=1e-5)
    loss = run()
    loss.backward(retain_graph=True)
    once = left.grad.clone() if left.grad is not None else None
    loss.backward()
    assert once is not None and left.grad is not None
    torch.testing.assert_close(left.grad, 2 * once)
