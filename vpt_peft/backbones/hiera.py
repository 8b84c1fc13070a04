"""Hiera: a hierarchy of layers, some of which pool their tokens and change their width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .architecture import Architecture, Head, register_architecture
from .swin import num_layers_read


def mask_unit_attention(
    module: Any, attend: Callable[..., Any], hidden_states: Tensor, output_attentions: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The forward of ``HieraMaskUnitAttention`` with prompts as keys and values, which each mask unit attends to.

    Args:
        module: the attention module.
        attend: see :func:`vpt_peft.injection.attention.attend`.
        hidden_states: ``(num_images, num_tokens · num_units, width)``, the tokens of a unit ``num_units`` apart.
    """
    num_images, length, _ = hidden_states.shape
    num_tokens = module.query_stride * module.window_size if module.use_mask_unit_attn else length

    def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = (query * module.scale) @ key.transpose(-1, -2)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    heads = module.qkv(hidden_states).unflatten(-1, (3, module.num_heads, -1)).unflatten(1, (num_tokens, -1))
    query, key, value = heads.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # (num_images · num_units, heads, tokens, dim)
    if module.query_stride > 1:
        query = query.unflatten(2, (module.query_stride, -1)).max(2).values
    output, weights = attend(attention, query, key, value, None, module.scale)
    output = output.flatten(2).unflatten(0, (num_images, -1)).transpose(1, 2).flatten(1, 2)
    of_heads = weights.unflatten(0, (num_images, -1)).transpose(1, 2)
    return module.proj(output), of_heads if output_attentions else None


register_architecture(
    Architecture(
        model_type="hiera",
        heads={
            "HieraForImageClassification": Head(
                "IMAGE_CLASSIFICATION", ("classifier",), pooled_norm="hiera.pooler.layernorm"
            ),
            "HieraBackbone": Head("FEATURE_EXTRACTION", layers_read=num_layers_read),
            "HieraModel": Head("FEATURE_EXTRACTION"),
        },
        layers="encoder.stages",
        final_norm=None,
        attention="attn",
        qkv="qkv",
        o_proj="proj",
        attention_forward=mask_unit_attention,
        unused=("proj",),
        num_prefix_tokens=0,
        blocks="layers",
        key_value_only="some layers pool the tokens of a mask unit and change their width",
    )
)
