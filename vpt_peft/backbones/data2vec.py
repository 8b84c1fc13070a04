"""Data2Vec-Vision: BEiT, with its own attention."""

from .architecture import Architecture, Head, register_architecture

register_architecture(
    Architecture(
        model_type="data2vec-vision",
        heads={
            "Data2VecVisionForImageClassification": Head(
                "IMAGE_CLASSIFICATION", ("classifier",), pooled_norm="data2vec_vision.pooler.layernorm"
            ),
            "Data2VecVisionForSemanticSegmentation": Head(
                "SEMANTIC_SEGMENTATION",
                ("fpn1", "fpn2", "decode_head", "auxiliary_head"),
                ("decode_head.classifier", "auxiliary_head.classifier"),
                own_loss=True,
                layers_read=lambda model: max(model.config.out_indices) - 1,  # of hidden_states, counted from 1
                normed=False,
            ),
            "Data2VecVisionModel": Head("FEATURE_EXTRACTION"),
        },
        layers="encoder.layer",
        q_proj="attention.query",
        k_proj="attention.key",
        v_proj="attention.value",
        o_proj="output.dense",
        caller="attention",
        uses_sdpa=True,
        mlp=("intermediate", "output"),
        attention_scale="lambda_1",
        mlp_scale="lambda_2",
        unused=("attention.attention.relative_position_bias",),
    )
)
