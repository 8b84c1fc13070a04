"""One task: its prompts, the plan of its layers, its copies of head and modules, its labels."""

from .adapter import Adapter
from .dequantize import dequantize, is_quantized
from .labels import check_labels, make_labels
from .plan import LayerPlan, plan_layers
from .prefix import make_keys
from .projection_cache import ProjectionCache
from .prompts import Prompts

__all__ = [
    "Adapter",
    "LayerPlan",
    "ProjectionCache",
    "Prompts",
    "check_labels",
    "dequantize",
    "is_quantized",
    "make_keys",
    "make_labels",
    "plan_layers",
]
