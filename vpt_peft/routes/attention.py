"""Where prompts and image tokens meet: inside the attention, and nowhere else.

Prompts live beside the image's tokens, not among them, so that nothing that users see of the backbone changes its
shape. A layer's attention hands its queries, keys and values to a function that transformers looks up by name
(``AttentionInterface``); :func:`prompted_attention` takes that place, adds the prompts' keys and values to the
image's, and calls the function that would have been called. In the tokens route it adds the prompts' queries too and
finishes the layer for the prompts; in the key/value route that work is never done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..backbones import Layer
from ..passes import Visit, current
from .doors import View
from .masks import pad_mask
from .seating import find_guests, seat_guests

NAME = "vpt_peft"


class AttentionDoor:
    """Sends one attention module's call to :func:`prompted_attention`, whatever implementation is set.

    The module looks up its implementation in ``module.config``; there it finds a view of that config that names ours.
    The config itself stays as it is: masks are made for the implementation that the user has set, at any time.
    """

    def __init__(self, layer: Layer) -> None:
        self.module = layer.part("attention")

    def attach(self) -> None:
        AttentionInterface.register(NAME, prompted_attention)
        self.config = self.module.config
        eager = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        self.module.config = View(self.config, _attn_implementation=NAME, bare=self.config, eager=eager)

    def detach(self) -> None:
        self.module.config = self.config


def prompted_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of image tokens to image tokens and prompts.

    Args:
        module: the attention module.
        query, key, value: ``(num_images · num_windows, num_heads, num_tokens, head_dim)`` of the image's tokens.
        attention_mask: as the implementation set by the user takes it.

    Returns:
        The output ``(num_images · num_windows, num_tokens, num_heads, head_dim)``, and the weights of the image's
        queries, if there are any, in which prompts are further keys behind the image's.
    """
    config = module.config
    attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config.bare._attn_implementation, config.eager
    )
    bare = View(module, config=config.bare)
    visit = current.get()
    guests = find_guests(visit) if isinstance(visit, Visit) else []
    if not guests or not isinstance(visit, Visit):
        return attend(bare, query, key, value, attention_mask, **kwargs)

    visit.met = True
    layer, num_images = visit.layer, visit.of.num_images
    num_windows, num_tokens = query.shape[0] // num_images, query.shape[2]
    seating = seat_guests(guests, num_images)
    normalized = layer.part("norm")(seating.tokens)

    def project(name: str, like: Tensor) -> Tensor:
        heads = layer.part(name)(normalized).unflatten(-1, (-1, like.shape[-1])).transpose(1, 2)
        return seating.seat(heads.to(like.dtype), num_images, num_windows)

    as_tokens = any(guest.lives_on for guest in guests)
    mask = pad_mask(attention_mask, query, seating.num_places, as_tokens, seating.taken)
    key = torch.cat([key, project("key", key)], dim=2)
    value = torch.cat([value, project("value", value)], dim=2)
    if not as_tokens:
        return attend(bare, query, key, value, mask, **kwargs)

    query = torch.cat([query, project("query", query)], dim=2)
    attended, weights = attend(bare, query, key, value, mask, **kwargs)
    became = attended[:, num_tokens:].flatten(2).unflatten(0, (num_images, num_windows)).mean(1)
    for guest in guests:
        if guest.lives_on:
            own = guest.group.select(became)[:, : guest.tokens.shape[1]]
            visit.left[guest.number] = layer.finish(guest.tokens, layer.part("output")(own))
    return attended[:, :num_tokens], weights if weights is None else weights[:, :, :num_tokens]
