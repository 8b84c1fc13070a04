"""Where transformers keeps the parts of a vision transformer: declarations, and the parts found in a live model."""

from . import (  # noqa: F401  registers the declarations
    beit,
    clip,
    data2vec,
    deit,
    dinov2,
    dinov3,
    dpt,
    hiera,
    masked,
    siglip,
    swin,
    swinv2,
    timm,
    upernet,
    video,
    vision_language,
    vit,
    vitpose,
    yolos,
)
from .added_heads import add_classifier, add_decode_head
from .architecture import ARCHITECTURES, Architecture, Head, register_architecture
from .backbone import Backbone, Layer, find_backbone, find_class, list_classes

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Backbone",
    "Head",
    "Layer",
    "add_classifier",
    "add_decode_head",
    "find_backbone",
    "find_class",
    "list_classes",
    "register_architecture",
]
