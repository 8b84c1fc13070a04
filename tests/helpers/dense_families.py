"""Families with outputs for places in the image: objects, depth and poses."""

from __future__ import annotations

from typing import Any

from .families import DINOV2, IMAGE_SIZE, NUM_LABELS, PATCH_SIZE, SIZES, Family

SQUARE = {"image_size": [IMAGE_SIZE, IMAGE_SIZE]}
YOLOS = {**SIZES, **SQUARE, "num_detection_tokens": 3, "num_labels": NUM_LABELS}
NECK = {"neck_hidden_sizes": [6, 8, 10], "reassemble_factors": [2, 1, 0.5], "fusion_hidden_size": 8}
DPT = {**SIZES, **NECK, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2], "num_labels": NUM_LABELS}
VITPOSE = {**SIZES, **SQUARE, "patch_size": [PATCH_SIZE, PATCH_SIZE], "mlp_ratio": 2}


def _feature_maps(model_type: str, layers: dict[str, Any], **config: Any) -> dict[str, Any]:
    """The config of an inner backbone that gives the output of each of its layers."""
    stages = [f"stage{index + 1}" for index in range(SIZES["num_hidden_layers"])]
    return {"model_type": model_type, **layers, "out_features": stages, "reshape_hidden_states": False, **config}


def _poses(stage: str, **config: Any) -> dict[str, Any]:
    """The config of a VitPose that reads the output of a layer, counted from 1."""
    backbone = {"model_type": "vitpose_backbone", **VITPOSE, "out_features": [stage]}
    return {"backbone_config": backbone, "num_labels": NUM_LABELS, **config}


FIRST_RESIDUAL = "fusion_stage.layers.0.residual_layer1"
DEPTH: dict[str, Any] = {"rectified": "head.head.4", "never_read": FIRST_RESIDUAL}
PUBLISHED_POSES = {"backbone_config": {"model_type": "vitpose_backbone", "out_indices": [12]}}

DENSE_FAMILIES: dict[str, Family] = {
    "yolos": Family("YolosForObjectDetection", "YolosConfig", {**YOLOS, "use_mid_position_embeddings": True},
                    layers="vit.encoder.layer"),
    "yolos_model": Family("YolosModel", "YolosConfig", {**YOLOS, "use_mid_position_embeddings": False},
                          layers="encoder.layer", same_layers=True),
    "dpt": Family("DPTForDepthEstimation", "DPTConfig", DPT, layers="dpt.encoder.layer", reads_hidden_states=True,
                  **DEPTH),
    "dpt_segmenter": Family("DPTForSemanticSegmentation", "DPTConfig", DPT, layers="dpt.encoder.layer",
                            never_read=FIRST_RESIDUAL, same_layers=True),
    "dpt_model": Family("DPTModel", "DPTConfig", SIZES, layers="encoder.layer", same_layers=True),
    "dpt_on_dinov2": Family(
        "DPTForDepthEstimation", "DPTConfig", {**NECK, "backbone_config": _feature_maps("dinov2", DINOV2)},
        layers="backbone.encoder.layer",
        published={"backbone_config": {"model_type": "dinov2", "out_indices": [9, 10, 11, 12]}},
        same_layers=True, **DEPTH,
    ),
    "depth_anything": Family(
        "DepthAnythingForDepthEstimation", "DepthAnythingConfig",
        {**NECK, "backbone_config": _feature_maps("dinov2", DINOV2, apply_layernorm=False),
         "patch_size": PATCH_SIZE, "reassemble_hidden_size": SIZES["hidden_size"], "head_hidden_size": 4},
        layers="backbone.encoder.layer", rectified="head.conv3", never_read=FIRST_RESIDUAL,
    ),
    "vitpose": Family("VitPoseForPoseEstimation", "VitPoseConfig", _poses("stage3", use_simple_decoder=False),
                      num_prefix_tokens=0, layers="backbone.encoder.layer", published=PUBLISHED_POSES),
    "vitpose_simple": Family("VitPoseForPoseEstimation", "VitPoseConfig", _poses("stage2", use_simple_decoder=True),
                             num_prefix_tokens=0, layers="backbone.encoder.layer", published=PUBLISHED_POSES,
                             same_layers=True),
    "vitpose_backbone": Family("VitPoseBackbone", "VitPoseBackboneConfig",
                               {**VITPOSE, "out_features": ["stage1", "stage3"]}, num_prefix_tokens=0,
                               layers="encoder.layer",
                               published=PUBLISHED_POSES["backbone_config"], same_layers=True),
}  # fmt: skip
