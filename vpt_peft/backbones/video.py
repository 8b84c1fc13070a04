"""Video models: VideoMAE, ViViT and V-JEPA 2, whose tokens are patches of several frames."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, Head, register_architecture

FEATURES = Head("FEATURE_EXTRACTION")


def _video_shape(encoder: Any) -> tuple[int, int, int, int]:
    config = encoder.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_frames, config.num_channels, height, width


def _vjepa2_shape(encoder: Any) -> tuple[int, int, int, int]:
    config = encoder.config
    return config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size


register_architecture(
    Architecture(
        model_type="videomae",
        heads={
            "VideoMAEForVideoClassification": Head("VIDEO_CLASSIFICATION", ("classifier",), pooled_norm="fc_norm"),
            "VideoMAEModel": FEATURES,
        },
        layers="encoder.layer",
        q_proj="attention.query",
        k_proj="attention.key",
        v_proj="attention.value",
        o_proj="output.dense",
        caller="attention",
        mlp=("intermediate", "output.dense"),
        num_prefix_tokens=0,
        input_dims=5,
        video_shape=_video_shape,
    )
)
register_architecture(
    Architecture(
        model_type="vivit",
        heads={
            "VivitForVideoClassification": Head("VIDEO_CLASSIFICATION", ("classifier",)),
            "VivitModel": FEATURES,
        },
        patch_size=lambda encoder: int(encoder.config.tubelet_size[1]),
        input_dims=5,
        video_shape=_video_shape,
    )
)
register_architecture(
    Architecture(
        model_type="vjepa2",
        heads={  # the classifier reads a pooling by attention; the predictor is of no use to it
            "VJEPA2ForVideoClassification": Head(
                "VIDEO_CLASSIFICATION", ("classifier",), unread=("vjepa2.predictor", "pooler")
            ),
            "VJEPA2Model": Head("FEATURE_EXTRACTION", unread=("predictor",), tokens_only={"skip_predictor": True}),
        },
        layers="encoder.layer",
        final_norm="encoder.layernorm",
        norm="norm1",
        q_proj="query",
        k_proj="key",
        v_proj="value",
        o_proj="proj",
        mlp_norm="norm2",
        num_prefix_tokens=0,
        input_name="pixel_values_videos",
        input_dims=5,
        video_shape=_vjepa2_shape,
        eager_masks=False,
    )
)
