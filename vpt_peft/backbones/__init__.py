"""Where transformers keeps the parts of a vision transformer: declarations, and the parts found in a live model."""

from . import beit, swin, upernet, vit  # noqa: F401  registers the declarations
from .architecture import ARCHITECTURES, Architecture, Head, register_architecture
from .backbone import Backbone, Layer, find_backbone
from .classifier import add_classifier

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Backbone",
    "Head",
    "Layer",
    "add_classifier",
    "find_backbone",
    "register_architecture",
]
