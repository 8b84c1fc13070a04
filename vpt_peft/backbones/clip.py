"""Vision transformers of CLIP's kind: CLIP, MetaCLIP 2, Chinese-CLIP, AltCLIP, OWL-ViT, OWLv2 and GIT."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Head, register_architecture

# The classifier reads the mean of the patches, which has not passed the final norm. That is applied to [CLS] alone.
CLASSIFIER = Head("IMAGE_CLASSIFICATION", ("classifier",), encoder="vision_model", normed=False)
DUAL_ENCODER = Head("ZERO_SHOT_IMAGE_CLASSIFICATION", encoder="vision_model", unread=("text_model", "text_projection"))
FEATURES = Head("FEATURE_EXTRACTION")
INNER_FEATURES = Head("FEATURE_EXTRACTION", encoder="vision_model")


def register_clip(
    model_type: str,
    heads: dict[str, Head],
    pre_norm: str | None = "pre_layrnorm",
    normed_output: bool = False,
    **parts: Any,
) -> None:
    """Declares a family with CLIP's layers.

    Args:
        pre_norm: the norm behind the embeddings.
        normed_output: the final norm is applied to all tokens, and not to ``[CLS]`` alone.
        parts: further fields of :class:`Architecture`.
    """
    register_architecture(
        Architecture(
            model_type,
            heads,
            layers="encoder.layers",
            final_norm="post_layernorm",
            norm="layer_norm1",
            attention="self_attn",
            o_proj="out_proj",
            mlp_norm="layer_norm2",
            patch_projection="embeddings.patch_embedding",
            patch_norm=pre_norm,
            normed_output=normed_output,
            **parts,
        )
    )


register_clip("clip", {"CLIPForImageClassification": CLASSIFIER, "CLIPModel": DUAL_ENCODER})
register_clip("clip_vision_model", {"CLIPVisionModel": FEATURES, "CLIPVisionModelWithProjection": INNER_FEATURES})
register_clip("metaclip_2", {"MetaClip2ForImageClassification": CLASSIFIER, "MetaClip2Model": DUAL_ENCODER})
register_clip(
    "metaclip_2_vision_model",
    {"MetaClip2VisionModel": FEATURES, "MetaClip2VisionModelWithProjection": INNER_FEATURES},
)
register_clip("chinese_clip", {"ChineseCLIPModel": DUAL_ENCODER})
register_clip("chinese_clip_vision_model", {"ChineseCLIPVisionModel": FEATURES})
register_clip("altclip", {"AltCLIPModel": DUAL_ENCODER})
register_clip("altclip_vision_model", {"AltCLIPVisionModel": FEATURES})
register_clip("git_vision_model", {"GitVisionModel": INNER_FEATURES}, normed_output=True)
register_clip("owlvit", {"OwlViTModel": DUAL_ENCODER}, pre_norm="pre_layernorm")
register_clip("owlvit_vision_model", {"OwlViTVisionModel": INNER_FEATURES}, pre_norm="pre_layernorm")
register_clip("owlv2", {"Owlv2Model": DUAL_ENCODER}, pre_norm="pre_layernorm")
register_clip("owlv2_vision_model", {"Owlv2VisionModel": INNER_FEATURES}, pre_norm="pre_layernorm")
