"""Swin Transformer."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Head, register_architecture


def num_layers_read(backbone: Any) -> int:
    """Number of leading layers that the feature maps of a ``SwinBackbone`` depend on. Feature map 0 is the embeddings,
    map i the output of stage i."""
    return sum(backbone.config.depths[: max(backbone.stage_names.index(name) for name in backbone.out_features)])


register_architecture(
    Architecture(
        model_type="swin",
        heads={
            "SwinForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
            "SwinForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
            "SwinBackbone": Head("FEATURE_EXTRACTION", layers_read=num_layers_read, normed=False),
            "SwinModel": Head("FEATURE_EXTRACTION"),
        },
        layers="encoder.layers",
        num_prefix_tokens=0,
        patch_norm="embeddings.norm",
        blocks="blocks",
        merging="downsample",
        overwrites_settings=True,
        unused=("attention.relative_position_bias",),
    )
)
