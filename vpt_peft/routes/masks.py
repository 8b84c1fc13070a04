"""Attention masks with room for prompts, for every kind of mask that transformers makes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from ..errors import RouteError


def pad_mask(mask: Any, query: Tensor, num_prompts: int, for_queries: bool, taken: Tensor | None = None) -> Any:
    """The image's attention mask with room for prompts behind its keys and, ``for_queries``, behind its queries.

    Prompts have no position, so no bias, and are never masked. As queries they see what any image token may see.
    A mask that does not exist stays so where it can (the fused kernels are fastest without).

    Args:
        mask: None; a tensor ``(..., num_queries, num_keys)``, boolean, True where visible, or additive; or a
            ``BlockMask`` of flex attention.
        query: queries of image tokens, ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
        num_prompts: places for prompts beside an image, p.
        taken: ``(num_images, p)``, False where a place is empty; None: all are taken.
    """
    if isinstance(mask, BlockMask):
        return _pad_block_mask(mask, num_prompts, for_queries, taken)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 4:
            came = f"{mask.ndim}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
            raise RouteError(
                f"Prompts need an attention mask of 4 dimensions or none, got a {came} one. "
                "Leave attention_mask out, or use the 'sdpa' or 'eager' attention implementation."
            )
        if for_queries:
            mask = torch.cat([mask, _seen_by_any(mask).expand(*mask.shape[:-2], num_prompts, -1)], dim=-2)
        mask = nn.functional.pad(mask, (0, num_prompts), value=1.0 if mask.dtype == torch.bool else 0.0)
    return mask if taken is None else _hide_empty(mask, query, taken)


def _hide_empty(mask: Tensor | None, query: Tensor, taken: Tensor) -> Tensor:
    windows = query.shape[0] // taken.shape[0]
    taken = taken.repeat_interleave(windows, dim=0)[:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        return mask & nn.functional.pad(taken, (mask.shape[-1] - taken.shape[-1], 0), value=True)
    hidden = query.new_zeros(taken.shape).masked_fill(~taken, torch.finfo(query.dtype).min)
    hidden = nn.functional.pad(hidden, (query.shape[2], 0))
    return hidden if mask is None else mask + hidden


def _seen_by_any(mask: Tensor) -> Tensor:
    """A mask's row for a query that sees, without bias, each key that any query sees: ``(..., 1, num_keys)``."""
    if mask.dtype == torch.bool:
        return mask.any(dim=-2, keepdim=True)
    best = mask.amax(dim=-2, keepdim=True)
    return torch.where(best < torch.finfo(mask.dtype).min / 2, best, torch.zeros_like(best))


def _pad_block_mask(mask: BlockMask, num_prompts: int, for_queries: bool, taken: Tensor | None) -> BlockMask:
    num_images, num_heads, num_queries, num_keys = mask.shape
    of_image = mask.mask_mod

    def visible(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_token = of_image(image, head, query.clamp(max=num_queries - 1), key.clamp(max=num_keys - 1))
        if taken is None:
            return of_token | (key >= num_keys)
        of_prompt = taken[image, (key - num_keys).clamp(min=0)]
        return torch.where(key < num_keys, of_token, of_prompt)

    rows = num_queries + num_prompts * for_queries
    device = str(mask.kv_num_blocks.device)
    images = num_images if taken is None else taken.shape[0]
    return create_block_mask(visible, images, num_heads, rows, num_keys + num_prompts, device, mask.BLOCK_SIZE)
