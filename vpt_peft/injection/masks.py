"""Attention masks, padded for prompts: every kind of mask that transformers makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils.import_utils import is_tracing

from ..backbones import Backbone
from ..errors import RouteError


def pad_mask(mask: Any, key: Tensor, num_prompts: int, pad_queries: bool, valid_mask: Tensor | None = None) -> Any:
    """Pads the attention mask of an image for prompts as further keys and, with ``pad_queries``, as further queries.

    Prompts have no position, so no bias, and are never masked. As queries they attend to every key that any image
    token attends to. Where no mask is needed, None stays None: the fused kernels are fastest without one.

    Args:
        mask: None; a tensor ``(..., num_queries, num_keys)``, boolean, True where visible, or additive; or a
            ``BlockMask`` of flex attention.
        key: keys of image tokens, ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
        num_prompts: number of prompts of each image, with padding, p.
        valid_mask: ``(num_images, p)``, False for padding; None: there is none.
    """
    if isinstance(mask, BlockMask):
        return _pad_block_mask(mask, num_prompts, pad_queries, valid_mask)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            got = f"a tensor of {mask.ndim}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise RouteError(
                f"attention_mask must have 4 dimensions or be None, got {got}. "
                "Leave attention_mask out, or use the 'sdpa' or 'eager' attention implementation."
            )
        if pad_queries:
            mask = torch.cat([mask, _visible_to_any(mask).expand(*mask.shape[:-2], num_prompts, -1)], dim=-2)
        mask = nn.functional.pad(mask, (0, num_prompts), value=1.0 if mask.dtype == torch.bool else 0.0)
    return mask if valid_mask is None else _mask_padding(mask, key, valid_mask)


def adds_boolean_mask(backbone: Backbone, mask: Any) -> bool:
    """Whether an encoder that is given this mask would add a boolean one to its position biases.

    transformers makes such a mask, True for all image tokens, while a graph is traced. The bias of 1 changes nothing
    among image tokens, but prompts would have none.
    """
    return mask is None and backbone.biased_masks and is_tracing()


def _mask_padding(mask: Tensor | None, key: Tensor, valid_mask: Tensor) -> Tensor:
    """Hides the padding among the last keys from all queries."""
    num_windows = key.shape[0] // valid_mask.shape[0]
    valid = valid_mask.repeat_interleave(num_windows, dim=0)[:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        return mask & nn.functional.pad(valid, (mask.shape[-1] - valid.shape[-1], 0), value=True)
    bias = key.new_zeros(valid.shape).masked_fill(~valid, torch.finfo(key.dtype).min)
    bias = nn.functional.pad(bias, (key.shape[2], 0))
    return bias if mask is None else mask + bias


def _visible_to_any(mask: Tensor) -> Tensor:
    """Mask of a query that attends, without bias, to every key that any query attends to: ``(..., 1, num_keys)``."""
    if mask.dtype == torch.bool:
        return mask.any(dim=-2, keepdim=True)
    best = mask.amax(dim=-2, keepdim=True)
    return torch.where(best < torch.finfo(mask.dtype).min / 2, best, torch.zeros_like(best))


def _pad_block_mask(mask: BlockMask, num_prompts: int, pad_queries: bool, valid_mask: Tensor | None) -> BlockMask:
    num_images, num_heads, num_queries, num_keys = mask.shape
    image_mask = mask.mask_mod

    def visible(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        to_image = image_mask(image, head, query.clamp(max=num_queries - 1), key.clamp(max=num_keys - 1))
        if valid_mask is None:
            return to_image | (key >= num_keys)
        to_prompt = valid_mask[image, (key - num_keys).clamp(min=0)]
        return torch.where(key < num_keys, to_image, to_prompt)

    rows = num_queries + num_prompts * pad_queries
    device = str(mask.kv_num_blocks.device)
    images = num_images if valid_mask is None else valid_mask.shape[0]
    return create_block_mask(visible, images, num_heads, rows, num_keys + num_prompts, device, mask.BLOCK_SIZE)
