"""How prompts reach the layers of a backbone, and adapters' modules replace the model's."""

from .cached_input import CachedInput, FeatureEntry
from .context import AdapterBatch, ForwardContext, activate, disable, is_disabled
from .injector import Injector, has_overrides
from .locations import enter_image

__all__ = [
    "AdapterBatch",
    "CachedInput",
    "FeatureEntry",
    "ForwardContext",
    "Injector",
    "activate",
    "disable",
    "enter_image",
    "has_overrides",
    "is_disabled",
]
