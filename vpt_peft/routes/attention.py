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
from ..errors import RouteError
from ..passes import Visit, current
from .doors import View

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
    if not isinstance(visit, Visit) or visit.step is None:
        return attend(bare, query, key, value, attention_mask, **kwargs)

    visit.met = True
    layer, as_tokens, num_images = visit.layer, visit.step.route == "tokens", visit.of.num_images
    num_windows, num_tokens = query.shape[0] // num_images, query.shape[2]
    prompts = visit.of.prompts(layer.index, num_images) if visit.step.fresh else visit.entered
    normalized = layer.normalize(prompts)

    def project(name: str, like: Tensor) -> Tensor:
        heads = layer.part(name)(normalized).unflatten(-1, (-1, like.shape[-1])).transpose(1, 2)
        return in_windows(heads.to(like.dtype), num_images, num_windows)

    key = torch.cat([key, project("key", key)], dim=2)
    value = torch.cat([value, project("value", value)], dim=2)
    if as_tokens:
        query = torch.cat([query, project("query", query)], dim=2)
    mask = pad_mask(attention_mask, prompts.shape[1], as_tokens)
    attended, weights = attend(bare, query, key, value, mask, **kwargs)
    if as_tokens:
        became = attended[:, num_tokens:].flatten(2).unflatten(0, (num_images, num_windows)).mean(1)
        visit.left = layer.finish(prompts, layer.part("output")(became))
        attended = attended[:, :num_tokens]
        weights = weights if weights is None else weights[:, :, :num_tokens]
    return attended, weights


def in_windows(heads: Tensor, num_images: int, num_windows: int) -> Tensor:
    """Prompts of all images, ``(1 or num_images, num_heads, p, head_dim)``, in every window of their image:
    ``(num_images · num_windows, num_heads, p, head_dim)``, windows ordered by image."""
    windows = heads.unsqueeze(1).expand(num_images, num_windows, -1, -1, -1)
    return windows.flatten(0, 1)


def pad_mask(mask: Any, num_prompts: int, for_queries: bool) -> Any:
    """The image's attention mask with room for prompts behind its keys and, ``for_queries``, behind its queries.

    Prompts have no position, so no bias, and are never masked. As queries they see what any image token may see.
    A mask that does not exist stays so (the fused kernels are fastest without).

    Args:
        mask: None; boolean, True where visible; or additive; ``(..., num_queries, num_keys)``.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        came = f"{mask.ndim}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
        raise RouteError(
            f"Prompts need an attention mask of 4 dimensions or none, got a {came} one. "
            "Leave attention_mask out, or use the 'sdpa' or 'eager' attention implementation."
        )
    if for_queries:
        if mask.dtype == torch.bool:
            visible = mask.any(dim=-2, keepdim=True)
        else:
            reach = mask.amax(dim=-2, keepdim=True)
            hidden = torch.finfo(mask.dtype).min / 2
            visible = torch.where(reach < hidden, reach, torch.zeros_like(reach))
        mask = torch.cat([mask, visible.expand(*mask.shape[:-2], num_prompts, -1)], dim=-2)
    return nn.functional.pad(mask, (0, num_prompts), value=True if mask.dtype == torch.bool else 0.0)
