"""Attention to a prefix: ``softmax(query key^T) value`` for few keys that many queries share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fused import (
    attention,
    attention_backward,
    count_missing,
    fill_registers,
    is_fused,
    make_additive,
    may_differentiate,
)

FEW_KEYS = 16  # up to here, products of matrices are faster than the fused kernel


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Attention that keeps no scores for the backward pass.

    Args:
        query: ``(num_images, num_heads, num_queries, head_dim)``.
        key, value: ``(num_images, num_heads, num_keys, head_dim)``; the keys contain the scale of the products.
        valid_mask: ``(num_images, num_keys)``, False for padding; None: there is none.
    """
    if query.is_cuda or not may_differentiate(query):
        return sdpa(query, key, value, valid_mask)
    mask = None if valid_mask is None else make_additive(valid_mask[:, None, None, :], query.dtype)
    fused = key.shape[2] > FEW_KEYS and is_fused(query, key, value)
    missing = count_missing(query, key.shape[2]) if fused else 0
    if missing:
        key, value, filled = fill_registers(key, value, missing)
        mask = filled if mask is None else nn.functional.pad(mask, (0, missing), value=-torch.inf)
    output: Tensor = PrefixAttention.apply(fused, query, key, value, mask)  # type: ignore[no-untyped-call]
    return output


def sdpa(query: Tensor, key: Tensor, value: Tensor, valid_mask: Tensor | None) -> Tensor:
    """:func:`prefix_attention` by PyTorch, whose fused kernels on a GPU keep no scores either."""
    visible = None if valid_mask is None else valid_mask[:, None, None, :]
    return nn.functional.scaled_dot_product_attention(query, key, value, visible, scale=1.0)


class PrefixAttention(torch.autograd.Function):
    """See :func:`prefix_attention`: attention that is computed again in the backward pass, which is cheap."""

    @staticmethod
    def forward(ctx: Any, fused: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.fused = fused
        if fused:
            return attention(query, key, value, attn_mask=mask, scale=1.0)[0]
        return probabilities(query, key, mask).transpose(-1, -2) @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        if ctx.fused:
            again = attention(query, key, value, attn_mask=mask, scale=1.0)
            gradients = attention_backward(gradient, query, key, value, *again, 0.0, False, attn_mask=mask, scale=1.0)
            return None, *gradients, None
        of_values = probabilities(query, key, mask)
        of_probabilities = value @ gradient.transpose(-1, -2)
        of_scores = torch.ops.aten._softmax_backward_data(of_probabilities, of_values, -2, of_values.dtype)
        return None, of_scores.transpose(-1, -2) @ key, of_scores @ query, of_values @ gradient, None


def probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """``(num_images, num_heads, num_keys, num_queries)``, a layout for many queries and few keys: on a CPU, the softmax
    is several times faster over the rows of a matrix than over its columns."""
    scores = key @ query.transpose(-1, -2)
    return (scores if mask is None else scores + mask.transpose(-1, -2)).softmax(-2)
