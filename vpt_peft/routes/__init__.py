"""How prompts reach the layers of a backbone, and how an adapter's own modules stand in for the model's."""

from .attachment import Attachment
from .cache import ProjectionCache
from .doors import has_doors

__all__ = ["Attachment", "ProjectionCache", "has_doors"]
