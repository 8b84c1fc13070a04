"""Models with outputs for places in the image: objects (YOLOS), depth (DPT, Depth Anything) and poses (VitPose)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.cards import run_code
from helpers.dense_families import DENSE_FAMILIES
from helpers.families import IMAGE_SIZE, NUM_IMAGES, NUM_LABELS, difference, enlarge, run, some_images, tensors
from huggingface_hub import ModelCard
from torch import Tensor, nn
from transformers import (
    BitConfig,
    DPTConfig,
    DPTForDepthEstimation,
    VitPoseBackbone,
    VitPoseBackboneConfig,
    VitPoseConfig,
    VitPoseForPoseEstimation,
)

import vpt_peft
from vpt_peft import AdapterError, AutoVPTModel, ConfigError, PromptConfig, UnsupportedModelError, get_vpt_model

# {name: (task type, tag of the Hub, image processor, its settings)}
TASKS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "yolos": ("OBJECT_DETECTION", "object-detection", "YolosImageProcessor",
              {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}),
    "dpt": ("DEPTH_ESTIMATION", "depth-estimation", "DPTImageProcessor",
            {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "keep_aspect_ratio": False}),
    "depth_anything": ("DEPTH_ESTIMATION", "depth-estimation", "DPTImageProcessor",
                       {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, "keep_aspect_ratio": False}),
    "vitpose": ("KEYPOINT_DETECTION", "keypoint-detection", "VitPoseImageProcessor",
                {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}),
}  # fmt: skip


def some_boxes(num_labels: int = NUM_LABELS) -> list[dict[str, Tensor]]:
    """Objects in images, as transformers' detectors take them: one in the first image, two in the second etc."""
    generator = torch.Generator().manual_seed(7)
    return [
        {
            "class_labels": torch.randint(num_labels, (number,), generator=generator),
            "boxes": 0.2 + 0.3 * torch.rand(number, 4, generator=generator),
        }
        for number in range(1, NUM_IMAGES + 1)
    ]


@pytest.mark.parametrize("name", TASKS)
def test_auto_classes_find_the_backbone_of_each_task(name: str, tmp_path: Path) -> None:
    family, (task_type, tag, _, _) = DENSE_FAMILIES[name], TASKS[name]
    family.bare().save_pretrained(tmp_path / "backbone")
    cls: Any = getattr(transformers, family.model_class)
    vpt = get_vpt_model(cls.from_pretrained(tmp_path / "backbone"), PromptConfig(num_tokens=2, bias="all"))
    assert vpt.peft_config["default"].task_type == task_type
    expected = run(enlarge(vpt).eval(), some_images(), family)
    vpt.save_pretrained(tmp_path / "adapter")
    assert ModelCard.load(tmp_path / "adapter/README.md").data.pipeline_tag == tag
    sibling: Any = getattr(vpt_peft, f"AutoVPTModelFor{task_type.title().replace('_', '')}")
    for loader in (AutoVPTModel, sibling):
        loaded = loader.from_pretrained(tmp_path / "adapter")
        assert type(loaded.get_base_model()) is cls
        for own, other in zip(tensors(run(loaded, some_images(), family)), tensors(expected), strict=True):
            assert torch.equal(own, other)
    with pytest.raises(vpt_peft.CheckpointError, match=f"loads adapters for IMAGE_CLASSIFICATION, got .*{task_type}"):
        vpt_peft.AutoVPTModelForImageClassification.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("name", TASKS)
def test_the_code_of_a_card_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family, (_, _, processor, settings) = DENSE_FAMILIES[name], TASKS[name]
    family.bare().save_pretrained(tmp_path / "backbone")
    cls: Any = getattr(transformers, family.model_class)
    vpt = get_vpt_model(cls.from_pretrained(tmp_path / "backbone"), PromptConfig(num_tokens=2))
    try:
        image_processor = getattr(transformers, processor)(**settings)
    except ImportError:
        pytest.skip(f"{processor} of this version of transformers needs torchvision")
    vpt.save_pretrained(tmp_path / "adapter", image_processor=image_processor)
    monkeypatch.chdir(tmp_path)
    names = run_code((tmp_path / "adapter/README.md").read_text(), tmp_path, monkeypatch)
    assert type(names["vpt"].get_base_model()) is cls
    if "depth" in TASKS[name][1]:
        assert names["found"]["predicted_depth"].shape == (40, 50)
    else:
        assert {"labels", "scores"} <= set(names["found"])


def test_the_loss_of_a_detector_is_that_of_the_backbone() -> None:
    family = DENSE_FAMILIES["yolos"]
    vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=0)).eval()
    ours = vpt(pixel_values=some_images(), labels=some_boxes())
    theirs = family.bare()(pixel_values=some_images(), labels=some_boxes())
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.loss_dict.keys() == theirs.loss_dict.keys() and type(ours) is type(theirs)
    with vpt.disable_adapter():
        torch.testing.assert_close(vpt(pixel_values=some_images(), labels=some_boxes()).loss, theirs.loss)


def test_a_detector_of_other_objects_has_an_output_for_each_and_one_for_none() -> None:
    family = DENSE_FAMILIES["yolos"]
    vpt = family.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2), num_labels=NUM_LABELS + 2)
    vpt.set_adapter("other")
    output = vpt(pixel_values=some_images(), labels=some_boxes(NUM_LABELS + 2))
    assert output.logits.shape == (NUM_IMAGES, 3, NUM_LABELS + 3)
    output.loss.backward()
    assert [name for name, own in vpt.adapters["other"].named_parameters() if own.grad is None] == []

    alone = family.bare(num_labels=NUM_LABELS + 2)  # the loss of transformers for the same outputs
    loss, *_ = alone.loss_function(
        output.logits, some_boxes(NUM_LABELS + 2), alone.device, output.pred_boxes, alone.config
    )
    torch.testing.assert_close(output.loss, loss)
    with pytest.raises(
        AdapterError, match=r'same number of labels, since its last output is for "no object", got \[5, 7\]'
    ):
        vpt(pixel_values=some_images(), adapter_names=["default", "other", "default"])


def test_a_pose_of_other_keypoints_has_a_heatmap_for_each() -> None:
    for name in ("vitpose", "vitpose_simple"):
        vpt = DENSE_FAMILIES[name].prompted()
        vpt.add_adapter("other", PromptConfig(num_tokens=2), num_labels=NUM_LABELS + 2)
        old, new = (vpt.adapters[adapter].head.find("head").conv for adapter in ("default", "other"))
        assert (new.kernel_size, new.padding) == (old.kernel_size, old.padding)
        with torch.no_grad():
            mixed = vpt(pixel_values=some_images(), adapter_names=["default", "other", "__base__"])
        assert mixed.num_labels.tolist() == [NUM_LABELS, NUM_LABELS + 2, NUM_LABELS]
        assert mixed.heatmaps.isneginf().flatten(2).all(2).sum(1).tolist() == [2, 0, 2]


def test_depth_has_no_loss_in_the_model_and_trains_on_its_output() -> None:
    vpt = DENSE_FAMILIES["depth_anything"].prompted().train()
    depth = torch.rand(NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE)
    with pytest.raises(AdapterError, match=r"got DepthEstimatorOutput\. Leave labels out, and compute the loss"):
        vpt(pixel_values=some_images(), labels=depth)
    nn.functional.l1_loss(vpt(pixel_values=some_images()).predicted_depth, depth).backward()
    assert all(prompts.grad.abs().max() > 0 for prompts in vpt.adapters["default"].prompts.parameters())


@pytest.mark.parametrize("name", TASKS)
def test_a_border_around_the_image_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="needs a model without outputs for places in the image, got"):
        get_vpt_model(DENSE_FAMILIES[name].bare(), PromptConfig(num_tokens=2, location="border", deep=False))


def test_detection_tokens_are_no_tokens_of_the_image() -> None:
    family = DENSE_FAMILIES["yolos_model"]
    model = family.bare()
    config = PromptConfig(num_tokens=0, task_type="IMAGE_CLASSIFICATION", pooling="image")
    vpt = get_vpt_model(family.bare(), config, num_labels=NUM_LABELS).eval()
    classifier = vpt.adapters["default"].head.find("classifier")
    with torch.no_grad():
        tokens = model(pixel_values=some_images()).last_hidden_state
        assert tokens.shape[1] == 1 + 16 + 3
        logits = vpt(pixel_values=some_images()).logits
        torch.testing.assert_close(logits, classifier(tokens[:, 1:17].mean(1)))

        vpt = get_vpt_model(family.bare(), PromptConfig(num_tokens=48, deep=False)).eval()
        vpt.init_prompts([some_images()], num_images=NUM_IMAGES)
        embedded = model.embeddings(some_images())[:, 1:17].flatten(0, 1)
    (prompts,) = vpt.adapters["default"].prompts.parameters()
    assert torch.equal(prompts[prompts[:, 0].argsort()], embedded[embedded[:, 0].argsort()])


def test_what_cannot_be_prompted_is_refused_with_the_reason() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": [32, 32]}
    experts = {**sizes, "patch_size": [8, 8], "num_experts": 3, "part_features": 4, "out_features": ["stage2"]}
    for model in (
        VitPoseBackbone(VitPoseBackboneConfig(**experts)),
        VitPoseForPoseEstimation(VitPoseConfig(backbone_config={"model_type": "vitpose_backbone", **experts})),
    ):
        with pytest.raises(
            UnsupportedModelError, match=r"cannot be prompted: its MLPs have 3 experts.*Use a checkpoint"
        ):
            get_vpt_model(model, PromptConfig())
    with torch.device("meta"):
        hybrid = DPTForDepthEstimation(DPTConfig(
            is_hybrid=True, backbone_out_indices=[2, 5, 8, 11], neck_ignore_stages=[0, 1],
            neck_hidden_sizes=[256, 512, 768, 768], backbone_featmap_shape=[1, 1024, 24, 24],
            backbone_config=BitConfig(global_padding="same", layer_type="bottleneck", depths=[3, 4, 9],
                                      out_features=["stage1", "stage2", "stage3"], embedding_dynamic_padding=True),
        ))  # fmt: skip
        swin = DPTForDepthEstimation(DPTConfig(
            backbone_config={"model_type": "swinv2", "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            neck_hidden_sizes=[96, 192, 384, 768],
        ))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="cannot be prompted: the first half of a hybrid DPT is a convolut"):
        get_vpt_model(hybrid, PromptConfig())
    with pytest.raises(UnsupportedModelError, match="with a backbone among Dinov2Backbone; got Swinv2Backbone"):
        get_vpt_model(swin, PromptConfig())


def test_labels_of_a_segmenter_with_depth_layers_are_its_own() -> None:
    family = DENSE_FAMILIES["dpt_segmenter"]
    vpt = family.prompted()
    vpt.add_adapter("other", PromptConfig(num_tokens=2), num_labels=NUM_LABELS + 2)
    vpt.set_adapter("other")
    labels = torch.randint(NUM_LABELS + 2, (NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE))
    output = vpt(pixel_values=some_images(), labels=labels)
    assert output.logits.shape[1] == NUM_LABELS + 2 and output.loss.isfinite()
    vpt.set_adapter("default")
    assert difference(run(vpt, some_images(), family), run(family.prompted(), some_images(), family)) == 0
