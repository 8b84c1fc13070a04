"""serving(): keys and values of prompts are kept between calls, and no result differs from one without it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Tiny, logits, tiny_vit
from torch import Tensor, nn
from torch._dynamo.utils import counters

from vpt_peft import PromptConfig, VPTModel, get_adapter_state_dict, set_adapter_state_dict

NUM_TOKENS = 5  # of `tiny.prompted()`
Change = Callable[[VPTModel, Tiny, Path], Any]


def answers(tiny: Tiny, serving: bool, change: Change, folder: Path, **config: Any) -> tuple[Tensor, Tensor]:
    """Logits of the same model before and after a change, inside ``serving()`` or without it."""
    vpt = tiny.prompted(**config)
    vpt.save_pretrained(folder)
    with torch.no_grad():
        prompts(vpt).add_(0.3)
    with vpt.serving() if serving else nullcontext():
        before = logits(vpt, tiny.pixel_values)
        change(vpt, tiny, folder)
        return before, logits(vpt, tiny.pixel_values)


def assert_no_difference(tiny: Tiny, new: Callable[[], Tiny], change: Change, folder: Path, **config: Any) -> None:
    """The answers inside ``serving()`` are those without it, and the change is large enough to be seen in them."""
    served = answers(tiny, True, change, folder, **config)
    expected = answers(new(), False, change, folder, **config)
    assert not torch.equal(*expected)
    for ours, theirs in zip(served, expected, strict=True):
        assert torch.equal(ours, theirs)


def train(vpt: VPTModel, tiny: Tiny, names: str = "", optimizer: Any = torch.optim.SGD, **options: Any) -> None:
    """One step in eval mode on the adapter's parameters with ``names`` in their name."""
    parameters = [one for name, one in vpt.adapters["default"].named_parameters() if names in name]
    vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
    optimizer(parameters, lr=0.5, **options).step()


def prompts(vpt: VPTModel) -> nn.Parameter:
    return vpt.get_parameter("adapters.default.prompts.0")


def k_proj(vpt: VPTModel) -> nn.Linear:
    return vpt.backbone.layers[0].part("k_proj")  # type: ignore[no-any-return]


def changed(vpt: VPTModel) -> Tensor:
    """Other values for the prompts of layer 0; doubling them would change nothing, since they are normalised."""
    return prompts(vpt).detach().cumsum(-1)


def copy_in_inference_mode(vpt: VPTModel, *_: Any) -> None:
    with torch.inference_mode():
        prompts(vpt).copy_(changed(vpt))


def load_in_inference_mode(vpt: VPTModel, tiny: Tiny, folder: Path) -> None:
    with torch.inference_mode():
        vpt.load_adapter(folder, "default")


def set_in_inference_mode(vpt: VPTModel, *_: Any) -> None:
    with torch.inference_mode():
        set_adapter_state_dict(vpt, {**get_adapter_state_dict(vpt), "prompts.0": changed(vpt)})


ADAPTER_CHANGES: dict[str, Change] = {
    "fused_adamw": lambda vpt, tiny, _: train(vpt, tiny, "prompts", torch.optim.AdamW, fused=True),
    "data_copy": lambda vpt, *_: prompts(vpt).data.copy_(changed(vpt)),
    "data_swap": lambda vpt, *_: setattr(prompts(vpt), "data", changed(vpt)),
    "inference_mode": copy_in_inference_mode,
    "load_adapter_in_inference_mode": load_in_inference_mode,
    "set_adapter_state_dict_in_inference_mode": set_in_inference_mode,
}


@pytest.mark.parametrize("change", ADAPTER_CHANGES.values(), ids=ADAPTER_CHANGES)
def test_serving_notices_changes_of_prompts_that_do_not_raise_their_version(
    vit: Tiny, change: Change, tmp_path: Path
) -> None:
    assert_no_difference(vit, tiny_vit, change, tmp_path)


def test_serving_notices_changes_of_the_projection(tiny: Tiny, new: Callable[[], Tiny], tmp_path: Path) -> None:
    def change(vpt: VPTModel, *_: Any) -> None:
        for parameter in vpt.adapters["default"].projection.parameters():
            parameter.data.add_(0.5)

    assert_no_difference(tiny, new, change, tmp_path, projection_dim=6)


def add_to(part: str, name: str) -> Change:
    @torch.no_grad()
    def change(vpt: VPTModel, *_: Any) -> None:
        getattr(vpt.backbone.layers[0].part(part), name).add_(0.5)

    return change


def replace_k_proj(vpt: VPTModel, *_: Any) -> None:
    torch.manual_seed(3)
    vpt.backbone.layers[0].part("attention").k_proj = nn.Linear(24, 24)


def swap_data(vpt: VPTModel, *_: Any) -> None:
    k_proj(vpt).weight.data = k_proj(vpt).weight.data * 2


BACKBONE_CHANGES: dict[str, Change] = {
    "norm_weight": add_to("norm", "weight"),
    "norm_bias": add_to("norm", "bias"),
    "q_proj": add_to("q_proj", "weight"),
    "k_proj": add_to("k_proj", "weight"),
    "v_proj": add_to("v_proj", "weight"),
    "v_proj_bias": add_to("v_proj", "bias"),
    "another_module": replace_k_proj,
    "another_tensor": swap_data,
}


@pytest.mark.parametrize("route", ["auto", "tokens"])
@pytest.mark.parametrize("change", BACKBONE_CHANGES.values(), ids=BACKBONE_CHANGES)
def test_serving_notices_changes_of_the_backbones_weights(
    vit: Tiny, change: Change, route: str, tmp_path: Path
) -> None:
    assert_no_difference(vit, tiny_vit, change, tmp_path, route=route)


def test_serving_notices_a_weight_at_the_address_of_a_freed_one(vit: Tiny, tmp_path: Path) -> None:
    """The allocator gives the memory of a freed tensor to the next one of its size."""
    vpt, bare = vit.prompted(), tiny_vit().prompted()
    weight = k_proj(vpt).weight
    with vpt.serving():
        for factor in range(1, 6):
            logits(vpt, vit.pixel_values)
            for scale in (7.0, factor):  # the second may be at the address of the one that was used
                weight.data = k_proj(bare).weight.data * scale
            served = logits(vpt, vit.pixel_values)
            other = tiny_vit().prompted()
            k_proj(other).weight.data *= factor
            assert torch.equal(served, logits(other, vit.pixel_values)), factor


class Wrapper(Tensor):
    """A tensor that holds another one and has no memory of its own, as quantised weights."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        wrapper: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one.inner if isinstance(one, Wrapper) else one for one in args]
        result = function(*given, **(kwargs or {}))
        return Wrapper(result) if function is torch.ops.aten.detach.default else result


def test_serving_notices_that_a_weight_without_memory_of_its_own_is_replaced(vit: Tiny) -> None:
    def wrap(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(Wrapper(weight.detach()), requires_grad=False)

    projection = vit.model.vit.layers[0].attention.k_proj
    weight, other = projection.weight, 2 * projection.weight
    projection.weight = wrap(weight)
    assert projection.weight.data_ptr() == wrap(other).data_ptr() == 0
    vpt = vit.prompted()
    with vpt.serving():
        logits(vpt, vit.pixel_values)
        projection.weight = wrap(other)
        served = logits(vpt, vit.pixel_values)
    assert torch.equal(served, logits(vpt, vit.pixel_values))


def test_serving_notices_changes_of_weights_that_have_no_version(tiny: Tiny, new: Callable[[], Tiny]) -> None:
    logits(tiny.model, tiny.pixel_values)  # transformers keeps the indices of BEiT from here on, for all tests
    with torch.inference_mode():
        inference = new()
        vpt = inference.prompted()
        weight = k_proj(vpt).weight
        assert weight.is_inference()
        with vpt.serving():
            logits(vpt, tiny.pixel_values)
            weight.mul_(2)
            served = logits(vpt, tiny.pixel_values)
        assert torch.equal(served, logits(vpt, tiny.pixel_values))


OWNERS: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"bias": "all"}, "bias."),
    "norms": ({"modules_to_save": ["layernorm_before"]}, "modules_to_save."),
    "projections": ({"modules_to_save": ["k_proj", "v_proj"]}, "modules_to_save."),
}


@pytest.mark.parametrize(("config", "names"), OWNERS.values(), ids=OWNERS)
def test_serving_notices_training_of_an_adapters_own_copies_of_the_backbone(
    tiny: Tiny, new: Callable[[], Tiny], config: dict[str, Any], names: str, tmp_path: Path
) -> None:
    """Its prompts and the backbone's weights stay as they are."""
    assert_no_difference(tiny, new, lambda vpt, tiny, _: train(vpt, tiny, names), tmp_path, **config)


def test_serving_changes_nothing_of_gradients_in_eval_mode(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    parameters = [parameter for parameter in vpt.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(vpt(tiny.pixel_values, labels=tiny.labels).loss, parameters)
    with vpt.serving():
        logits(vpt, tiny.pixel_values)  # without gradients, so keys and values are kept
        ours = torch.autograd.grad(vpt(tiny.pixel_values, labels=tiny.labels).loss, parameters)
    for our_gradient, gradient in zip(ours, expected, strict=True):
        assert torch.equal(our_gradient, gradient)


def count_projections(vpt: VPTModel) -> list[weakref.ref[Tensor]]:
    """A list that grows by a reference to the prompts' keys each time that the last layer computes them."""
    computed: list[weakref.ref[Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args[0].shape[1] == NUM_TOKENS:
            computed.append(weakref.ref(output))

    vpt.backbone.layers[-1].part("k_proj").register_forward_hook(note)
    return computed


def alive(references: list[weakref.ref[Tensor]]) -> int:
    return sum(reference() is not None for reference in references)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_serving_keeps_nothing_in_train_mode(tiny: Tiny, dropout: float) -> None:
    vpt = tiny.prompted(dropout=dropout).train()
    torch.manual_seed(2)
    expected = [logits(vpt, tiny.pixel_values) for _ in range(2)]
    assert torch.equal(*expected) == (dropout == 0)
    computed = count_projections(vpt)
    with vpt.serving():
        torch.manual_seed(2)
        for theirs in expected:
            assert torch.equal(logits(vpt, tiny.pixel_values), theirs)
        assert len(computed) == 2 and alive(computed) == 0
        vpt.eval()
        for _ in range(2):
            logits(vpt, tiny.pixel_values)
        assert len(computed) == 3 and alive(computed) == 1
    assert alive(computed) == 0


@pytest.mark.parametrize("first", [False, True], ids=["plain_first", "autocast_first"])
def test_serving_gives_autocast_its_own_precision(tiny: Tiny, new: Callable[[], Tiny], first: bool) -> None:
    def calls(vpt: VPTModel) -> list[Tensor]:
        found = []
        for enabled in (first, not first, first):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(logits(vpt, tiny.pixel_values))
        return found

    expected = calls(new().prompted())
    vpt = tiny.prompted()
    with vpt.serving():
        served = calls(vpt)
    for ours, theirs in zip(served, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_serving_releases_what_it_kept_of_a_deleted_adapter(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=NUM_TOKENS))
    computed = count_projections(vpt)
    with vpt.serving():
        for name in ("default", "other"):
            vpt.set_adapter(name)
            logits(vpt, tiny.pixel_values)
        assert alive(computed) == 2
        vpt.delete_adapter("default")
        assert alive(computed) == 1
        logits(vpt, tiny.pixel_values)
        assert len(computed) == 2


def test_serving_answers_with_a_new_adapter_of_a_deleted_ones_name(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("birds", PromptConfig(num_tokens=NUM_TOKENS))
    vpt.set_adapter("birds")
    deleted = weakref.ref(vpt.adapters["birds"])
    with vpt.serving():
        logits(vpt, tiny.pixel_values)
        with pytest.warns(UserWarning, match="'birds' was deleted"):
            vpt.delete_adapter("birds")
        gc.collect()
        assert deleted() is None
        vpt.add_adapter("birds", PromptConfig(num_tokens=NUM_TOKENS, route="tokens"))
        vpt.set_adapter("birds")
        served = logits(vpt, tiny.pixel_values)
    assert torch.equal(served, logits(vpt, tiny.pixel_values))


def test_serving_keeps_keys_and_values_of_several_adapters_side_by_side(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=NUM_TOKENS))
    expected = {}
    for name in ("default", "other"):
        vpt.set_adapter(name)
        expected[name] = logits(vpt, tiny.pixel_values)
    computed = count_projections(vpt)
    with vpt.serving():
        for name in ("default", "other") * 2:
            vpt.set_adapter(name)
            assert torch.equal(logits(vpt, tiny.pixel_values), expected[name])
        assert len(computed) == 2


def test_a_compiled_model_inside_serving_sees_changed_prompts() -> None:
    vit = tiny_vit(num_hidden_layers=1)
    vpt = vit.prompted()
    compiled = torch.compile(vpt, fullgraph=True, backend="eager")
    counters.clear()
    with vpt.serving():
        logits(vpt, vit.pixel_values)
        for _ in range(2):
            torch.testing.assert_close(logits(compiled, vit.pixel_values), logits(vpt, vit.pixel_values))
            prompts(vpt).data.copy_(changed(vpt))
    assert counters["stats"]["unique_graphs"] == 1
