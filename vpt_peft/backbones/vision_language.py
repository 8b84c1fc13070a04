"""Vision models of vision-language models: AIMv2, MLCD, InternVL and BLIP-2."""

from .architecture import Architecture, Head, register_architecture
from .clip import register_clip

register_architecture(
    Architecture(
        model_type="aimv2_vision_model",
        heads={"Aimv2VisionModel": Head("FEATURE_EXTRACTION")},
        layers="encoder.layers",
        final_norm="rms_norm",
        norm="rms_norm1",
        o_proj="out_proj",
        mlp_norm="rms_norm2",
        mlp="ffn",
        num_prefix_tokens=0,
        patch_projection="embeddings.patch_embed",
        patch_norm="embeddings.rms_norm",
    )
)
register_clip("mlcd_vision_model", {"MLCDVisionModel": Head("FEATURE_EXTRACTION")}, batch_first=False)
register_architecture(
    Architecture(
        model_type="internvl_vision",
        heads={"InternVLVisionModel": Head("FEATURE_EXTRACTION")},
        layers="encoder.layer",
        o_proj="projection_layer",
        q_norm="q_norm",
        k_norm="k_norm",
        attention_scale="lambda_1",
        mlp_scale="lambda_2",
    )
)
register_architecture(
    Architecture(
        model_type="blip_2_vision_model",
        heads={"Blip2VisionModel": Head("FEATURE_EXTRACTION")},
        layers="encoder.layers",
        final_norm="post_layernorm",
        norm="layer_norm1",
        attention="self_attn",
        qkv="qkv",
        o_proj="projection",
        mlp_norm="layer_norm2",
        patch_projection="embeddings.patch_embedding",
    )
)
