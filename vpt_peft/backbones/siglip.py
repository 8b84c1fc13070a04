"""SigLIP and SigLIP 2: layers as in CLIP, no ``[CLS]``, and a pooling by attention behind the final norm."""

from __future__ import annotations

from functools import partial

from .architecture import Head
from .clip import register_clip

CLASSIFIER = Head("IMAGE_CLASSIFICATION", ("classifier",), encoder="vision_model", unread=("vision_model.head",))
# torch's MultiheadAttention reads the bias of its output layer without calling that.
DUAL_ENCODER = Head(
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    encoder="vision_model",
    unread=("text_model", "vision_model.head.attention"),
)
FEATURES = Head("FEATURE_EXTRACTION", unread=("head.attention",))

register_siglip = partial(register_clip, pre_norm=None, normed_output=True, num_prefix_tokens=0)
register_siglip("siglip", {"SiglipForImageClassification": CLASSIFIER, "SiglipModel": DUAL_ENCODER})
register_siglip("siglip_vision_model", {"SiglipVisionModel": FEATURES})

# Images are rows of patches, (num_images, num_patches, channels * patch_size * patch_size), with padding.
register_siglip2 = partial(register_siglip, input_dims=3, token_mask="pixel_attention_mask")
register_siglip2("siglip2", {"Siglip2ForImageClassification": CLASSIFIER, "Siglip2Model": DUAL_ENCODER})
register_siglip2("siglip2_vision_model", {"Siglip2VisionModel": FEATURES})
