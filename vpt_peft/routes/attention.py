"""Where prompts and image tokens meet: inside the attention, and nowhere else.

Prompts live beside the image's tokens, not among them, so that nothing that users see of the backbone changes its
shape. A layer's attention hands its queries, keys and values to a function that transformers looks up by name
(``AttentionInterface``); :func:`prompted_attention` takes that place, adds the prompts' keys and values to the
image's, and calls the function that would have been called. In the tokens route it adds the prompts' queries too and
finishes the layer for the prompts; in the key/value route that work is never done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..backbones import Layer
from ..passes import Visit, current
from .doors import View
from .masks import pad_mask
from .seating import Guest, Seating, find_guests, seat_guests

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
    config: Any = module.config
    attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config.bare._attn_implementation, config.eager
    )
    bare = View(module, config=config.bare)
    visit = current.value
    guests = find_guests(visit) if isinstance(visit, Visit) else []
    if not guests or not isinstance(visit, Visit):
        return attend(bare, query, key, value, attention_mask, **kwargs)

    num_tokens = query.shape[2]
    if isinstance(attention_mask, Tensor) and attention_mask.shape[-1] != num_tokens:
        # Swin on an image smaller than its window: an error of the backbone's own, and not the prompts'
        return attend(bare, query, key, value, attention_mask, **kwargs)

    visit.met = True
    layer, num_images = visit.layer, visit.of.num_images
    num_windows = query.shape[0] // num_images
    seating = seat_guests(guests, num_images)
    as_tokens = any(guest.lives_on for guest in guests)
    mask = pad_mask(attention_mask, query, seating.num_places, as_tokens, seating.taken)
    projected = project_prompts(layer, ("key", "value", "query") if as_tokens else ("key", "value"), seating, guests)

    def join(image: Tensor, prompts: Tensor) -> Tensor:
        heads = prompts.to(image.dtype).unflatten(-1, (-1, image.shape[-1])).transpose(1, 2)
        images = image.unflatten(0, (num_images, num_windows))
        return torch.cat([images, seating.seat(heads, num_images, num_windows)], dim=3).flatten(0, 1)

    key, value = join(key, projected[0]), join(value, projected[1])
    if not as_tokens:
        return attend(bare, query, key, value, mask, **kwargs)

    query = join(query, projected[2])
    attended, weights = attend(bare, query, key, value, mask, **kwargs)
    became = attended[:, num_tokens:].flatten(2).unflatten(0, (num_images, num_windows)).mean(1)
    for guest in guests:
        if guest.lives_on:
            own = guest.group.select(became)[:, : guest.tokens.shape[1]]
            visit.left[guest.number] = layer.finish(guest.tokens, layer.part("output")(own))
    return attended[:, :num_tokens], weights if weights is None else weights[:, :, :num_tokens]


def project_prompts(layer: Layer, names: Sequence[str], seating: Seating, guests: Sequence[Guest]) -> list[Tensor]:
    """The prompts' keys, values and so on in a layer, each ``(..., width)``; from the cache, if they have one."""
    norm, projections = layer.part("norm"), [layer.part(name) for name in names]

    def compute() -> list[Tensor]:
        normalized = norm(seating.tokens)
        return [projection(normalized) for projection in projections]

    keep = guests[0].group.keep
    if keep is None or not guests[0].fresh:
        return compute()
    return keep(layer.index, (guests[0].group.prompts, norm, *projections), compute)
