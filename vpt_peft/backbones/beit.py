"""BEiT."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Head, register_architecture


def _num_layers_read(model: Any) -> int:
    """The decode head reads ``hidden_states[index - 1]``, the output of the first ``index - 1`` layers."""
    return max((index - 1) % (len(model.beit.layers) + 1) for index in model.config.out_indices)


def _has_position_biases(encoder: Any) -> bool:
    biases = encoder.shared_position_bias, *(layer.relative_position_bias for layer in encoder.layers)
    return any(bias is not None for bias in biases)


register_architecture(
    Architecture(
        model_type="beit",
        heads={
            "BeitForImageClassification": Head(
                "IMAGE_CLASSIFICATION", ("classifier",), pooled_norm="beit.pooler.layernorm"
            ),
            "BeitForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("layernorm", "lm_head"), own_loss=True),
            "BeitForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION",
                ("fpn", "decode_head", "auxiliary_head"),
                ("decode_head.classifier", "auxiliary_head.classifier"),
                own_loss=True,
                layers_read=_num_layers_read,
                normed=False,
            ),
            "BeitModel": Head("FEATURE_EXTRACTION"),
        },
        attention_scale="lambda_1",
        mlp_scale="lambda_2",
        unused=("relative_position_bias",),
        biased_masks=_has_position_biases,
    )
)
