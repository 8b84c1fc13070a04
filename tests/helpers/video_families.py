"""The families of videos: see :mod:`helpers.families`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from helpers.families import IMAGE_SIZE, PATCH_SIZE, SIZES, Arguments, Family

NUM_FRAMES, TUBELET = 4, 2
VIDEOMAE = {**SIZES, "num_frames": NUM_FRAMES, "tubelet_size": TUBELET}
VIVIT = {**SIZES, "num_frames": NUM_FRAMES, "tubelet_size": [TUBELET, PATCH_SIZE, PATCH_SIZE]}
VJEPA2 = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 1.5, "patch_size": PATCH_SIZE,
    "crop_size": IMAGE_SIZE, "frames_per_clip": NUM_FRAMES, "tubelet_size": TUBELET, "num_pooler_layers": 1,
    "pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1, "pred_num_mask_tokens": 2,
}  # fmt: skip


def make_videos(images: Tensor) -> Tensor:
    """``(num_videos, num_frames, 3, height, width)``: each image in motion, fading."""
    return torch.stack([images.roll(5 * time, dims=-1) * 0.8**time for time in range(NUM_FRAMES)], dim=1)


def _feed(images: Tensor, name: str = "pixel_values", **options: Any) -> dict[str, Any]:
    return {name: make_videos(images), **options}


@contextmanager
def _placed(layer: Any, prefix: int, number: int, args: Any, kwargs: Any) -> Iterator[Arguments]:
    """V-JEPA 2 counts its tokens to rotate them: prompts stand at the origin, where nothing is rotated."""
    attention = layer.attention
    count = attention.get_position_ids

    def get_position_ids(tokens: Tensor, masks: Any = None) -> tuple[Tensor, ...]:
        assert masks is None
        return tuple(nn.functional.pad(places, (number, 0)) for places in count(tokens[:, number:]))

    attention.get_position_ids = get_position_ids
    try:
        yield args, kwargs
    finally:
        del attention.get_position_ids


def _vjepa2(name: str, prefix: str = "", **fields: Any) -> Family:
    """A class of V-JEPA 2; its parts are at ``prefix``."""
    options = fields.pop("options", {})
    return Family(
        name, "VJEPA2Config", VJEPA2, num_prefix_tokens=0, layers=f"{prefix}encoder.layer",
        final_norm=f"{prefix}encoder.layernorm", adapt=_placed, takes_pixels=False, needs_no_labels=False,
        feed=partial(_feed, name="pixel_values_videos", **options), **fields,
    )  # fmt: skip


VIDEOS: dict[str, Any] = {"feed": _feed, "takes_pixels": False}

VIDEO_FAMILIES: dict[str, Family] = {
    "videomae": Family(
        "VideoMAEForVideoClassification", "VideoMAEConfig", VIDEOMAE, num_prefix_tokens=0,
        layers="videomae.encoder.layer", final_norm=None, classifier="classifier", pooled_norm="fc_norm", **VIDEOS,
    ),
    "videomae_first_token": Family(
        "VideoMAEForVideoClassification", "VideoMAEConfig",
        {**VIDEOMAE, "use_mean_pooling": False, "qkv_bias": False}, num_prefix_tokens=0,
        layers="videomae.encoder.layer", final_norm="videomae.layernorm", classifier="classifier", same_layers=True,
        **VIDEOS,
    ),
    "videomae_model": Family(
        "VideoMAEModel", "VideoMAEConfig", VIDEOMAE, num_prefix_tokens=0, layers="encoder.layer", final_norm=None,
        same_layers=True, **VIDEOS,
    ),
    "videomae_model_with_norm": Family(
        "VideoMAEModel", "VideoMAEConfig", {**VIDEOMAE, "use_mean_pooling": False}, num_prefix_tokens=0,
        layers="encoder.layer", same_layers=True, **VIDEOS,
    ),
    "vivit": Family(
        "VivitForVideoClassification", "VivitConfig", VIVIT, layers="vivit.layers", final_norm="vivit.layernorm",
        classifier="classifier", **VIDEOS,
    ),
    "vivit_model": Family("VivitModel", "VivitConfig", VIVIT, same_layers=True, **VIDEOS),
    "vjepa2": _vjepa2("VJEPA2ForVideoClassification", "vjepa2.", classifier="classifier"),
    "vjepa2_model": _vjepa2("VJEPA2Model", options={"skip_predictor": True}),
    "vjepa2_model_with_predictor": _vjepa2("VJEPA2Model", same_layers=True),
}  # fmt: skip
