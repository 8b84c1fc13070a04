"""A linear decode head on models that have none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import headless
from helpers.families import all_families, some_images
from helpers.headless import images
from helpers.models import SWIN, VIT, assert_same, logits
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from vpt_peft import (
    AdapterError,
    AutoVPTModel,
    AutoVPTModelForSemanticSegmentation,
    ConfigError,
    PromptConfig,
    RouteError,
    UnsupportedModelError,
    VPTModel,
    get_vpt_model,
)

TASK = "SEMANTIC_SEGMENTATION"
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: ViTModel(ViTConfig(**VIT)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**{**VIT, "mlp_ratio": 2})),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**VIT)),
    "swin": lambda: SwinModel(SwinConfig(**SWIN)),
}
GRIDS = {"vit": (4, 4), "dinov2": (4, 4), "clip": (4, 4), "swin": (8, 8)}
each_model = pytest.mark.parametrize("name", MODELS)


def build(name: str) -> PreTrainedModel:
    return headless.build(MODELS[name])


def masks(height: int, width: int, num_labels: int = 5) -> Tensor:
    """Masks of all labels, some pixels of which have none."""
    labels = torch.randint(0, num_labels + 1, (4, height, width), generator=torch.Generator().manual_seed(3))
    return labels.masked_fill(labels == num_labels, 255)


def segment(model: PreTrainedModel, num_labels: int = 5, **config: Any) -> VPTModel:
    torch.manual_seed(1)
    return get_vpt_model(model, PromptConfig(**{"num_tokens": 3, "task_type": TASK, **config}), num_labels=num_labels)


@each_model
def test_each_patch_has_the_logits_of_its_own_token(name: str) -> None:
    model = build(name)
    vpt = segment(model, num_tokens=0)
    with torch.no_grad():
        tokens = model(images(model)).last_hidden_state
        if name == "clip":  # its output is in front of the final norm
            tokens = vpt.backbone.final_norm(tokens)
        rows, columns = GRIDS[name]
        head = vpt.adapters["default"].head.find("classifier")
        patches = tokens[:, 0 if name == "swin" else 1 :].unflatten(1, (rows, columns))
        expected = torch.einsum("nrcw,lw->nlrc", patches, head.weight[:, :, 0, 0]) + head.bias[:, None, None]
    torch.testing.assert_close(logits(vpt, images(model)), expected, atol=1e-5, rtol=0)


@each_model
def test_a_change_of_an_image_shows_where_it_is(name: str) -> None:
    """A bright patch in the second row and the third column of a bare model changes the logits there most."""
    model = build(name)
    vpt = segment(model, num_tokens=0)
    pixel_values = images(model)
    side = pixel_values.shape[-1] // GRIDS[name][0]
    changed = pixel_values.clone()
    changed[:, :, side : 2 * side, 2 * side : 3 * side] += 20
    difference = (logits(vpt, changed) - logits(vpt, pixel_values)).abs().sum(dim=(0, 1))
    assert divmod(int(difference.argmax()), GRIDS[name][1]) == (1, 2)


@each_model
def test_the_loss_is_the_cross_entropy_of_the_labelled_pixels_of_upsampled_logits(name: str) -> None:
    model = build(name)
    vpt, labels = segment(model), masks(23, 50)
    output = vpt(images(model), labels=labels)
    upsampled = nn.functional.interpolate(output.logits, (23, 50), mode="bilinear", align_corners=False)
    kept = labels != 255
    scores = upsampled.movedim(1, -1)[kept].log_softmax(-1)
    expected = -scores.gather(1, labels[kept].unsqueeze(1)).mean()
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=0)
    assert output.logits.shape == (4, 5, *GRIDS[name])
    assert output.keys() == {"loss", "logits"}


def test_a_batch_without_labelled_pixels_has_no_loss_and_no_gradient() -> None:
    model = build("vit")
    vpt = segment(model).train()
    loss = vpt(images(model), labels=torch.full((4, 8, 8), 255)).loss
    loss.backward()
    assert loss == 0
    assert all((one.grad == 0).all() for one in vpt.parameters() if one.requires_grad)


@each_model
@pytest.mark.parametrize("config", [{}, {"kind": "prefix", "bias": "all"}, {"deep": False}], ids=str)
def test_it_trains_and_comes_back_bit_for_bit(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    pixel_values, labels = images(model), masks(32, 32)
    vpt = segment(model, **config).train()
    trained = [parameter for parameter in vpt.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(3):
        loss = vpt(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    expected = logits(vpt.eval(), pixel_values)
    vpt.save_pretrained(tmp_path)
    assert vpt.unload() is model
    assert_same(model.state_dict(), before)
    loaded = VPTModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(logits(loaded, pixel_values), expected)
    assert loaded.config.num_labels == 5 and loaded.active_config.task_type == TASK


@each_model
def test_the_file_holds_prompts_and_a_linear_layer_and_no_more(name: str, tmp_path: Path) -> None:
    model = build(name)
    vpt = segment(model, num_labels=11)
    vpt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    width = vpt.backbone.num_features
    prompts = {f"prompts.{layer}": (3, width) for layer, width in enumerate(vpt.backbone.widths)}
    head = {"head.classifier.weight": (11, width, 1, 1), "head.classifier.bias": (11,)}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == prompts | head
    number = sum(tensor.numel() for tensor in tensors.values())
    assert number == 3 * sum(vpt.backbone.widths) + 11 * (width + 1)
    assert vpt.get_nb_trainable_parameters()[0] == number


def test_an_adapter_of_vit_base_has_the_size_that_the_guide_says(tmp_path: Path) -> None:
    """12 layers with 10 prompts of width 768, and 11 labels: 100,619 numbers of 4 bytes."""
    config = ViTConfig(num_hidden_layers=12, intermediate_size=8, image_size=32)  # what is frozen may be small
    vpt = segment(ViTModel(config), num_labels=11, num_tokens=10)
    vpt.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * (12 * 10 * 768 + 11 * 769) == 402_476
    file = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 402_476 < file < 450_000, "the rest is the config, with the fingerprint of the backbone"


@each_model
def test_the_backbone_is_found_by_its_name(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path / "backbone")
    model = type(build(name)).from_pretrained(tmp_path / "backbone")
    names = {0: "road", 1: "sky", 2: "tree"}
    vpt = get_vpt_model(model, PromptConfig(num_tokens=3, task_type=TASK), id2label=names).eval()
    vpt.save_pretrained(tmp_path / "adapter")
    for auto_class in (AutoVPTModel, AutoVPTModelForSemanticSegmentation):
        loaded = auto_class.from_pretrained(tmp_path / "adapter")
        assert type(loaded.get_base_model()) is type(model) and loaded.config.id2label == names
        assert torch.equal(logits(loaded, images(model)), logits(vpt, images(model)))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "pipeline_tag: image-segmentation" in card and "road, sky, tree" in card
    assert 'pipeline("' in card and "mask = logits.argmax(1)[0]" in card


def test_a_pooler_that_the_checkpoint_lacks_does_not_matter(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A checkpoint of a classifier has no pooler: each loading gives it other random weights, and nothing reads it."""
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path / "backbone")
    torch.manual_seed(1)
    vpt = segment(ViTModel.from_pretrained(tmp_path / "backbone"), bias="all").eval()
    assert not [warning for warning in recwarn if "not in its checkpoint" in str(warning.message)]
    vpt.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    loaded = AutoVPTModel.from_pretrained(tmp_path / "adapter")
    pixel_values = images(loaded.get_base_model())
    assert torch.equal(logits(loaded, pixel_values), logits(vpt, pixel_values))


@each_model
def test_images_of_several_tasks_with_other_numbers_of_labels(name: str) -> None:
    model = build(name)
    pixel_values = images(model)
    vpt = segment(model)
    vpt.add_adapter("many", PromptConfig(num_tokens=2, bias="all"), num_labels=9)
    vpt.add_adapter("linear", PromptConfig(num_tokens=0, task_type=TASK), num_labels=3)
    names = ["default", "many", "linear", "many"]
    with torch.no_grad():
        mixed = vpt(pixel_values, adapter_names=names)
    assert mixed.num_labels.tolist() == [5, 9, 3, 9] and mixed.logits.shape == (4, 9, *GRIDS[name])
    for row, (adapter, count) in enumerate(zip(names, mixed.num_labels, strict=True)):
        vpt.set_adapter(adapter)
        alone = logits(vpt, pixel_values[row : row + 1])[0]
        torch.testing.assert_close(mixed.logits[row, :count], alone, atol=1e-5, rtol=0)
        assert (mixed.logits[row, count:] == -torch.inf).all()
    with pytest.raises(AdapterError, match="has no head of its own for images of '__base__'"):
        vpt(pixel_values, adapter_names=["default", "__base__", "many", "default"])


@pytest.mark.parametrize(
    ("name", "height", "width", "grid"),
    [("vit", 24, 48, (3, 6)), ("vit", 30, 45, (3, 5)), ("dinov2", 40, 16, (5, 2)), ("clip", 32, 64, (4, 8)),
     ("swin", 32, 96, (4, 12)), ("swin", 61, 43, (8, 6))],
)  # fmt: skip
def test_images_may_have_another_shape(name: str, height: int, width: int, grid: tuple[int, int]) -> None:
    model = build(name)
    vpt = segment(model, num_tokens=0)
    pixel_values = torch.randn(4, 3, height, width)
    options = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    output = vpt(pixel_values, labels=masks(height, width), **options)
    assert output.logits.shape[-2:] == grid and output.loss.isfinite()
    with torch.no_grad():
        token = model(pixel_values, **options).last_hidden_state[:, (0 if name == "swin" else 1) + grid[1] + 1]
        token = vpt.backbone.final_norm(token) if name == "clip" else token
        head = vpt.adapters["default"].head.find("classifier")
        expected = nn.functional.linear(token, head.weight.flatten(1), head.bias)
    torch.testing.assert_close(output.logits[:, :, 1, 1].detach(), expected, atol=1e-5, rtol=0)


@pytest.mark.heavy
def test_checkpointing_attention_compilation_and_hidden_states() -> None:
    model = build("vit")
    pixel_values, labels = images(model), masks(32, 32)
    vpt = segment(model).train()
    vpt(pixel_values, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in vpt.adapters.named_parameters()}
    vpt.zero_grad()
    vpt.set_attn_implementation("eager")
    vpt.gradient_checkpointing_enable()
    vpt(pixel_values, labels=labels).loss.backward()
    assert_same({name: parameter.grad for name, parameter in vpt.adapters.named_parameters()}, expected, 1e-5)
    vpt.gradient_checkpointing_disable()
    output = vpt.eval()(pixel_values, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 5 and len(output.attentions) == 4
    compiled: Any = torch.compile(vpt, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, pixel_values), logits(vpt, pixel_values), atol=1e-6, rtol=0)


def test_a_half_precision_backbone_has_a_head_in_full_precision() -> None:
    model = build("vit").bfloat16()
    vpt = segment(model).train()
    output = vpt(images(model).bfloat16(), labels=masks(32, 32))
    output.loss.backward()
    assert output.logits.dtype == output.loss.dtype == torch.float32 and output.loss.isfinite()


def test_without_adapter_it_is_the_model_that_was_given() -> None:
    model = build("vit")
    pixel_values = images(model)
    with torch.no_grad():
        bare = model(pixel_values).last_hidden_state
        vpt = segment(model)
        assert vpt.get_base_model() is model
        with vpt.disable_adapter():
            assert torch.equal(vpt(pixel_values).last_hidden_state, bare)
            with pytest.raises(AdapterError, match="labels need a model with a classifier"):
                vpt(pixel_values, labels=masks(32, 32))


@pytest.mark.parametrize("name", ["dinov3", "siglip_vision", "yolos_model", "deit_model", "swinv2_model", "pixio"])
def test_families_with_other_tokens_besides_the_patches(name: str) -> None:
    """Registers, none, detection tokens and others: what is read are the patches."""
    family = all_families()[name]
    if family.missing:
        pytest.skip(family.missing)
    vpt = segment(family.bare(), num_tokens=0)
    before = logits(vpt, some_images())
    changed = some_images()
    changed[:, :, 8:16, 24:] += 20
    difference = (logits(vpt, changed) - before).abs().sum(dim=(0, 1))
    assert before.shape[-2:] == difference.shape == (4, 4)
    assert divmod(int(difference.argmax()), 4) == (1, 3)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"shape \(num_images, height, width\) for 4 images, got \(4,\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.long), r"got \(4, 1, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.long), r"for 4 images, got \(3, 8, 8\)"),
        ([1, 2, 3, 4], r"got \[1, 2, 3, 4\]"),
    ],
)
def test_labels_that_are_no_masks_are_refused(labels: Any, message: str) -> None:
    model = build("vit")
    with pytest.raises(AdapterError, match=message):
        segment(model)(images(model), labels=labels)


def test_the_loss_needs_two_labels() -> None:
    model = build("vit")
    vpt = segment(model, num_labels=1)
    assert logits(vpt, images(model)).shape == (4, 1, 4, 4)
    with pytest.raises(AdapterError, match="needs at least two labels, got 1"):
        vpt(images(model), labels=torch.zeros(4, 8, 8, dtype=torch.long))
    vpt.add_adapter("two", PromptConfig(), num_labels=2)
    vpt.set_adapter("two")
    assert vpt(images(model), labels=torch.zeros(4, 8, 8, dtype=torch.long)).loss.isfinite()


@pytest.mark.parametrize(
    ("config", "labels", "error", "message"),
    [
        ({}, {}, ConfigError, "decode head that is added to ViTModel needs labels, got none"),
        ({}, {"num_labels": 0}, ConfigError, "needs labels, got none"),
        ({}, {"num_labels": 5, "id2label": {0: "a"}}, ConfigError, "must have a name"),
        ({"pooling": "image"}, {"num_labels": 5}, ConfigError, "needs an image classifier"),
        ({"pooling": "class"}, {"num_labels": 5}, ConfigError, "needs an image classifier"),
        ({"location": "border", "deep": False}, {"num_labels": 5}, ConfigError, "outputs would include the border"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_the_model_bare(
    config: dict[str, Any], labels: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build("vit")
    with pytest.raises(error, match=message):
        get_vpt_model(model, PromptConfig(task_type=TASK, **config), **labels)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match="at least one label, got num_labels=0"):
        segment(model).add_adapter("none", PromptConfig(), num_labels=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("siglip2_vision", "takes patches with padding"),
        ("hiera_model", "has fewer: some layers pool"),
        ("dinov2_backbone", "returns feature maps of several layers"),
        ("videomae_model", "takes videos"),
    ],
)
def test_models_without_a_token_for_each_patch_are_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        segment(all_families()[name].bare())


def test_a_classifier_of_transformers_is_no_model_without_a_head() -> None:
    with pytest.raises(ConfigError, match="task of ViTForImageClassification is IMAGE_CLASSIFICATION, got"):
        segment(ViTForImageClassification(ViTConfig(**VIT)))


def test_tokens_that_are_not_those_of_the_patches_are_an_error() -> None:
    vpt = segment(build("vit"))
    with pytest.raises(RouteError, match="a token for each 8 x 8 pixels, got 15 tokens for images of 32 x 32 pixels"):
        vpt.backbone.token_grid(torch.zeros(1, 3, 32, 32), 15)
