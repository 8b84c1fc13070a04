"""What trains is saved, and nothing is ignored without an error."""

from __future__ import annotations

import asyncio
import copy
import io
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from helpers.invariants import assert_unchanged, snapshot, train_a_little
from helpers.models import Tiny, logits, tiny_swin, tiny_vit
from torch import nn

from vpt_peft import (
    AdapterError,
    PromptConfig,
    RouteError,
    UnsupportedModelError,
    get_adapter_state_dict,
    get_vpt_model,
)
from vpt_peft.injection import has_overrides

TESTS = Path(__file__).resolve().parents[1]

# -- what trains is saved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [{}, {"state_dict": None}], ids=["saved", "checkpoint"])
def test_saving_refuses_what_was_trained_outside_of_the_adapter(vit: Tiny, tmp_path: Path, arguments: Any) -> None:
    vpt = vit.prompted().train()
    for parameter in vpt.base_model.vit.layers[-1].parameters():
        parameter.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"vit\.layers\.3\.\S+, .* requires a gradient.*modules_to_save"):
        vpt.save_pretrained(tmp_path / "untrained", **arguments)
    train_a_little(vpt, vit)
    with pytest.raises(AdapterError, match=r"vit\.layers\.3\..* changed\. .*modules_to_save.*Nothing was saved"):
        vpt.save_pretrained(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_saving_refuses_a_backbone_that_was_trained_and_frozen_again(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    with torch.no_grad():
        vpt.base_model.vit.layers[1].mlp.fc2.weight.mul_(1.1)
    with pytest.raises(AdapterError, match=r"vit\.layers\.1\.mlp\.fc2\.weight.* changed"):
        vpt.save_pretrained(tmp_path / "x")


def test_saving_warns_of_lora_that_was_added_to_the_backbone_later(vit: Tiny, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    vpt = vit.prompted()
    vpt.base_model.add_adapter(peft.LoraConfig(r=2, target_modules=["fc1"]))
    with pytest.warns(UserWarning, match="lora_A.* requires a gradient"):
        vpt.save_pretrained(tmp_path / "x")


@pytest.mark.parametrize(
    ("path", "config"),
    [
        ("classifier", {}),
        ("vit.layernorm", {"modules_to_save": ["vit.layernorm"]}),
        ("vit.layers.2.mlp.fc1", {"bias": "all"}),
        ("vit.layers.2.mlp", {"bias": "all"}),
        ("vit.layers.1", {}),
        ("vit.layers.1.attention", {}),
    ],
)
def test_a_forward_pass_notices_that_a_module_was_replaced(vit: Tiny, path: str, config: dict[str, Any]) -> None:
    vpt = vit.prompted(**config)
    parent, _, name = path.rpartition(".")
    module = vit.model.get_submodule(path)
    setattr(vit.model.get_submodule(parent), name, copy.deepcopy(module))
    with pytest.raises(RouteError, match=f"The module '{name}' of .* was replaced after the adapter was attached"):
        vpt(vit.pixel_values)
    setattr(vit.model.get_submodule(parent), name, module)
    vpt(vit.pixel_values)


def test_a_module_inside_of_a_wrapper_goes_on_working(vit: Tiny) -> None:
    vpt = vit.prompted()
    before = logits(vpt, vit.pixel_values)
    vit.model.vit.layers[1] = torch.compile(vit.model.vit.layers[1], backend="eager")
    torch.testing.assert_close(logits(vpt, vit.pixel_values), before, atol=1e-6, rtol=0)


def test_what_belongs_to_the_backbone_cannot_be_set_on_the_model(vit: Tiny) -> None:
    vpt = vit.prompted()
    for name, value in (("classifier", nn.Linear(24, 3)), ("vit", None), ("num_labels", 3), ("other", nn.Linear(2, 2))):
        with pytest.raises(AdapterError, match=f"'{name}' cannot be set on a VPTModel"):
            setattr(vpt, name, value)
    vpt.note = "anything else may be"


def test_requires_grad_reaches_the_active_adapter_only(vit: Tiny) -> None:
    vpt = vit.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    assert vpt.requires_grad_(False) is vpt and not any(p.requires_grad for p in vpt.parameters())
    vpt.requires_grad_(True)
    trained = {name for name, parameter in vpt.named_parameters() if parameter.requires_grad}
    assert trained == {f"adapters.default.{name}" for name in get_adapter_state_dict(vpt)}


# -- attaching and detaching ----------------------------------------------------------------------------------------


def test_an_attention_without_a_config_is_refused_and_leaves_nothing(vit: Tiny) -> None:
    attention = vit.model.vit.layers[2].attention
    config = attention.config
    del attention.config
    before = snapshot(vit.model)
    with pytest.raises(UnsupportedModelError, match="config"):
        get_vpt_model(vit.model, PromptConfig())
    assert_unchanged(before, snapshot(vit.model))
    attention.config = config
    get_vpt_model(vit.model, PromptConfig())


def test_a_second_get_vpt_model_says_what_to_unload(vit: Tiny) -> None:
    vit.prompted()
    with pytest.raises(
        AdapterError, match=r"already has adapters\. Call unload\(\) on the VPTModel that was made from it"
    ):
        vit.prompted()


@pytest.mark.parametrize("config", [{}, {"deep": False}, {"bias": "all"}, {"modules_to_save": ["layernorm"]}])
def test_a_copy_of_the_attached_backbone_is_bare(tiny: Tiny, config: dict[str, Any]) -> None:
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(**config)
    file = io.BytesIO()
    torch.save(tiny.model, file)
    file.seek(0)
    for copied in (copy.deepcopy(tiny.model), torch.load(file, weights_only=False)):
        assert not has_overrides(copied)
        assert torch.equal(logits(copied, tiny.pixel_values), bare)
        again = get_vpt_model(copied, PromptConfig(num_tokens=2))
        assert torch.equal(logits(again.unload(), tiny.pixel_values), bare)
    assert not torch.equal(logits(vpt, tiny.pixel_values), bare)


@pytest.mark.parametrize("config", [{}, {"deep": False}, {"bias": "all"}])
def test_a_pickled_model_answers_and_unloads_as_the_original(tiny: Tiny, new: Any, config: dict[str, Any]) -> None:
    before = snapshot(new().model)
    vpt = tiny.prompted(**config)
    file = io.BytesIO()
    torch.save(vpt, file)
    file.seek(0)
    for copied in (copy.deepcopy(vpt), torch.load(file, weights_only=False)):
        assert torch.equal(logits(copied, tiny.pixel_values), logits(vpt, tiny.pixel_values))
        train_a_little(copied.train(), tiny)
        model = copied.unload()
        after = snapshot(model)
        assert after["requires_grad"] == before["requires_grad"] and after["training"] == before["training"]
        assert not has_overrides(model)


@pytest.mark.heavy
def test_a_pickled_model_opens_in_a_new_process(vit: Tiny, tmp_path: Path) -> None:
    vpt = vit.prompted()
    torch.save((vpt, vit.pixel_values), tmp_path / "vpt.pt")
    code = f"import torch; vpt, images = torch.load({str(tmp_path / 'vpt.pt')!r}, weights_only=False); "
    code += f"torch.save(vpt(images).logits.detach(), {str(tmp_path / 'logits.pt')!r})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(vpt, vit.pixel_values), atol=1e-6, rtol=0)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_models_that_share_a_weight_get_it_back_as_it_was(order: tuple[int, int]) -> None:
    models = [tiny_vit().model, tiny_vit().model]
    models[1].vit.embeddings = models[0].vit.embeddings
    models[0].vit.layers[0].requires_grad_(False)
    before = [snapshot(model) for model in models]
    vpts = [get_vpt_model(model, PromptConfig(num_tokens=2)) for model in models]
    vpts[order[0]].unload()
    assert not any(p.requires_grad for p in models[order[1]].parameters())
    vpts[order[1]].unload()
    for model, unchanged in zip(models, before, strict=True):
        assert_unchanged(unchanged, snapshot(model))


def test_an_override_that_was_put_on_later_survives_unload(vit: Tiny) -> None:
    bare = logits(vit.model, vit.pixel_values)
    vpt = vit.prompted()
    layer = vit.model.vit.layers[1]
    inner, calls = layer.forward, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = counting
    with pytest.warns(UserWarning, match="overridden after the adapter was attached"):
        vpt.unload()
    assert torch.equal(logits(vit.model, vit.pixel_values), bare) and calls == [1]


def test_offloaded_weights_are_refused(vit: Tiny) -> None:
    vit.model.vit.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"vit\.layers\.1\.\S+ is on the meta device"):
        vit.prompted()
    assert not has_overrides(vit.model)


def test_small_images_inside_disable_adapter_do_not_change_later_answers() -> None:
    swin = tiny_swin(depths=[2, 2])
    vpt = swin.prompted()
    small = torch.randn(2, 3, 32, 32)
    before = logits(vpt, swin.pixel_values), logits(vpt.base_model, swin.pixel_values)
    with vpt.disable_adapter():
        logits(vpt, small)
    logits(vpt.base_model, small)
    assert torch.equal(logits(vpt, swin.pixel_values), before[0])
    assert torch.equal(logits(vpt.base_model, swin.pixel_values), before[1])


def test_labels_inside_disable_adapter_change_no_config(tiny: Tiny, new: Any) -> None:
    expected = new().model(tiny.pixel_values, labels=tiny.labels).loss
    vpt = tiny.prompted()
    with vpt.disable_adapter():
        torch.testing.assert_close(vpt(tiny.pixel_values, labels=tiny.labels).loss, expected)
    assert tiny.model.config.problem_type is None and vpt.config.problem_type is None


@pytest.mark.parametrize("place", ["vit.layers.1", "vit.layers.1.attention", "vit.layernorm", "classifier"])
def test_the_bare_model_called_in_a_hook_inside_of_a_pass_is_bare(vit: Tiny, place: str) -> None:
    bare = logits(vit.model, vit.pixel_values)
    vpt = vit.prompted()
    before, seen = logits(vpt, vit.pixel_values), []

    def call(*_: Any) -> None:
        if not seen:
            seen.append(None)
            seen.append(logits(vit.model, vit.pixel_values))

    handle = vit.model.get_submodule(place).register_forward_hook(call)
    after = logits(vpt, vit.pixel_values)
    handle.remove()
    assert torch.equal(after, before) and torch.equal(seen[1], bare)


def test_the_base_of_another_model_called_inside_of_a_pass_is_bare(vit: Tiny) -> None:
    other = tiny_vit()
    bare = logits(other.model, vit.pixel_values)
    outer, inner = vit.prompted(), other.prompted(num_tokens=2)
    before, seen = logits(outer, vit.pixel_values), []
    vit.model.vit.layers[0].register_forward_hook(lambda *_: seen.append(logits(other.model, vit.pixel_values)))
    vit.model.vit.layers[1].register_forward_hook(lambda *_: seen.append(logits(inner, vit.pixel_values)))
    assert torch.equal(logits(outer, vit.pixel_values), before)
    assert torch.equal(seen[0], bare) and torch.equal(seen[1], logits(inner, vit.pixel_values))


# -- threads, tasks and gradients -----------------------------------------------------------------------------------


def test_a_disabled_adapter_is_disabled_in_its_thread_only(vit: Tiny) -> None:
    bare = logits(vit.model, vit.pixel_values)
    vpt = vit.prompted()
    prompted, barrier = logits(vpt, vit.pixel_values), Barrier(2)

    def inside() -> torch.Tensor:
        with vpt.disable_adapter():
            barrier.wait(60)
            output = logits(vpt, vit.pixel_values)
            barrier.wait(60)
        return output

    def outside() -> torch.Tensor:
        barrier.wait(60)
        output = logits(vpt, vit.pixel_values)
        barrier.wait(60)
        return output

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(inside), pool.submit(outside)
    assert torch.equal(one.result(), bare) and torch.equal(other.result(), prompted)
    assert torch.equal(logits(vpt, vit.pixel_values), prompted)


def test_a_disabled_adapter_is_disabled_in_its_task_only(vit: Tiny) -> None:
    bare = logits(vit.model, vit.pixel_values)
    vpt = vit.prompted()
    prompted = logits(vpt, vit.pixel_values)

    async def inside(entered: asyncio.Event, done: asyncio.Event) -> torch.Tensor:
        with vpt.disable_adapter():
            entered.set()
            await done.wait()
            return logits(vpt, vit.pixel_values)

    async def both() -> tuple[torch.Tensor, torch.Tensor]:
        entered, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(inside(entered, done))
        await entered.wait()
        output = logits(vpt, vit.pixel_values)
        done.set()
        return await task, output

    disabled, other = asyncio.run(both())
    assert torch.equal(disabled, bare) and torch.equal(other, prompted)


def test_contexts_of_serving_that_overlap_end_with_the_last(vit: Tiny) -> None:
    vpt = vit.prompted().eval()
    first, second = vpt.serving(), vpt.serving()
    first.__enter__()
    second.__enter__()
    logits(vpt, vit.pixel_values)
    first.__exit__(None, None, None)
    assert vpt._caches
    second.__exit__(None, None, None)
    logits(vpt, vit.pixel_values)
    assert not vpt._caches and not vpt._serving


@pytest.mark.parametrize("switch", ["set_adapter", "delete_adapter"])
def test_gradients_of_an_adapter_that_was_switched_off_are_an_error(vit: Tiny, switch: str) -> None:
    vpt = vit.prompted().train()
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    output = vpt(vit.pixel_values, labels=vit.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        vpt.set_adapter("other") if switch == "set_adapter" else vpt.delete_adapter("default")
    with pytest.raises(AdapterError, match=r"frozen before the backward pass.*Call backward\(\) first"):
        output.loss.backward()


def test_adapters_of_a_mixed_batch_that_do_not_train_are_warned_about(vit: Tiny) -> None:
    vpt = vit.prompted().train()
    vpt.add_adapter("other", PromptConfig(num_tokens=2))
    names = ["default", "other", "default", "other"]
    with pytest.warns(UserWarning, match="Only the active adapter of a mixed batch gets gradients"):
        vpt(vit.pixel_values, adapter_names=names)
    vpt.adapters["other"].requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vpt(vit.pixel_values, adapter_names=names).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in vpt.adapters.parameters())


def test_a_quantised_layer_that_overwrites_its_bias_does_not_reach_the_adapters(vit: Tiny) -> None:
    class Overwriting(nn.Linear):
        """A linear layer that does with its bias what bitsandbytes does."""

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.bias.data = self.bias.data.to(torch.bfloat16)
            return nn.functional.linear(inputs, self.weight.float(), self.bias.float())

    layer = vit.model.vit.layers[1].mlp
    dense = layer.fc1
    layer.fc1 = Overwriting(24, 48)
    layer.fc1.weight = nn.Parameter((dense.weight.detach() * 10).round().to(torch.int8), requires_grad=False)
    vpt = vit.prompted(bias="all")
    vpt(vit.pixel_values)
    bias = get_adapter_state_dict(vpt)["bias.vit.layers.1.mlp.fc1"]
    assert bias.dtype == torch.float32
