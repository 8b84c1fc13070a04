"""AutoVPTModel: adapters that find their backbone by themselves."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clip_families import CLIP_FAMILIES
from helpers.models import BEIT, SWIN, VIT, Tiny, logits
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForMaskedImageModeling,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionModel,
    SwinBackbone,
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    pipeline,
)

from vpt_peft import (
    AdapterError,
    AutoVPTModel,
    AutoVPTModelForFeatureExtraction,
    AutoVPTModelForImageClassification,
    AutoVPTModelForMaskedImageModeling,
    CheckpointError,
    PromptConfig,
    VPTModel,
    get_vpt_model,
)


@pytest.fixture
def trained(tiny: Tiny, tmp_path: Path) -> VPTModel:
    """A prompted model whose backbone was loaded from a folder, as users load theirs."""
    tiny.model.save_pretrained(tmp_path / "backbone")
    tiny.model = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    return tiny.prompted()


def _bare(tiny: Tiny) -> Any:
    """The same model without adapters."""
    model = type(tiny.model)(tiny.model.config)
    model.load_state_dict(tiny.model.state_dict())
    return model.eval()


@pytest.mark.parametrize("auto", [AutoVPTModel, AutoVPTModelForImageClassification])
def test_an_adapter_finds_its_backbone(trained: VPTModel, tiny: Tiny, tmp_path: Path, auto: Any) -> None:
    trained.save_pretrained(tmp_path / "adapter")
    vpt = auto.from_pretrained(tmp_path / "adapter")
    assert type(vpt.get_base_model()) is type(tiny.model) and not vpt.training
    assert torch.equal(logits(vpt, tiny.pixel_values), logits(trained, tiny.pixel_values))
    half = auto.from_pretrained(tmp_path / "adapter", is_trainable=True, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.get_nb_trainable_parameters()[0] > 0


SLOW = "The backbone is in float16 on a CPU.* Load it with dtype=torch.float32"


@pytest.fixture
def half(vit: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter of a backbone that is saved in float16, on a machine without an accelerator."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    vit.model.half().save_pretrained(tmp_path / "backbone")
    vit.model = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone", dtype=torch.float32)
    vit.prompted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "float32", "bfloat16"], ids=str)
def test_a_float16_checkpoint_loads_in_the_precision_that_is_asked_for(
    name: str, dtype: torch.dtype | str, half: Path, vit: Tiny
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vpt = AutoVPTModel.from_pretrained(half, **{name: dtype})
    asked = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in vpt.get_base_model().parameters()} == {vpt.dtype} == {asked}
    assert {parameter.dtype for parameter in vpt.adapters.parameters()} == {torch.float32}
    expected = logits(VPTModel.from_pretrained(_bare(vit), half, check_backbone=True), vit.pixel_values)
    error = (logits(vpt, vit.pixel_values.to(asked)).float() - expected).abs().max()
    assert error == 0 if asked == torch.float32 else error < 0.1 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"dtype": "auto"}, {"dtype": torch.float16}], ids=str)
def test_float16_on_a_cpu_is_warned_about(options: dict[str, Any], half: Path) -> None:
    with pytest.warns(UserWarning, match=SLOW):
        vpt = AutoVPTModel.from_pretrained(half, **options)
    assert vpt.dtype == torch.float16
    bare = vpt.unload()
    with pytest.warns(UserWarning, match=SLOW):
        get_vpt_model(bare, PromptConfig()).unload()
    with pytest.warns(UserWarning, match=SLOW):
        VPTModel.from_pretrained(bare, half)


def test_float16_is_not_warned_about_where_an_accelerator_may_run_it(
    half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AutoVPTModel.from_pretrained(half).dtype == torch.float16


def test_two_precisions_or_an_unknown_one_are_refused(half: Path) -> None:
    with pytest.raises(AdapterError, match=r"dtype and its older name .* must agree, got float16 and torch.float32"):
        AutoVPTModel.from_pretrained(half, dtype="float16", torch_dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .*dtype"):
        AutoVPTModel.from_pretrained(half, dtype="float23")


def test_other_tasks_find_their_backbone(tmp_path: Path) -> None:
    for build, config, auto in (
        (ViTModel, ViTConfig(**VIT), AutoVPTModelForFeatureExtraction),
        (SwinForMaskedImageModeling, SwinConfig(**SWIN, encoder_stride=8), AutoVPTModelForMaskedImageModeling),
    ):
        build(config).save_pretrained(tmp_path / "backbone")
        get_vpt_model(build.from_pretrained(tmp_path / "backbone"), PromptConfig()).save_pretrained(
            tmp_path / "adapter"
        )
        for loader in (auto, AutoVPTModel):
            assert isinstance(loader.from_pretrained(tmp_path / "adapter").get_base_model(), build)
        with pytest.raises(CheckpointError, match="loads adapters for IMAGE_CLASSIFICATION, got task_type="):
            AutoVPTModelForImageClassification.from_pretrained(tmp_path / "adapter")


def test_an_adapter_finds_a_backbone_of_the_class_that_it_was_trained_on(tmp_path: Path) -> None:
    """Not of the class that transformers loads the checkpoint into."""
    tiny = {**VIT, "num_labels": 3}
    for saved, trained in (
        (ViTMAEModel(ViTMAEConfig(**tiny)), ViTForImageClassification),
        (Dinov2Model(Dinov2Config(**tiny)), Dinov2Backbone),
        (Blip2VisionModel(Blip2VisionConfig(**VIT)), Blip2VisionModel),
    ):
        saved.save_pretrained(tmp_path / "backbone")
        trained.from_pretrained(tmp_path / "backbone").save_pretrained(tmp_path / "backbone")
        model = trained.from_pretrained(tmp_path / "backbone")
        model.config.architectures = [type(saved).__name__]
        model.config.save_pretrained(tmp_path / "backbone")
        get_vpt_model(model, PromptConfig()).save_pretrained(tmp_path / "adapter")
        assert type(AutoVPTModel.from_pretrained(tmp_path / "adapter").get_base_model()) is trained


CLASSES: dict[str, tuple[Callable[[], Any], type[Any], dict[str, Any]]] = {
    "CLIPVisionModel": (lambda: CLIP_FAMILIES["clip"].bare(), CLIPVisionModel, {}),
    "CLIPVisionModelWithProjection": (lambda: CLIP_FAMILIES["clip"].bare(), CLIPVisionModelWithProjection, {}),
    "CLIPModel": (lambda: CLIP_FAMILIES["clip"].bare(), CLIPModel, {}),
    "SiglipVisionModel": (lambda: CLIP_FAMILIES["siglip"].bare(), SiglipVisionModel, {}),
    "SwinBackbone": (lambda: SwinModel(SwinConfig(**SWIN)), SwinBackbone, {"out_features": ["stage1", "stage2"]}),
    "BeitForMaskedImageModeling": (
        lambda: BeitForMaskedImageModeling(BeitConfig(**BEIT, vocab_size=11)), BeitForMaskedImageModeling, {},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*of the backbone were not in its checkpoint")
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_of_the_backbone_is_found_again(name: str, tmp_path: Path) -> None:
    build, cls, options = CLASSES[name]
    build().save_pretrained(tmp_path / "backbone")
    model = cls.from_pretrained(tmp_path / "backbone", **options)
    get_vpt_model(model, PromptConfig(num_tokens=2)).save_pretrained(tmp_path / "adapter")
    vpt = AutoVPTModel.from_pretrained(tmp_path / "adapter", **options)
    assert type(vpt.get_base_model()) is cls
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["model_class"] == name


def test_a_class_derived_from_one_of_transformers_is_loaded_as_that(tmp_path: Path) -> None:
    class Mine(ViTModel):
        pass

    Mine(ViTConfig(**VIT)).save_pretrained(tmp_path / "backbone")
    get_vpt_model(Mine.from_pretrained(tmp_path / "backbone"), PromptConfig()).save_pretrained(tmp_path / "adapter")
    assert type(AutoVPTModel.from_pretrained(tmp_path / "adapter").get_base_model()) is ViTModel


def test_an_older_adapter_without_the_class_finds_its_backbone_by_the_task(
    trained: VPTModel, tiny: Tiny, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_class": None}))
    with pytest.raises(CheckpointError, match="model_class: expected"):
        AutoVPTModel.from_pretrained(tmp_path / "adapter")  # the weights know better
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file(load_file(weights), weights)
    values = json.loads(config.read_text())
    del values["model_class"]
    config.write_text(json.dumps(values))
    vpt = AutoVPTModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(vpt, tiny.pixel_values), logits(trained, tiny.pixel_values))


def test_an_adapter_without_a_named_backbone_says_so(tiny: Tiny, tmp_path: Path) -> None:
    tiny.prompted().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Expected an adapter that names its backbone"):
        AutoVPTModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="has no instances"):
        AutoVPTModel()


def test_another_revision_of_the_backbone_is_warned_about(tiny: Tiny, tmp_path: Path) -> None:
    tiny.model.config._commit_hash = "a" * 40
    tiny.prompted().save_pretrained(tmp_path)
    model = _bare(tiny)
    model.config._commit_hash = "b" * 40
    with pytest.warns(UserWarning, match="was trained on revision aaa.* has revision bbb"):
        VPTModel.from_pretrained(model, tmp_path)


def test_an_image_processor_is_saved_beside_and_pipelines_take_the_model(
    trained: VPTModel, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = tiny.pixel_values.shape[-1]
    processor = ViTImageProcessor(size={"height": size, "width": size})
    trained.save_pretrained(tmp_path / "adapter", image_processor=processor)
    try:
        found = AutoImageProcessor.from_pretrained(tmp_path / "adapter")
    except ImportError:
        pytest.skip("AutoImageProcessor of this version of transformers needs torchvision")
    assert found.size == {"height": size, "width": size}
    image = Image.new("RGB", (50, 40), (200, 30, 120))
    with caplog.at_level(logging.CRITICAL):
        answers = pipeline("image-classification", model=trained.eval(), image_processor=found)(image, top_k=7)
    expected = logits(trained, found(image, return_tensors="pt").pixel_values).softmax(-1)[0]
    assert {answer["label"] for answer in answers} == set(trained.config.id2label.values())
    assert answers[0]["score"] == pytest.approx(expected.max().item(), abs=1e-5)
