"""Fused attention to prompts gives the output and gradients of the formula, and keeps no copies of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.models import BUILDERS, Tiny, assert_same, saved_bytes, step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import BaseTorchFunctionMode

from vpt_peft import PromptConfig
from vpt_peft.injection import fused
from vpt_peft.injection.fused import fused_attention, is_fused, share, unshare
from vpt_peft.injection.prefix_attention import FEW_KEYS, prefix_attention, sdpa

IMAGES, HEADS, TOKENS, DIM = 3, 2, 7, 4
MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "none": lambda rows: None,
    "bias": lambda rows: torch.randn(rows, HEADS, TOKENS, TOKENS, dtype=torch.float64),
    "bias of all images": lambda rows: torch.randn(1, HEADS, TOKENS, TOKENS, dtype=torch.float64),
    "boolean": lambda rows: torch.rand(rows, 1, TOKENS, TOKENS) < 0.7,
    "nothing visible": lambda rows: torch.rand(rows, 1, TOKENS, TOKENS) < 0.2,
    "nothing visible, as a bias": lambda rows: torch.where(torch.rand(rows, 1, TOKENS, TOKENS) < 0.2, 0.5, -torch.inf),
}


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A leaf whose heads lie behind the tokens, as linear layers write them."""
    rows, heads, tokens, dim = shape
    return torch.randn(rows, tokens, heads, dim).to(dtype).transpose(1, 2).requires_grad_()


def inputs(windows: int, prompts: int, groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    image = [rand(IMAGES * windows, HEADS, TOKENS, DIM, dtype=dtype) for _ in range(3)]
    return image + [rand(groups, HEADS, prompts, DIM, dtype=dtype) for _ in range(2)]


def attend(leaves: list[Tensor], mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    query, key, value, prompt_key, prompt_value = leaves
    return fused_attention(query, key, value, prompt_key, prompt_value, mask, scale, IMAGES)


def written_out(leaves: list[Tensor], mask: Tensor | None = None, scale: float = DIM**-0.5) -> Tensor:
    """The softmax over all keys, step by step."""
    query, key, value, prompt_key, prompt_value = leaves
    copies = len(key) // len(prompt_key)
    keys, values = (
        torch.cat([image, prompts.repeat_interleave(copies, 0)], 2)
        for image, prompts in ((key, prompt_key), (value, prompt_value))
    )
    scores = query @ keys.transpose(2, 3) * scale
    if mask is not None:
        bias = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        scores = scores + torch.nn.functional.pad(bias.to(scores.dtype), (0, prompt_key.shape[2]))
    return scores.softmax(-1) @ values


@pytest.fixture
def filled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether hidden keys fill the last register of a row, which pays for many queries only."""
    if request.param:
        monkeypatch.setattr(fused, "MANY_SCORES", 0)
    return bool(request.param)


@pytest.mark.parametrize("filled", [False, True], indirect=True)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("prompts", [1, 5, 20])
@pytest.mark.parametrize(("windows", "groups"), [(1, 1), (1, IMAGES), (4, 1), (4, IMAGES)])
def test_output_and_gradients_are_those_of_one_softmax_over_all_keys(
    windows: int, groups: int, prompts: int, mask: Callable[[int], Tensor | None], filled: bool
) -> None:
    torch.manual_seed(0)
    total = prompts if windows > 1 or prompts > TOKENS else TOKENS + prompts
    assert bool(fused.count_missing(torch.empty(IMAGES * windows, HEADS, TOKENS, DIM), total)) == (filled and total > 2)
    leaves, own_mask = inputs(windows, prompts, groups), mask(IMAGES * windows)
    assert is_fused(leaves[0], leaves[1], leaves[2], own_mask)
    ours = attend(leaves, own_mask, 0.7)
    theirs = written_out(leaves, own_mask, 0.7)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weights = torch.randn(ours.transpose(1, 2).shape, dtype=torch.float64).transpose(1, 2)
    for own, other in zip(
        torch.autograd.grad(ours, leaves, weights), torch.autograd.grad(theirs, leaves, weights), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)
        assert other.abs().max() > 1e-3


@pytest.mark.parametrize("prompts", [2, 20])
@pytest.mark.parametrize("trained", [[3, 4], [0, 3, 4], [3], [1, 2]])
def test_gradients_of_some_inputs_alone(prompts: int, trained: list[int]) -> None:
    """In the first layer, the image needs none."""
    torch.manual_seed(0)
    leaves = inputs(1, prompts, 1)
    ours = [leaf.detach().requires_grad_(index in trained) for index, leaf in enumerate(leaves)]
    output = attend(ours)
    output.square().sum().backward()
    written_out(leaves).square().sum().backward()
    for index, (own, other) in enumerate(zip(ours, leaves, strict=True)):
        if index in trained:
            torch.testing.assert_close(own.grad, other.grad, atol=1e-12, rtol=0)
        else:
            assert own.grad is None


@pytest.mark.parametrize("prompts", [2, 20])
@pytest.mark.parametrize("trained", [[3, 4], [0, 3, 4]])
def test_keys_and_values_of_an_image_that_needs_no_gradients_are_not_kept(trained: list[int], prompts: int) -> None:
    leaves = [leaf.detach().requires_grad_(index in trained) for index, leaf in enumerate(inputs(1, prompts, 1))]
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(leaves)
    of_image = [leaf.untyped_storage().data_ptr() in kept for leaf in leaves[:3]]
    assert of_image == [True, 0 in trained, 0 in trained]


@pytest.mark.parametrize("prompts", [2, 20])
def test_a_second_derivative_is_refused(prompts: int) -> None:
    leaves = inputs(1, prompts, 1)
    output = attend(leaves)
    (first,) = torch.autograd.grad(output.square().sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("filled", [False, True], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prompts", [2, 20])
def test_half_precision(prompts: int, dtype: torch.dtype, filled: bool) -> None:
    torch.manual_seed(0)
    leaves = inputs(4, prompts, 1, dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    ours = attend(leaves, None, 0.5)
    theirs = written_out(exact, None, 0.5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, atol=0.03, rtol=0)
    weights = torch.randn(ours.shape)
    found = torch.autograd.grad(ours, leaves, weights.to(dtype))
    for own, other in zip(found, torch.autograd.grad(theirs, exact, weights.double()), strict=True):
        assert (own.double() - other).norm() < 0.02 * other.norm()


def test_what_the_kernel_does_not_take_is_left_to_pytorch() -> None:
    query = torch.randn(2, HEADS, TOKENS, DIM)
    assert is_fused(query, query, query)
    for other in (query[:, :1], query.double(), query.transpose(2, 3).contiguous().transpose(2, 3), query[..., :3]):
        assert not is_fused(query, query, other) or not is_fused(query, other, other)
    bias = torch.zeros(1, 1, TOKENS, TOKENS)
    assert is_fused(query, query, query, bias)
    assert not is_fused(query, query, query, bias.requires_grad_())
    assert not is_fused(query, query, query, object())
    with sdpa_kernel(SDPBackend.MATH):
        assert not is_fused(query, query, query)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fused(query, query, query)
        assert is_fused(*[query.bfloat16()] * 3)
    with BaseTorchFunctionMode():
        assert not is_fused(query, query, query)
    for nothing in (query[:0], query[:, :, :0]):  # the kernel would end the process
        assert not is_fused(nothing, nothing, nothing)


def test_prompts_may_lie_in_memory_in_any_way() -> None:
    leaves = inputs(1, 20, 1)
    turned = [leaf.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for leaf in leaves[3:]]
    ours, theirs = attend(leaves[:3] + turned), written_out(leaves)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    found = torch.autograd.grad(ours.square().sum(), turned)
    for own, other in zip(found, torch.autograd.grad(theirs.square().sum(), leaves[3:]), strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


def test_shared_queries_are_no_copy_of_those_of_a_linear_layer() -> None:
    output = torch.randn(IMAGES * 4, TOKENS, HEADS * DIM)
    query = output.view(*output.shape[:2], HEADS, DIM).transpose(1, 2)
    for groups in (1, IMAGES):
        shared = share(query, groups)
        assert shared.shape == (groups, HEADS, len(query) // groups * TOKENS, DIM)
        assert shared.data_ptr() == query.data_ptr()
        assert torch.equal(unshare(shared, query), query)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that were taken."""
    taken: list[str] = []
    real = fused.FusedAttention.apply

    def apply(apart: bool, *args: Any) -> Any:
        taken.append("apart" if apart else "joined")
        return real(apart, *args)

    monkeypatch.setattr(fused.FusedAttention, "apply", apply)
    return taken


@pytest.mark.parametrize("num_tokens", [2, 30])
def test_a_model_gives_the_logits_and_gradients_of_plain_attention(
    tiny: Tiny, num_tokens: int, calls: list[str]
) -> None:
    tiny.model.double()
    vpt = tiny.prompted(num_tokens)
    vpt.double().train()
    logits, ours = step(vpt, tiny)
    assert calls == ["apart" if num_tokens == 30 or tiny.name == "swin" else "joined"] * 4
    with sdpa_kernel(SDPBackend.MATH):
        expected, theirs = step(vpt, tiny)
    assert len(calls) == 4
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    assert_same(ours, theirs, 1e-12)
    assert max(gradient.abs().max() for name, gradient in ours.items() if "prompts" in name) > 1e-4


@pytest.mark.parametrize("config", [{}, {"num_tokens": 30}, {"kind": "prefix"}, {"deep": False}], ids=str)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's own kernel, which has no batches
def test_gradients_of_each_image_by_the_transforms_of_torch(tiny: Tiny, config: dict[str, Any]) -> None:
    tiny.model.double()
    vpt = tiny.prompted(**config).double()
    images, trained = tiny.pixel_values.double(), {name: p for name, p in vpt.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
        output = torch.func.functional_call(vpt, values, (image.unsqueeze(0),))
        return output.logits.square().sum()

    values = {name: parameter.detach() for name, parameter in trained.items()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, images)
    for number, image in enumerate(images):
        own = torch.func.grad(loss)(values, image)
        theirs = torch.autograd.grad(vpt(image.unsqueeze(0)).logits.square().sum(), list(trained.values()))
        for name, other in zip(trained, theirs, strict=True):
            torch.testing.assert_close(own[name], other, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(found[name][number], other, atol=1e-10, rtol=1e-10)


def test_images_of_many_tasks_and_with_dropout_of_prompts(tiny: Tiny, calls: list[str]) -> None:
    tiny.model.double()
    vpt = tiny.prompted(5, dropout=0.5)
    vpt.add_adapter("as long", PromptConfig(num_tokens=5))
    vpt.add_adapter("longer", PromptConfig(num_tokens=9))
    vpt.double().eval()
    for names, number in ((["default", "as long"] * 2, 4), (["default", "longer"] * 2, 0)):
        calls.clear()
        ours = vpt(tiny.pixel_values.double(), adapter_names=names).logits
        assert len(calls) == number
        with sdpa_kernel(SDPBackend.MATH):
            theirs = vpt(tiny.pixel_values.double(), adapter_names=names).logits
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    vpt.train()
    torch.manual_seed(0)
    logits, ours = step(vpt, tiny)
    torch.manual_seed(0)
    with sdpa_kernel(SDPBackend.MATH):
        expected, theirs = step(vpt, tiny)
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    assert_same(ours, theirs, 1e-12)


def test_dropout_of_the_attention_and_other_implementations_are_as_they_were(tiny: Tiny, calls: list[str]) -> None:
    vpt = tiny.prompted(5).train()
    vpt(tiny.pixel_values)
    assert calls
    calls.clear()
    for layer in vpt.backbone.layers:
        attention = layer.part("attention")
        for name in ("dropout_prob", "attention_dropout"):
            if hasattr(attention, name):
                setattr(attention, name, 0.5)
        attention.training = True
    results = [vpt(tiny.pixel_values).logits for _ in range(2)]
    assert not calls and not torch.equal(*results)
    vpt.train()
    vpt.set_attn_implementation("eager")
    vpt(tiny.pixel_values)
    assert not calls


@pytest.mark.parametrize("kind", ["token", "prefix"])
def test_saved_bytes_do_not_grow_with_copies_of_the_prompts(tiny: Tiny, kind: str) -> None:
    """What grows is kept once for all images and windows: about as much as the prompts, times two or three."""
    lengths, saved = (20, 120), []
    for length in lengths:
        other = BUILDERS[tiny.name]()
        vpt = other.prompted(length, kind=kind).train()
        saved.append(saved_bytes(vpt, partial(vpt, other.pixel_values, labels=other.labels)))
    widths = [layer.width for layer in tiny.prompted(1).backbone.layers]
    grown, of_prompts = saved[1] - saved[0], 4 * (lengths[1] - lengths[0]) * sum(widths)
    assert of_prompts < grown < 3.5 * of_prompts, f"{saved} bytes with {lengths} prompts"


@pytest.mark.parametrize("filled", [False, True], indirect=True)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("length", [FEW_KEYS, FEW_KEYS + 1, FEW_KEYS + 5])
def test_every_way_to_attend_to_a_prefix_gives_the_same_output_and_gradients(
    length: int, padded: bool, filled: bool
) -> None:
    """The first way is that of a GPU."""
    torch.manual_seed(0)
    leaves = query, key, value = [rand(IMAGES, HEADS, number, DIM) for number in (TOKENS, length, length)]
    valid_mask = torch.ones(IMAGES, length, dtype=torch.bool)
    valid_mask[1, 3:] = False
    mask = valid_mask if padded else None
    weights = torch.randn(IMAGES, HEADS, TOKENS, DIM, dtype=torch.float64)
    results = []
    for way in (sdpa, prefix_attention):
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            with sdpa_kernel(backend):
                output = way(query, key, value, mask)
                results.append((output, *torch.autograd.grad(output, leaves, weights)))
    for result in results[1:]:
        for own, other in zip(result, results[0], strict=True):
            torch.testing.assert_close(own, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [FEW_KEYS, FEW_KEYS + 1])
def test_queries_in_float32_attend_to_a_prefix_under_autocast(length: int) -> None:
    """Rotary embeddings make float32 of them. The backward pass runs outside of autocast."""
    torch.manual_seed(0)
    leaves = query, key, value = [
        rand(IMAGES, HEADS, number, DIM, dtype=torch.float32) for number in (TOKENS, length, length)
    ]
    weights = torch.randn(IMAGES, HEADS, TOKENS, DIM)
    expected = prefix_attention(query, key, value, None)
    with torch.autocast("cpu", torch.bfloat16):
        output = prefix_attention(query, key, value, None)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0)
    found = torch.autograd.grad((output.float() * weights).sum(), leaves)
    for own, other in zip(found, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert (own - other).norm() < 0.03 * other.norm()
