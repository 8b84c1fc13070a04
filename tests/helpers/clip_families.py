"""Families of CLIP's kind: vision models, classifiers, and dual encoders with a text model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .families import PATCH_SIZE, SIZES, Arguments, Family

NUM_TEXTS = 4
VISION = {**SIZES, "projection_dim": 12}
PATCHES = {name: value for name, value in VISION.items() if name != "image_size"} | {"num_patches": 16}
TEXT = {
    "hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 16, "projection_dim": 12, "projection_size": SIZES["hidden_size"], "project_dim": 20,
    "bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 1,
}  # fmt: skip
DUAL = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 12}
DUAL_SIGLIP = {"vision_config": VISION, "text_config": TEXT}
DUAL_SIGLIP2 = {"vision_config": PATCHES, "text_config": TEXT}


def some_texts(number: int = NUM_TEXTS) -> dict[str, Tensor]:
    """Token ids of texts of different lengths, with the end of the text in front of the padding."""
    ids = torch.randint(2, 38, (number, 8), generator=torch.Generator().manual_seed(4))
    lengths = torch.arange(number) % 5 + 3
    mask = (torch.arange(8) < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1).scatter(1, lengths[:, None] - 1, 39), "attention_mask": mask}


def image_and_texts(images: Tensor) -> dict[str, Any]:
    """Arguments of a dual encoder."""
    return {"pixel_values": images, **some_texts()}


def patches(images: Tensor) -> dict[str, Any]:
    """Arguments of SigLIP 2: patches in rows, of which different numbers are padding."""
    rows = nn.functional.unfold(images.float(), PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2).to(images)
    # by the content of an image, so that it is the same in any batch
    shapes = torch.stack([torch.tensor([4, 4 - int(image[0, 0, 0] > 0)]) for image in images])
    mask = (torch.arange(rows.shape[1]) < shapes.prod(1, keepdim=True)).long()
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def patches_and_texts(images: Tensor) -> dict[str, Any]:
    """Arguments of a dual encoder of SigLIP 2."""
    return {**patches(images), **some_texts()}


@contextmanager
def pad_mask(layer: nn.Module, prefix: int, number: int, args: Any, kwargs: Any) -> Iterator[Arguments]:
    """Prompts see all tokens that are no padding, and are seen by all."""
    (mask,) = args
    mask = mask[:, :, :1]  # the same for all tokens
    shown = torch.ones_like(mask[..., :1]) if mask.dtype == torch.bool else torch.zeros_like(mask[..., :1])
    seen = torch.cat([mask[..., :prefix], shown.expand(-1, -1, -1, number), mask[..., prefix:]], dim=-1)
    yield (seen.expand(-1, -1, seen.shape[-1], -1),), kwargs


def _vision(name: str, prefix: str = "", **fields: Any) -> Family:
    """A vision model; its parts are at ``prefix``."""
    values = {"config": VISION, "patch_norm": f"{prefix}pre_layrnorm", **fields}
    config_class = values.pop("config_class", f"{name.removesuffix('WithProjection').removesuffix('Model')}Config")
    return Family(name, config_class, layers=f"{prefix}encoder.layers", final_norm=f"{prefix}post_layernorm", **values)


def _dual(name: str, config: dict[str, Any] = DUAL, **fields: Any) -> Family:
    """A dual encoder."""
    values = {"feed": image_and_texts, "outputs": ("logits_per_image", "image_embeds"), "config": config, **fields}
    return _vision(f"{name}Model", "vision_model.", config_class=f"{name}Config", **values)


def _classifier(name: str, config: dict[str, Any] = DUAL, **fields: Any) -> Family:
    """A classifier. The initialisation in transformers, for CLIP in old versions, fails without labels."""
    values = {"classifier": "classifier", "config": config, "needs_no_labels": False, **fields}
    return _vision(f"{name}ForImageClassification", "vision_model.", config_class=f"{name}Config", **values)


WHOLE: dict[str, Any] = {"num_prefix_tokens": 0, "patch_norm": None}
PADDED: dict[str, Any] = {**WHOLE, "takes_pixels": False, "adapt": pad_mask}

CLIP_FAMILIES: dict[str, Family] = {
    "clip_vision": _vision("CLIPVisionModel"),
    "clip_projected": _vision("CLIPVisionModelWithProjection", "vision_model.", same_layers=True),
    "clip_classifier": _classifier("CLIP", normed=False, same_layers=True),
    "clip": _dual("CLIP"),
    "metaclip2_vision": _vision("MetaClip2VisionModel"),
    "metaclip2_projected": _vision("MetaClip2VisionModelWithProjection", "vision_model.", same_layers=True),
    "metaclip2_classifier": _classifier("MetaClip2", normed=False, same_layers=True),
    "metaclip2": _dual("MetaClip2", same_layers=True),
    "chinese_clip_vision": _vision("ChineseCLIPVisionModel"),
    "chinese_clip": _dual("ChineseCLIP", same_layers=True),
    "altclip_vision": _vision("AltCLIPVisionModel"),
    "altclip": _dual("AltCLIP", same_layers=True),
    "owlvit_vision": _vision("OwlViTVisionModel", "vision_model.", patch_norm="vision_model.pre_layernorm"),
    "owlvit": _dual("OwlViT", patch_norm="vision_model.pre_layernorm", same_layers=True),
    "owlv2": _dual("Owlv2", patch_norm="vision_model.pre_layernorm", same_layers=True),
    "owlv2_vision": _vision("Owlv2VisionModel", "vision_model.", patch_norm="vision_model.pre_layernorm"),
    "git_vision": _vision("GitVisionModel", "vision_model."),
    "siglip_vision": _vision("SiglipVisionModel", **WHOLE),
    "siglip_vision_without_head": _vision("SiglipVisionModel", config={**VISION, "vision_use_head": False},
                                          same_layers=True, **WHOLE),
    "siglip_classifier": _classifier("Siglip", DUAL_SIGLIP, **WHOLE, same_layers=True),
    "siglip": _dual("Siglip", DUAL_SIGLIP, **WHOLE),
    "siglip2_vision": _vision("Siglip2VisionModel", config=PATCHES, feed=patches, **PADDED, same_layers=True),
    "siglip2_classifier": _classifier("Siglip2", DUAL_SIGLIP2, feed=patches, **PADDED, same_layers=True),
    "siglip2": _dual("Siglip2", DUAL_SIGLIP2, **{**PADDED, "feed": patches_and_texts}),
}  # fmt: skip
