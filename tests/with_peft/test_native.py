"""Adapters that transformers loads into the model itself."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.clip_families import CLIP_FAMILIES
from helpers.models import Tiny, assert_same, logits, tiny_vit, train_two_steps
from helpers.tasks import TASKS
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

pytest.importorskip("peft", minversion="0.21")


from vpt_peft import AdapterError, PromptConfig, RouteError, VPTModel, get_vpt_model
from vpt_peft.peft import VPTConfig

KINDS = ["long", "pooled", "gaps", "prefixes", "biased_shallow", "linear"]


@pytest.mark.parametrize("task", KINDS)
def test_transformers_opens_what_we_save_and_we_open_what_it_saves(
    tiny: Tiny, fresh: Any, save: Any, task: str, tmp_path: Path
) -> None:
    folder, vpt = save(fresh(), task)
    expected = logits(vpt, tiny.pixel_values)
    model = fresh()
    model.load_adapter(folder)
    assert torch.equal(logits(model, tiny.pixel_values), expected)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "native")
    assert torch.equal(logits(VPTModel.from_pretrained(fresh(), tmp_path / "native"), tiny.pixel_values), expected)
    for source in (folder, tmp_path / "native"):
        loaded = AutoModelForImageClassification.from_pretrained(source)
        assert torch.equal(logits(loaded, tiny.pixel_values), expected)
        assert loaded.config.num_labels == TASKS[task][1]


def test_a_pipeline_runs_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    base = ViTForImageClassification.from_pretrained(checkpoint)
    vpt = get_vpt_model(base, PromptConfig(num_tokens=3), id2label={0: "cat", 1: "dog", 2: "cow"}).eval()
    vpt.save_pretrained(tmp_path / "a")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    image = Image.effect_mandelbrot((20, 20), (-2, -1, 1, 1), 50).convert("RGB")
    pipe = transformers.pipeline("image-classification", model=str(tmp_path / "a"), image_processor=processor)
    scores = {one["label"]: one["score"] for one in pipe(image)}
    expected = logits(vpt, **processor(image, return_tensors="pt")).softmax(-1)[0]
    assert scores == pytest.approx(dict(zip(["cat", "dog", "cow"], expected.tolist(), strict=True)), abs=1e-6)


def test_the_active_adapter_decides_over_outputs_and_labels(tiny: Tiny, fresh: Any, save: Any) -> None:
    model = fresh()
    own_labels, bare = model.config.id2label, logits(model, tiny.pixel_values)
    expected = {}
    for task in ("long", "prefix", "bitfit", "deep"):
        folder, vpt = save(fresh(), task)
        expected[task] = logits(vpt, tiny.pixel_values)
        model.load_adapter(folder, task)
        assert model.active_adapters() == [task]
    for task in ("deep", "long", "bitfit", "prefix"):
        model.set_adapter(task)
        assert torch.equal(logits(model, tiny.pixel_values), expected[task])
        assert model.config.num_labels == TASKS[task][1]
    model.disable_adapters()
    assert torch.equal(logits(model, tiny.pixel_values), bare) and model.config.id2label == own_labels
    model.enable_adapters()
    assert torch.equal(logits(model, tiny.pixel_values), expected["prefix"])
    with pytest.warns(UserWarning, match="'long' is active now"):
        model.delete_adapter("prefix")
    assert torch.equal(logits(model, tiny.pixel_values), expected["long"]) and model.config.num_labels == 3


def test_the_model_is_bare_when_its_last_adapter_is_deleted(vit: Tiny, fresh_vit: Any, save: Any) -> None:
    folder, vpt = save(fresh_vit(), "biased")
    model = fresh_vit()
    children, state, labels = dict(model._modules), model.state_dict(), dict(model.config.id2label)
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    for _ in range(2):
        model.load_adapter(folder, "a")
        model.load_adapter(folder, "b")
        assert torch.equal(logits(model, vit.pixel_values), logits(vpt, vit.pixel_values))
        model.delete_adapter(["a", "b"])
        assert model._modules == children and not any("forward" in vars(module) for module in model.modules())
        assert_same(dict(model.state_dict()), dict(state))
        assert model.config.id2label == labels and not hasattr(model, "peft_config")
        assert [parameter.requires_grad for parameter in model.parameters()] == gradients


@pytest.mark.parametrize("config", [{}, {"kind": "prefix", "bias": "all"}, {"deep": False, "dropout": 0.2}])
def test_training_is_that_of_get_vpt_model(tiny: Tiny, new: Any, config: dict[str, Any], tmp_path: Path) -> None:
    backbone = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    twin, model = new().model, tiny.model
    torch.manual_seed(5)
    vpt = get_vpt_model(twin, PromptConfig(**config))
    torch.manual_seed(5)
    model.add_adapter(VPTConfig(**config))
    for one in (vpt, model):
        train_two_steps(one, tiny)
    assert torch.equal(logits(model, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    assert_same({name: tensor for name, tensor in model.state_dict().items() if name in backbone}, backbone)
    model.save_pretrained(tmp_path / "trained")
    loaded = VPTModel.from_pretrained(new().model, tmp_path / "trained")
    assert torch.equal(logits(loaded, tiny.pixel_values), logits(vpt, tiny.pixel_values))


def test_while_training_the_backbone_stays_in_eval_mode_and_the_head_does_not(vit: Tiny) -> None:
    vit.model.classifier = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 7))
    model = vit.model.train()
    model.add_adapter(VPTConfig(num_tokens=3))
    assert model.training and not model.vit.training
    model.add_adapter(VPTConfig(num_tokens=3, bias="all"), "b")
    model.set_adapter("default")
    head = model.visual_prompts.adapters["default"].head.find("classifier")
    other = model.visual_prompts.adapters["b"].head.find("classifier")
    for mode in (True, False, True):
        model.train(mode)
        assert (model.training, head[0].training, other[0].training) == (mode, mode, False)
        assert not any(module.training for module in model.vit.modules())
        assert not any(module.training for module in model.classifier.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_saved_adapter_trains_on_if_asked(vit: Tiny, fresh_vit: Any, save: Any) -> None:
    folder, vpt = save(fresh_vit(), "deep")
    model = fresh_vit()
    model.load_adapter(folder, is_trainable=True)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == len(list(vpt.adapters["default"].parameters()))
    model(pixel_values=vit.pixel_values, labels=vit.labels).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == names


def test_arguments_may_be_given_by_position(vit: Tiny, fresh_vit: Any, save: Any) -> None:
    folder, vpt = save(fresh_vit(), "deep")
    model = fresh_vit()
    model.load_adapter(folder)
    one, other = (call(vit.pixel_values, vit.labels) for call in (model, vpt))
    assert torch.equal(one.loss, other.loss)
    hidden = model(vit.pixel_values, output_hidden_states=True).hidden_states
    assert [state.shape for state in hidden] == [(4, 17, 24)] * 5
    logits_, *_ = model(vit.pixel_values, return_dict=False)
    assert torch.equal(logits_, other.logits)


def test_what_would_ignore_prompts_is_an_error(vit: Tiny) -> None:
    model = vit.model
    model.add_adapter(VPTConfig(num_tokens=3))
    with pytest.raises(RouteError, match="got a call of the ViTModel in it, which would ignore its prompts"):
        model.vit(vit.pixel_values)
    with pytest.raises(AdapterError, match="cannot be mixed in a batch"):
        model(vit.pixel_values, adapter_names=["default"] * 4)
    for twin in (copy.deepcopy, pickle.dumps):
        with pytest.raises(AdapterError, match="cannot be copied or pickled"):
            twin(model)
    model.disable_adapters()
    assert model.vit(vit.pixel_values).last_hidden_state.shape == (4, 17, 24)


def without_place(name: str) -> Any:
    """A model into which transformers cannot load an adapter."""
    if name == "CLIPModel":
        return CLIP_FAMILIES["clip"].bare()
    if name == "ViTModel":
        return tiny_vit().model.vit
    model = tiny_vit().model
    model.prompts = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("CLIPModel", "CLIPModel itself, which would get features of images without prompts"),
        ("ViTModel", "ViTModel itself, which has no classifier"),
        ("ViTForImageClassification", "'prompts'.*ViTForImageClassification has one of its own"),
    ],
)
def test_models_without_a_place_for_adapters_are_refused_and_left_as_they_were(name: str, match: str) -> None:
    model = without_place(name)
    labels = {"task_type": "IMAGE_CLASSIFICATION", "num_labels": 3} if name == "ViTModel" else {}
    children = dict(model._modules)
    with pytest.raises(AdapterError, match=rf"(?s){match}.*PeftModel.from_pretrained"):
        model.add_adapter(VPTConfig(num_tokens=3, **labels))
    assert model._modules == children and not any("forward" in vars(module) for module in model.modules())


def test_a_further_adapter_without_a_place_is_refused_and_the_others_stay(vit: Tiny) -> None:
    model = vit.model
    model.prefix = nn.Linear(2, 2)
    model.add_adapter(VPTConfig(num_tokens=3), "a")
    model.eval()
    before = logits(model, vit.pixel_values)
    with pytest.raises(AdapterError, match="'prefix'"):
        model.add_adapter(VPTConfig(kind="prefix"), "b")
    assert list(model.peft_config) == ["a"] and torch.equal(logits(model, vit.pixel_values), before)


def test_the_signature_of_the_model_is_kept(vit: Tiny) -> None:
    before = inspect.signature(vit.model.forward)
    vit.model.add_adapter(VPTConfig(num_tokens=3))
    assert inspect.signature(vit.model.forward) == before


@pytest.mark.parametrize("forward", [lambda model: model, lambda model: model.half().float()])
def test_the_model_can_be_converted(vit: Tiny, forward: Callable[[Any], Any]) -> None:
    vit.model.add_adapter(VPTConfig(num_tokens=3))
    assert logits(forward(vit.model), vit.pixel_values).isfinite().all()


def test_two_models_do_not_know_of_each_other(vit: Tiny) -> None:
    other = ViTForImageClassification(ViTConfig(**vit.model.config.to_dict())).eval()
    before = logits(other, vit.pixel_values)
    vit.model.add_adapter(VPTConfig(num_tokens=3))
    assert torch.equal(logits(other, vit.pixel_values), before)
