"""DINOv3 and Sapiens2, whose rotary embeddings are of patches only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architecture import Architecture, Head, count_layers_read, register_architecture


def _reads_norm(backbone: Any) -> bool:
    """The feature map of the last layer is always normed."""
    return bool(backbone.config.apply_layernorm) or backbone.stage_names[-1] in backbone.out_features


DINOV3 = Architecture(
    model_type="dinov3_vit",
    heads={  # base_model is the list of layers
        "DINOv3ViTBackbone": Head("FEATURE_EXTRACTION", encoder="", layers_read=count_layers_read, normed=_reads_norm),
        "DINOv3ViTModel": Head("FEATURE_EXTRACTION", encoder=""),
    },
    layers="model.layer",
    final_norm="norm",
    norm="norm1",
    mlp_norm="norm2",
    attention_scale="layer_scale1",
    mlp_scale="layer_scale2",
    num_prefix_tokens=lambda encoder: 1 + int(encoder.config.num_register_tokens),
    patch_projection="embeddings.patch_embeddings",
)
register_architecture(DINOV3)
register_architecture(
    replace(
        DINOV3,
        model_type="sapiens2",
        heads={
            "Sapiens2ForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION", ("decode_head",), ("decode_head.predictor",), own_loss=True
            ),
            "Sapiens2Backbone": Head(
                "FEATURE_EXTRACTION",
                encoder="",
                layers_read=count_layers_read,
                normed=lambda model: bool(model.config.normalize_backbone_outputs),
            ),
            "Sapiens2Model": Head("FEATURE_EXTRACTION", encoder=""),
        },
        q_norm="q_norm",
        k_norm="k_norm",
    )
)
