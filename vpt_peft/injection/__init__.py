"""How prompts reach the layers of a backbone, and adapters' modules replace the model's."""

from .context import AdapterBatch, ForwardContext, activate, disable, is_disabled
from .injector import Injector, has_overrides

__all__ = [
    "AdapterBatch",
    "ForwardContext",
    "Injector",
    "activate",
    "disable",
    "has_overrides",
    "is_disabled",
]
