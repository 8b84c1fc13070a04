"""VitPose: poses from the last feature map of a ViT without ``[CLS]``."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Head, count_layers_read, register_architecture


def _refuse(backbone: Any) -> str | None:
    number = backbone.config.num_experts
    if number == 1:
        return None
    return (
        f"its MLPs have {number} experts, chosen by dataset_index for each image, and prompts have none. Use a "
        "checkpoint without experts, such as ViTPose (not ViTPose++)."
    )


register_architecture(
    Architecture(
        model_type="vitpose_backbone",
        heads={"VitPoseBackbone": Head("FEATURE_EXTRACTION", layers_read=count_layers_read)},
        layers="encoder.layer",
        q_proj="attention.query",
        k_proj="attention.key",
        v_proj="attention.value",
        o_proj="output.dense",
        caller="attention",
        num_prefix_tokens=0,
        refuse=_refuse,
    )
)
register_architecture(
    Architecture(
        model_type="vitpose",
        heads={
            "VitPoseForPoseEstimation": Head(
                "KEYPOINT_DETECTION",
                ("head",),
                ("head.conv",),
                layers_read=lambda model: count_layers_read(model.backbone),
            )
        },
        backbone="backbone",
        backbones=("VitPoseBackbone",),
    )
)
