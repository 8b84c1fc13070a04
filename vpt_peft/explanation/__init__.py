"""What prompts do: the attention of an image with an adapter and without, as numbers and as a picture."""

from .attention import Explanation, explain_attention
from .drawing import draw_explanation
from .image_file import explain
from .recorder import LayerAttention

__all__ = ["Explanation", "LayerAttention", "draw_explanation", "explain", "explain_attention"]
