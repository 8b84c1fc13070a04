"""timm's VisionTransformer and Eva, in the classes that transformers has for models of timm."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from .architecture import Architecture, Head, register_architecture


def _refuse(layer_class: str, attention_classes: tuple[str, ...], model: Any) -> str | None:
    """For layers of these classes only, whose code is what :meth:`~.backbone.Layer.finish` computes for prompts."""
    reasons = (_refuse_layer(layer_class, attention_classes, layer) for layer in model.timm_model.blocks)
    return next(filter(None, reasons), None)


def _refuse_layer(layer_class: str, attention_classes: tuple[str, ...], layer: Any) -> str | None:
    attention: Any = getattr(layer, "attn", None)
    found = [type(layer).__name__, type(attention).__name__]
    if found[0] != layer_class or found[1] not in attention_classes:
        return (
            f"expected layers of class {layer_class} with {' or '.join(attention_classes)}, got "
            f"{' with '.join(found)}. Use a model with such layers: norms come first, and the MLP after the attention."
        )
    between = [f"attn.{name}" for name in ("norm", "gate") if not _is_empty(getattr(attention, name, None))]
    if between:
        return (
            f"expected nothing between the attention and its projection, got {' and '.join(between)}. Use a model "
            "without it."
        )
    if getattr(attention, "num_kv_groups", 1) > 1:
        return (
            f"expected as many heads of keys as of queries, got {attention.num_kv_heads} and {attention.num_heads}. "
            "Use a model without grouped queries."
        )
    if not attention.fused_attn:
        return (
            "expected an attention that calls F.scaled_dot_product_attention, got fused_attn=False. Call "
            "timm.layers.set_fused_attn(True) before the model is made."
        )
    return None


def _is_empty(module: Any) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _num_prefix_tokens(model: Any) -> int:
    return int(model.timm_model.num_prefix_tokens)


def _patch_size(model: Any) -> int:
    return int(model.timm_model.patch_embed.patch_size[0])


def _image_size(model: Any) -> tuple[int, int]:
    height, width = model.timm_model.patch_embed.img_size
    return int(height), int(width)


CLASSIFIER = Head(
    "IMAGE_CLASSIFICATION",
    ("timm_model.head",),
    encoder="",
    pooled_norm="timm_model.fc_norm",
    tokens="timm_model.norm",
    pooler="timm_model.attn_pool",
)
FEATURES = Head(
    "FEATURE_EXTRACTION",
    encoder="",
    pooled_norm="timm_model.fc_norm",
    reads_pooled=True,
    pooler="timm_model.attn_pool",
)
VISION_TRANSFORMER = Architecture(
    model_type="timm_wrapper",
    heads={
        "TimmWrapperForImageClassification": CLASSIFIER,
        "TimmWrapperModel": FEATURES,
    },
    wrapped=("timm_model", "VisionTransformer"),
    refuse=partial(_refuse, "Block", ("Attention",)),
    layers="timm_model.blocks",
    final_norm="timm_model.norm",
    norm="norm1",
    attention="attn",
    qkv="qkv",
    q_norm="q_norm",
    k_norm="k_norm",
    o_proj="proj",
    uses_sdpa=True,
    mlp_norm="norm2",
    attention_scale="ls1",
    mlp_scale="ls2",
    num_prefix_tokens=_num_prefix_tokens,
    patch_size=_patch_size,
    image_size=_image_size,
    patch_projection="timm_model.patch_embed.proj",
    patch_norm=("timm_model.patch_embed.norm", "timm_model.norm_pre"),
)
DISTILLED = replace(
    VISION_TRANSFORMER,
    heads={
        "TimmWrapperForImageClassification": replace(CLASSIFIER, paths=("timm_model.head", "timm_model.head_dist")),
        "TimmWrapperModel": FEATURES,
    },
    wrapped=("timm_model", "VisionTransformerDistilled"),
)
EVA = replace(
    VISION_TRANSFORMER,
    wrapped=("timm_model", "Eva"),
    refuse=partial(_refuse, "EvaBlock", ("EvaAttention", "AttentionRope")),
    attention_scale="gamma_1",
    mlp_scale="gamma_2",
)
register_architecture(VISION_TRANSFORMER)
register_architecture(DISTILLED)
register_architecture(EVA)
register_architecture(replace(EVA, qkv=None))
register_architecture(replace(EVA, q_bias="q_bias", v_bias="v_bias"))  # EvaAttention, where it fuses projections
