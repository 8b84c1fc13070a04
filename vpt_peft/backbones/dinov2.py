"""DINOv2, with and without registers."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Architecture, Head, count_layers_read, register_architecture

FEATURE_MAPS = Head(
    "FEATURE_EXTRACTION", layers_read=count_layers_read, normed=lambda model: bool(model.config.apply_layernorm)
)

DINOV2 = Architecture(
    model_type="dinov2",
    heads={
        "Dinov2ForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",), joins_class_token=True),
        "Dinov2Backbone": FEATURE_MAPS,
        "Dinov2Model": Head("FEATURE_EXTRACTION"),
    },
    layers="encoder.layer",
    norm="norm1",
    mlp_norm="norm2",
    attention_scale="layer_scale1",
    mlp_scale="layer_scale2",
)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    model_type="dinov2_with_registers",
    heads={name.replace("Dinov2", "Dinov2WithRegisters"): head for name, head in DINOV2.heads.items()},
    num_prefix_tokens=lambda encoder: 1 + int(encoder.config.num_register_tokens),
)
for architecture in (DINOV2, DINOV2_WITH_REGISTERS):
    register_architecture(architecture)
    register_architecture(  # as in transformers 5.12
        replace(
            architecture,
            q_proj="attention.query",
            k_proj="attention.key",
            v_proj="attention.value",
            o_proj="output.dense",
            caller="attention",
        )
    )
