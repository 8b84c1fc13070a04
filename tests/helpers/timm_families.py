"""Models of timm in the classes of transformers: tiny ones by the arguments of ``timm.create_model``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .families import IMAGE_SIZE, NUM_LABELS, PATCH_SIZE, Arguments, Family

VIT = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": 24, "depth": 3, "num_heads": 4, "mlp_ratio": 2}
EVA = {**VIT, "embed_dim": 32}  # rotary embeddings take heads of 4, 8, ...


@contextmanager
def _unrotated(layer: Any, prefix: int, number: int, args: Any, kwargs: Any) -> Iterator[Arguments]:
    """For rotary embeddings, which leave out the first tokens: prompts are not rotated."""
    layer.attn.num_prefix_tokens += number
    try:
        yield args, kwargs
    finally:
        layer.attn.num_prefix_tokens -= number


def _timm(architecture: str, sizes: dict[str, Any], classifier: bool = True, **fields: Any) -> Family:
    """A tiny model of an architecture of timm, with or without a classifier.

    Args:
        sizes: arguments of ``timm.create_model`` for the tiny model, and not for that of published size.
        fields: those of :class:`Family`, and ``two_classifiers``: they are not of the kind that the tests know.
    """
    is_eva = sizes.items() >= EVA.items()
    two_classifiers = fields.pop("two_classifiers", False)
    config = {"architecture": architecture, "model_args": sizes}
    fields = {"patch_norm": "timm_model.norm_pre", **fields}
    return Family(
        "TimmWrapperForImageClassification" if classifier else "TimmWrapperModel",
        "TimmWrapperConfig",
        {**config, "num_labels": NUM_LABELS} if two_classifiers else config,
        layers="timm_model.blocks",
        final_norm="timm_model.norm",
        classifier="timm_model.head" if classifier and not two_classifiers else None,
        pooled_norm="timm_model.fc_norm",
        adapt=_unrotated if is_eva else None,
        published={"architecture": architecture},
        needs_no_labels=False,
        package="timm",
        **fields,
    )


WITHOUT_CLASS_TOKEN = {**VIT, "class_token": False, "global_pool": "avg"}
QK_NORM = {**VIT, "qk_norm": True, "init_values": 0.1, "qkv_bias": False}
MEAN_OF_PATCHES = {**VIT, "global_pool": "avg"}
ALL_NORMS = {**EVA, "scale_mlp": True, "qk_norm": True}

TIMM_FAMILIES: dict[str, Family] = {
    "timm_vit": _timm("vit_tiny_patch16_224", VIT),
    "timm_vit_without_class_token": _timm("vit_tiny_patch16_224", WITHOUT_CLASS_TOKEN, num_prefix_tokens=0,
                                          same_layers=True),
    "timm_vit_mean_of_patches": _timm("vit_tiny_patch16_224", MEAN_OF_PATCHES, same_layers=True),
    "timm_vit_qk_norm": _timm("vit_tiny_patch16_224", QK_NORM),
    "timm_vit_model": _timm("vit_tiny_patch16_224", VIT, classifier=False),
    "timm_vit_qk_norm_model": _timm("vit_tiny_patch16_224", QK_NORM, classifier=False, same_layers=True),
    "timm_clip": _timm("vit_base_patch16_clip_224", VIT, same_layers=True),
    "timm_deit_distilled": _timm("deit_tiny_distilled_patch16_224", VIT, two_classifiers=True, num_prefix_tokens=2,
                                 same_layers=True),
    "timm_deit_distilled_model": _timm("deit_tiny_distilled_patch16_224", VIT, classifier=False, num_prefix_tokens=2,
                                       same_layers=True),
    "timm_siglip": _timm("vit_base_patch16_siglip_224", VIT, num_prefix_tokens=0),
    "timm_siglip_model": _timm("vit_base_patch16_siglip_224", VIT, classifier=False, num_prefix_tokens=0,
                               same_layers=True),
    "timm_dinov2": _timm("vit_small_patch14_dinov2", VIT, same_layers=True),
    "timm_dinov2_registers": _timm("vit_small_patch14_reg4_dinov2", VIT, num_prefix_tokens=5),
    "timm_dinov2_registers_model": _timm("vit_small_patch14_reg4_dinov2", VIT, classifier=False, num_prefix_tokens=5,
                                         same_layers=True),
    "timm_aimv2": _timm("aimv2_large_patch14_224", VIT, num_prefix_tokens=0, patch_norm="timm_model.patch_embed.norm"),
    "timm_eva": _timm("eva_giant_patch14_224", EVA, same_layers=True),
    "timm_eva02": _timm("eva02_tiny_patch14_224", EVA),
    "timm_eva02_model": _timm("eva02_tiny_patch14_224", EVA, classifier=False, same_layers=True),
    "timm_eva02_unfused": _timm("eva02_base_patch14_224", ALL_NORMS),
    "timm_dinov3": _timm("vit_small_patch16_dinov3", EVA, num_prefix_tokens=5),
    "timm_dinov3_model": _timm("vit_small_patch16_dinov3", EVA, classifier=False, num_prefix_tokens=5,
                               same_layers=True),
    "timm_rope": _timm("vit_small_patch16_rope_224", EVA),
    "timm_perception_encoder": _timm("vit_pe_core_tiny_patch16_384", EVA, same_layers=True),
}  # fmt: skip
