"""Swin Transformer V2: norms behind attention and MLP, and cosine attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .architecture import Architecture, Head, register_architecture
from .swin import num_layers_read

MAX_LOGIT_SCALE = math.log(100)
BIAS_WITHOUT_POSITION = 8.0


def cosine_attention(
    module: Any,
    attend: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, ...]:
    """The forward of ``Swinv2SelfAttention`` with prompts, which pass through all that image tokens pass through.

    With ``n(x) = x / |x|`` and the factor ``s = exp(min(logit_scale, log 100))`` of each head, and the position bias
    ``B = 16 sigmoid(MLP(relative positions))`` (Liu et al., Swin Transformer V2, CVPR 2022, equation 2, section 3.3),
    image tokens ``E`` and prompts ``P`` get

        A_E = softmax([s n(q_E) n(k_E)^T + B, s n(q_E) n(k_P)^T + 8]) [v_E, v_P]
        A_P = softmax([s n(q_P) n(k_E)^T + 8, s n(q_P) n(k_P)^T + 8]) [v_E, v_P]

    Prompts have no position, so the MLP adds nothing for them: their bias is ``16 sigmoid(0) = 8``, the middle of its
    range. A bias of 0, the lowest there is, would give them e^-8 of the attention of an image token that is as similar.

    The keys of a prefix are learned in place of ``n(k_P)``; they have a softmax of their own, where a bias that is the
    same for all keys has no effect: ``A_E = softmax(s n(q_E) n(k_E)^T + B) v_E + softmax(s n(q_E) K^T) V``.

    Args:
        module: the attention module.
        attend: see :func:`vpt_peft.injection.attention.attend`.
        hidden_states: ``(num_images · num_windows, n, width)``.
        attention_mask: of shifted windows, ``(num_windows, n, n)``, additive.
    """
    num_tokens = hidden_states.shape[1]

    def split_heads(projection: nn.Module) -> Tensor:
        heads: Tensor = projection(hidden_states).unflatten(-1, (module.num_attention_heads, -1))
        return heads.transpose(1, 2)

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        added = (0, key.shape[2] - num_tokens, 0, query.shape[2] - num_tokens)
        of_prompts = nn.functional.pad(bias.new_zeros(num_tokens, num_tokens), added, value=BIAS_WITHOUT_POSITION)
        scores = query @ key.transpose(-2, -1) * scale + (bias + of_prompts)
        weights = module.dropout(scores.softmax(-1))
        return (weights @ value).transpose(1, 2), weights

    query, key = (nn.functional.normalize(split_heads(part), dim=-1) for part in (module.query, module.key))
    scale = module.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
    bias = position_bias(module)
    if attention_mask is not None:
        windows = bias + 2 * attention_mask.unsqueeze(1)  # transformers adds it twice
        bias = windows.repeat(len(query) // len(windows), 1, 1, 1)
    output, weights = attend(attention, query, key, split_heads(module.value), bias, scale)
    return (output.flatten(2), weights) if output_attentions else (output.flatten(2),)


def position_bias(module: Any) -> Tensor:
    """The continuous relative position bias of ``n`` tokens in a window, ``(1, num_heads, n, n)``."""
    height, width = module.window_size
    table = module.continuous_position_bias_mlp(module.relative_coords_table).view(-1, module.num_attention_heads)
    bias = table[module.relative_position_index.view(-1)].view(height * width, height * width, -1)
    return 16 * bias.permute(2, 0, 1).contiguous().sigmoid().unsqueeze(0)


SWINV2 = Architecture(
    model_type="swinv2",
    heads={
        "Swinv2ForImageClassification": Head("IMAGE_CLASSIFICATION", ("classifier",)),
        "Swinv2ForMaskedImageModeling": Head("MASKED_IMAGE_MODELING", ("decoder",)),
        "Swinv2Model": Head("FEATURE_EXTRACTION"),
    },
    layers="encoder.layers",
    post_norm=True,
    q_proj="self.query",
    k_proj="self.key",
    v_proj="self.value",
    o_proj="output.dense",
    logit_scale="self.logit_scale",
    caller="self",
    attention_forward=cosine_attention,
    mlp=("intermediate", "output"),
    unused=("attention.self.continuous_position_bias_mlp",),
    num_prefix_tokens=0,
    patch_norm="embeddings.norm",
    blocks="blocks",
    merging="downsample",
    batch_first=False,  # the MLP of the position bias
)
register_architecture(SWINV2)
register_architecture(
    replace(
        SWINV2,
        heads={"Swinv2Backbone": Head("FEATURE_EXTRACTION", layers_read=num_layers_read)},
        final_norm=None,
    )
)
