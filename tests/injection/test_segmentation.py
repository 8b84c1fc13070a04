"""Semantic segmentation: BEiT, and UperNet on a Swin backbone, whose decode heads belong to the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.invariants import assert_unchanged, snapshot, train_a_little
from helpers.models import SEGMENTERS, SWIN, Tiny, assert_same, gradients, logits
from torch import Tensor, nn
from transformers import ResNetConfig, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from vpt_peft import (
    AdapterError,
    AutoVPTModelForSemanticSegmentation,
    ConfigError,
    PromptConfig,
    UnsupportedModelError,
    VPTModel,
    get_adapter_state_dict,
    get_vpt_model,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "deep": {},
    "shallow": {"deep": False},
    "first_layers_carried": {"layers_to_transform": [0, 1]},
    "not_carried": {"layers_to_transform": [0, 2], "carry": False},
    "biases": {"bias": "all"},
    "linear": {"num_tokens": 0},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(params=list(SEGMENTERS))
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """A segmentation model of each supported family, with images and masks."""
    return SEGMENTERS[request.param]()


@pytest.fixture
def new(tiny: Tiny) -> Callable[..., Tiny]:
    """Builds the same model again."""
    return SEGMENTERS[tiny.name]


def tensors_of(vpt: VPTModel, name: str = "default") -> dict[str, Tensor]:
    """Copies of an adapter's tensors."""
    return {key: tensor.clone() for key, tensor in get_adapter_state_dict(vpt, name).items()}


@each_config
def test_training_changes_the_adapter_and_nothing_of_the_backbone(tiny: Tiny, config: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    bare = logits(tiny.model, tiny.pixel_values)
    vpt = tiny.prompted(**config).train()
    own = tensors_of(vpt)
    train_a_little(vpt, tiny)
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(before[name], tensor), name
    same = {name for name, tensor in tensors_of(vpt).items() if torch.equal(own[name], tensor)}
    assert all(name.startswith("bias.") and "k_proj" in name for name in same), "softmax forgets the keys' biases"
    assert any("running_var" in name for name in own)
    assert torch.equal(logits(tiny.model, tiny.pixel_values), bare)
    with vpt.disable_adapter():
        assert torch.equal(logits(vpt, tiny.pixel_values), bare)


@each_config
def test_all_that_trains_has_a_gradient(tiny: Tiny, config: dict[str, Any]) -> None:
    """As processes that share gradients expect it."""
    vpt = tiny.prompted(**config).train()
    vpt(tiny.pixel_values, labels=tiny.labels).loss.backward()
    assert not [name for name, one in vpt.named_parameters() if one.requires_grad and one.grad is None]


@each_config
def test_unload_returns_the_model_as_it_was(tiny: Tiny, config: dict[str, Any]) -> None:
    next(tiny.model.parameters()).requires_grad_(False)
    with torch.no_grad():
        tiny.model.eval()(tiny.pixel_values)  # the first call leaves hooks of transformers' own
    tiny.model.train()
    before = snapshot(tiny.model)
    vpt = tiny.prompted(**config)
    train_a_little(vpt, tiny)
    assert vpt.unload() is tiny.model
    assert_unchanged(before, snapshot(tiny.model))


@pytest.mark.parametrize("training", [True, False])
@each_config
def test_both_routes_agree(new: Callable[..., Tiny], config: dict[str, Any], training: bool) -> None:
    results = []
    for route in ("auto", "tokens"):
        tiny = new()
        vpt = tiny.prompted(**config, route=route).train(training)
        output = vpt(tiny.pixel_values, labels=tiny.labels)
        output.loss.backward()
        results.append((output.logits, gradients(vpt)))
    (auto, auto_gradients), (tokens, tokens_gradients) = results
    torch.testing.assert_close(auto, tokens, atol=1e-5, rtol=0)
    assert_same(auto_gradients, tokens_gradients, 1e-5)


@each_config
def test_an_image_does_not_depend_on_the_others_in_its_batch(tiny: Tiny, config: dict[str, Any]) -> None:
    vpt = tiny.prompted(**config)
    train_a_little(vpt.train(), tiny)
    together = logits(vpt.eval(), tiny.pixel_values)
    alone = torch.cat([logits(vpt, image[None]) for image in tiny.pixel_values])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@each_config
def test_shapes_are_the_backbones_own(tiny: Tiny, config: dict[str, Any]) -> None:
    tiny.model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        bare = tiny.model(tiny.pixel_values, **wanted)
        ours = tiny.prompted(**config)(tiny.pixel_values, **wanted)
    assert ours.keys() == bare.keys() and ours.logits.shape == bare.logits.shape
    for ours_state, bare_state in zip(ours.hidden_states, bare.hidden_states, strict=True):
        assert ours_state.shape == bare_state.shape
    for ours_weights, bare_weights in zip(ours.attentions, bare.attentions, strict=True):
        assert ours_weights.shape[:3] == bare_weights.shape[:3]


@pytest.mark.parametrize("deep", [True, False])
def test_a_gradient_reaches_every_prompt_and_the_whole_head(tiny: Tiny, deep: bool) -> None:
    vpt = tiny.prompted(deep=deep).train()
    bare = logits(tiny.model, tiny.pixel_values)
    assert (logits(vpt.eval(), tiny.pixel_values) - bare).abs().max() > 1e-3
    vpt.train()(tiny.pixel_values, labels=tiny.labels).loss.backward()
    trained = {name for name, parameter in vpt.adapters["default"].named_parameters() if parameter.requires_grad}
    found = gradients(vpt)
    assert found.keys() == trained and any(name.startswith("prompts.") for name in found)
    for name, gradient in found.items():
        assert gradient.isfinite().all() and (gradient != 0).any(), name
        if name.startswith("prompts."):
            assert (gradient.abs().amax(-1) > 0).all(), name


@pytest.mark.parametrize("auxiliary", [True, False])
def test_the_loss_is_that_of_the_backbone_with_the_adapters_head_in_it(
    new: Callable[..., Tiny], auxiliary: bool
) -> None:
    """No prompts, so the backbone with a copy of the adapter's head computes all of it in its own code."""
    tiny, whole = (new(use_auxiliary_head=auxiliary, auxiliary_loss_weight=0.7) for _ in range(2))
    assert (tiny.labels == 255).any()
    vpt = tiny.prompted(num_tokens=0)
    train_a_little(vpt.train(), tiny)
    head = {name.removeprefix("head."): tensor for name, tensor in tensors_of(vpt).items()}
    assert any(name.startswith("auxiliary_head.") for name in head) == auxiliary
    whole.model.load_state_dict(head, strict=False)
    with torch.no_grad():
        expected = whole.model(tiny.pixel_values, labels=tiny.labels)
        ours = vpt.eval()(tiny.pixel_values, labels=tiny.labels)
        as_tuple = vpt(tiny.pixel_values, labels=tiny.labels, return_dict=False)
    assert torch.equal(ours.loss, expected.loss) and torch.equal(ours.logits, expected.logits)
    assert torch.equal(as_tuple[0], ours.loss) and torch.equal(as_tuple[1], ours.logits)


def test_pixels_of_the_ignored_label_do_not_count(new: Callable[..., Tiny]) -> None:
    name = {"upernet": "loss_ignore_index", "beit_segmenter": "semantic_loss_ignore_index"}[new().name]
    losses = []
    for ignored in (255, 6):
        tiny = new(**{name: ignored, "use_auxiliary_head": False})
        labels = tiny.labels.masked_fill(tiny.labels >= 6, ignored)
        vpt = tiny.prompted()
        losses.append(vpt(tiny.pixel_values, labels=labels).loss)
        upsampled = nn.functional.interpolate(logits(vpt, tiny.pixel_values), labels.shape[-2:], mode="bilinear")
        kept = labels != ignored
        by_hand = nn.functional.cross_entropy(upsampled.movedim(1, -1)[kept], labels[kept])
        torch.testing.assert_close(losses[-1], by_hand)
    assert losses[0] == losses[1]


def test_another_number_of_labels_gets_new_output_layers(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=3), num_labels=9)
    vpt.set_adapter("other")
    shapes = {name: tensor.shape for name, tensor in tensors_of(vpt, "other").items()}
    for head in ("decode_head", "auxiliary_head"):
        assert shapes[f"head.{head}.classifier.weight"][0] == shapes[f"head.{head}.classifier.bias"][0] == 9
    labels = torch.where(tiny.labels == 6, 8, tiny.labels)  # a label that the backbone's own head does not have
    output = vpt.train()(tiny.pixel_values, labels=labels)
    output.loss.backward()
    assert output.logits.shape[1] == 9 and output.loss.isfinite()
    kept = {name for name in shapes if name.startswith("head.") and "classifier" not in name}
    own = tiny.model.state_dict()
    for name in kept - {name for name in kept if "running" in name or "num_batches" in name}:
        assert torch.equal(tensors_of(vpt, "other")[name], own[name.removeprefix("head.")]), name


def test_the_loss_needs_two_labels(new: Callable[..., Tiny]) -> None:
    tiny = new()
    vpt = tiny.prompted()
    vpt.add_adapter("one", PromptConfig(), num_labels=1)
    vpt.set_adapter("one")
    assert logits(vpt, tiny.pixel_values).shape[1] == 1
    with pytest.raises(AdapterError, match="needs at least two labels, got 7 in the backbone's config and 1 in the"):
        vpt(tiny.pixel_values, labels=tiny.labels)


def test_averages_of_the_head_are_the_adapters_own(tiny: Tiny) -> None:
    vpt = tiny.prompted()
    vpt.add_adapter("idle", PromptConfig(num_tokens=3))
    averages = {name for name in tensors_of(vpt) if "running" in name or "num_batches" in name}
    assert any(name.endswith("num_batches_tracked") for name in averages)
    own, idle = tensors_of(vpt), tensors_of(vpt, "idle")
    logits(vpt, tiny.pixel_values)
    assert_same(tensors_of(vpt), own)  # in eval mode they stand still
    logits(vpt.train(), tiny.pixel_values, adapter_names=["default", "idle", "default", "__base__"])
    after = tensors_of(vpt)
    assert {name for name in own if not torch.equal(own[name], after[name])} == averages
    assert_same(tensors_of(vpt, "idle"), idle)  # it does not train, so they stand still


def test_a_frozen_adapter_stays_as_it_is_while_others_train(new: Callable[..., Tiny], tmp_path: Path) -> None:
    new().prompted().save_pretrained(tmp_path)
    tiny = new()
    vpt = VPTModel.from_pretrained(tiny.model, tmp_path).train()
    before = tensors_of(vpt)
    expected = logits(vpt.eval(), tiny.pixel_values)
    assert torch.equal(logits(vpt.train(), tiny.pixel_values), expected)
    assert_same(tensors_of(vpt), before)


@each_config
def test_a_reloaded_adapter_agrees_bit_for_bit(
    new: Callable[..., Tiny], tmp_path: Path, config: dict[str, Any]
) -> None:
    tiny = new()
    vpt = tiny.prompted(**config)
    train_a_little(vpt.train(), tiny)
    vpt.eval().save_pretrained(tmp_path)
    again = VPTModel.from_pretrained(new().model, tmp_path)
    assert_same(tensors_of(again), tensors_of(vpt))
    assert {name: tensor.dtype for name, tensor in tensors_of(again).items()} == {
        name: torch.int64 if name.endswith("num_batches_tracked") else torch.float32 for name in tensors_of(vpt)
    }
    assert torch.equal(logits(again, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    bare = logits(new().model, tiny.pixel_values)
    assert torch.equal(logits(again.unload(), tiny.pixel_values), bare)


def test_other_labels_are_reloaded_and_the_backbone_found_by_itself(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model.save_pretrained(tmp_path / "backbone")
    model = type(tiny.model).from_pretrained(tmp_path / "backbone")
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3))
    names = {0: "road", 1: "sky", 2: "tree"}
    vpt.add_adapter("street", PromptConfig(num_tokens=4), id2label=names, label2id={n: i for i, n in names.items()})
    vpt.set_adapter("street")
    train_a_little(vpt.train(), Tiny("", model, tiny.pixel_values, tiny.labels.clamp(max=2)))
    vpt.eval().save_pretrained(tmp_path / "adapter", selected_adapters=["street"])
    again = AutoVPTModelForSemanticSegmentation.from_pretrained(tmp_path / "adapter")
    assert again.config.id2label == names and again.active_config.task_type == "SEMANTIC_SEGMENTATION"
    assert torch.equal(logits(again, tiny.pixel_values), logits(vpt, tiny.pixel_values))
    card = (tmp_path / "adapter" / "street" / "README.md").read_text()
    assert "road, sky, tree" in card and "pipeline_tag: image-segmentation" in card
    with pytest.raises(Exception, match="was made for a"):
        VPTModel.from_pretrained(SEGMENTERS["upernet" if "beit" in tiny.name else "beit_segmenter"]().model,
                                 tmp_path / "adapter")  # fmt: skip


MIXES = [
    ["deep", "shallow", "deep", "__base__"],
    ["linear", "linear", "few", "shallow"],
    ["few", "few", "few", "few"],
]


@pytest.mark.parametrize("names", MIXES, ids="-".join)
def test_a_mixed_batch_agrees_with_one_pass_per_task(tiny: Tiny, names: list[str]) -> None:
    vpt = tiny.prompted(3)
    for name, config, num_labels in (
        ("deep", PromptConfig(num_tokens=3), 7),
        ("shallow", PromptConfig(num_tokens=4, deep=False), 9),
        ("few", PromptConfig(num_tokens=6, route="tokens"), 2),
        ("linear", PromptConfig(num_tokens=0), 5),
    ):
        vpt.add_adapter(name, config, num_labels=num_labels)
    with torch.no_grad():
        output = vpt(tiny.pixel_values, adapter_names=names)
    for image, row, count, name in zip(tiny.pixel_values, output.logits, output.num_labels, names, strict=True):
        if name == "__base__":
            alone = logits(tiny.model, image[None])[0]
        else:
            vpt.set_adapter(name)
            alone = logits(vpt, image[None])[0]
        assert len(alone) == count
        torch.testing.assert_close(row[:count], alone, atol=1e-5, rtol=0)
        assert (row[count:] == -torch.inf).all() and row.shape[1:] == alone.shape[1:]
    with pytest.raises(AdapterError, match="labels cannot be given with adapter_names"):
        vpt(tiny.pixel_values, labels=tiny.labels, adapter_names=names)


def test_a_half_precision_backbone_has_a_head_in_full_precision(tiny: Tiny) -> None:
    tiny.model.bfloat16()
    vpt = tiny.prompted().train()
    output = vpt(tiny.pixel_values.bfloat16(), labels=tiny.labels)
    output.loss.backward()
    assert output.logits.dtype == torch.float32 and output.loss.isfinite()
    floats = {tensor.dtype for tensor in tensors_of(vpt).values() if tensor.is_floating_point()}
    assert floats == {torch.float32}


def test_pooling_is_for_classifiers_only(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="needs an image classifier"):
        get_vpt_model(tiny.model, PromptConfig(pooling="image"))


def test_layers_that_no_head_reads_get_no_prompts() -> None:
    """BEiT's head reads what ``max(out_indices) - 1`` layers made, UperNet's the stages that its backbone gives out."""
    beit = SEGMENTERS["beit_segmenter"]()
    assert len(beit.model.beit.layers) == 5 and list(beit.prompted().routes) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match=r"layers from 0 to 3, got \[4\]"):
        SEGMENTERS["beit_segmenter"]().prompted(layers_to_transform=[4])
    stages = {"depths": [2, 1, 1], "num_heads": [1, 2, 2], "out_features": ["stage1", "stage2"]}
    swin = SwinConfig(**{**SWIN, **stages})
    upernet = SEGMENTERS["upernet"](backbone_config=swin, use_auxiliary_head=False)
    vpt = upernet.prompted(layers_to_transform=[1])
    assert list(vpt.routes) == [1, 2] and logits(vpt, upernet.pixel_values).isfinite().all()


def test_norms_of_feature_maps_can_be_trained_too() -> None:
    tiny = SEGMENTERS["upernet"]()
    with pytest.raises(ConfigError, match=r"modules that are called, got the list 'backbone.hidden_states_norms'"):
        tiny.prompted(modules_to_save=["hidden_states_norms"])
    vpt = tiny.prompted(modules_to_save=["backbone.hidden_states_norms.stage2"]).train()
    before = tensors_of(vpt)
    train_a_little(vpt, tiny)
    assert not torch.equal(tensors_of(vpt)["modules_to_save.backbone.hidden_states_norms.stage2.weight"],
                           before["modules_to_save.backbone.hidden_states_norms.stage2.weight"])  # fmt: skip


def test_upernet_with_another_backbone_is_refused_by_name() -> None:
    stages = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "out_features": ["stage1", "stage2"]}
    config = UperNetConfig(
        backbone_config=ResNetConfig(**stages), use_auxiliary_head=False, hidden_size=4, pool_scales=[1]
    )
    with pytest.raises(UnsupportedModelError, match="with a backbone among SwinBackbone; got ResNetBackbone"):
        get_vpt_model(UperNetForSemanticSegmentation(config), PromptConfig())
