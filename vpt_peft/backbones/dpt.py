"""DPT and Depth Anything: depth and segmentation from tokens of several layers, of a ViT or of DINOv2."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Head, count_layers_read, register_architecture

BACKBONES = ("Dinov2Backbone",)  # the heads take one prefix token


def _num_layers_read(model: Any) -> int:
    """Of the inner backbone, or of the ViT, whose layers the config counts from 0."""
    backbone = getattr(model, "backbone", None)
    return max(model.config.backbone_out_indices) + 1 if backbone is None else count_layers_read(backbone)


def _reads_norm(model: Any) -> bool:
    """Feature maps of an inner backbone may be normed, the layers of the ViT are not."""
    backbone = getattr(model, "backbone", None)
    return backbone is not None and bool(backbone.config.apply_layernorm)


def _refuse(encoder: Any) -> str | None:
    if not encoder.config.is_hybrid:
        return None
    return (
        "the first half of a hybrid DPT is a convolutional network, whose feature maps have no tokens. Use a DPT with "
        f"a ViT alone (is_hybrid=False), or with a backbone among {', '.join(BACKBONES)}."
    )


DEPTH = Head("DEPTH_ESTIMATION", ("neck", "head"), layers_read=_num_layers_read, normed=_reads_norm)

register_architecture(
    Architecture(
        model_type="dpt",
        heads={
            "DPTForDepthEstimation": DEPTH,
            "DPTForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION",
                ("neck", "head", "auxiliary_head"),
                ("head.head.4", "auxiliary_head.head.4"),
                own_loss=True,
                layers_read=_num_layers_read,
                normed=False,
            ),
            "DPTModel": Head("FEATURE_EXTRACTION"),
        },
        layers="encoder.layer",
        q_proj="attention.query",
        k_proj="attention.key",
        v_proj="attention.value",
        o_proj="output.dense",
        caller="attention",
        mlp=("intermediate", "output.dense"),
        backbone="backbone",
        backbones=BACKBONES,
        refuse=_refuse,
    )
)
register_architecture(
    Architecture(
        model_type="depth_anything",
        heads={"DepthAnythingForDepthEstimation": DEPTH},
        backbone="backbone",
        backbones=BACKBONES,
    )
)
