"""The prefix of an adapter: keys and values that each layer's attention attends to apart from the image."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone, Layer
from ..config import PromptConfig
from .dequantize import dequantize, is_quantized
from .modules import clone
from .prompts import draw_prompts

PARTS = ("key", "value")


class Prefix(nn.Module):
    """Parameters ``{layer}.key`` and ``{layer}.value``, each ``(num_tokens, num_heads · head_dim)``.

    With ``projection_dim``, they are that wide, see :func:`~.prompts.make_projection`.

    Values start at zero, so that a new adapter does not change the features. Keys start as those that the layer makes
    of randomly drawn prompts, so that they have the scale of the image's.

    Args:
        config: the adapter's config.
        layers: indices of the layers with a prefix, in order.
        backbone: the backbone, which is not changed.
        device: device of the parameters; on "meta" they are not initialised.
    """

    def __init__(self, config: PromptConfig, layers: Iterable[int], backbone: Backbone, device: torch.device) -> None:
        super().__init__()
        layers = list(layers)
        self.shared_layer = layers[0] if config.shared and layers else None
        for index in layers if self.shared_layer is None else [self.shared_layer]:
            layer = backbone.layers[index]
            width = config.projection_dim or layer.key_width
            pair = {part: nn.Parameter(torch.zeros(config.num_tokens, width, device=device)) for part in PARTS}
            self.add_module(str(index), nn.ParameterDict(pair))
            if device.type != "meta":
                draw_keys(pair["key"], config, layer, backbone.patch_size)

    def __getitem__(self, layer: int) -> nn.ParameterDict:
        """``key`` and ``value`` of a layer."""
        pair: nn.ParameterDict = getattr(self, str(layer if self.shared_layer is None else self.shared_layer))
        return pair


@torch.no_grad()
def draw_keys(keys: Tensor, config: PromptConfig, layer: Layer, patch_size: int) -> None:
    """Overwrites keys ``(num_tokens, width)`` of a layer with initial values."""
    if config.projection_dim:
        draw_prompts(keys, config.init, patch_size)
    else:
        prompts = torch.empty(len(keys), layer.width, device=keys.device)
        keys.copy_(make_keys(layer, draw_prompts(prompts, config.init, patch_size)))


def make_keys(layer: Layer, tokens: Tensor) -> Tensor:
    """The keys that a layer makes of tokens ``(num_tokens, width)``: ``(num_tokens, num_heads · head_dim)``."""
    normalized = layer.attention_input(layer.to_layer(tokens))
    projection = layer.part("k_proj")
    if projection is not None and is_quantized(projection):  # some are packed, for good, when they are called
        dense: Any = dequantize(clone(projection), "k_proj")
        keys = dense(normalized.to(dense.weight.dtype))
    else:
        (keys,) = layer.project("k", normalized)
    heads = keys.unflatten(-1, (-1, layer.head_dim)).transpose(-3, -2)
    return layer.normalize("k", heads).transpose(-3, -2).flatten(-2)
