"""Families whose layers are in stages and attend within windows: Swin V2 and Hiera, with prompts computed by hand.

Their layers take no further tokens, so each is written out here, one window at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .families import IMAGE_SIZE, Family

Prefix = tuple[Tensor, Tensor] | None
# Stages of 8 x 8 and 4 x 4 patches. Windows of 4: the first stage is shifted. Of 3: both are, and are padded.
SWIN = {
    "image_size": IMAGE_SIZE, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4, "mlp_ratio": 2.0, "encoder_stride": 8,
}  # fmt: skip
PADDED = {**SWIN, "window_size": 3, "pretrained_window_sizes": [6, 0]}
# The first two stages attend within mask units, the second pools its tokens, the third changes their width alone.
HIERA = {
    "image_size": [IMAGE_SIZE, IMAGE_SIZE], "patch_size": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3],
    "embed_dim": 8, "depths": [1, 2, 1], "num_heads": [1, 2, 4], "mlp_ratio": 2.0, "num_query_pool": 1,
    "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False],
}  # fmt: skip


def _split(tokens: Tensor, num_heads: int) -> Tensor:
    """``(..., n, width)`` by head: ``(..., num_heads, n, head_dim)``."""
    return tokens.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _apart(query: Tensor, prefix: Prefix) -> Tensor | float:
    """Attention of queries ``(..., num_heads, n, head_dim)`` to a prefix."""
    if prefix is None:
        return 0.0
    key, value = (_split(part, query.shape[-3]) for part in prefix)
    return (query @ key.transpose(-2, -1)).softmax(-1) @ value


def _regions(size: int, window: int, shift: int) -> Tensor:
    """Number of the part that each row or column of a shifted image comes from."""
    regions = torch.zeros(size)
    regions[size - window : size - shift], regions[size - shift :] = 1, 2
    return regions


def _swinv2_bias(attention: Any, window: int) -> Tensor:
    """Position bias of the tokens of a window, ``(num_heads, n, n)``."""
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window)).to(attention.logit_scale)
    distance = place[:, None] - place[None, :]
    pretrained = attention.pretrained_window_size[0]
    distance = 8 * distance / ((pretrained if pretrained > 0 else window) - 1)
    distance = distance.sign() * (distance.abs() + 1).log2() / 3
    return 16 * torch.sigmoid(attention.continuous_position_bias_mlp(distance)).permute(2, 0, 1)


def swinv2_layer(
    layer: Any, tokens: Tensor, size: tuple[int, int], prompts: Tensor, prefix: Prefix
) -> tuple[Tensor, Tensor]:
    """A layer of Swin V2: prompts come first in each window of an image.

    Args:
        tokens: ``(num_images, height · width, width)``.
        size: height and width.
        prompts: ``(num_images, num_prompts, width)``.

    Returns:
        What tokens and prompts become.
    """
    (height, width), window, shift = size, layer.window_size, layer.shift_size
    attention, number = layer.attention.self, prompts.shape[1]
    heads = attention.num_attention_heads
    image = nn.functional.pad(tokens.unflatten(1, size), (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = image.shape[1:3]
    image = image.roll((-shift, -shift), (1, 2))
    region = 3 * _regions(rows, window, shift)[:, None] + _regions(columns, window, shift)
    scale = attention.logit_scale.exp().clamp(max=100)
    attended, of_prompts = torch.zeros_like(image), []
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            part = (slice(top, top + window), slice(left, left + window))
            joined = torch.cat([prompts, image[:, part[0], part[1]].flatten(1, 2)], dim=1)
            query, key, value = (
                _split(projection(joined), heads) for projection in (attention.query, attention.key, attention.value)
            )
            bias = joined.new_full((heads, joined.shape[1], joined.shape[1]), 8.0)  # 16 sigmoid(0)
            bias[:, number:, number:] = _swinv2_bias(attention, window)
            if shift:
                own = region[part].flatten()
                bias[:, number:, number:] -= 200.0 * (own[:, None] != own[None, :])
            weights = (scale * (_unit(query) @ _unit(key).transpose(-2, -1)) + bias).softmax(-1)
            output = (weights @ value + _apart(scale * _unit(query), prefix)).transpose(1, 2).flatten(2)
            output = layer.attention.output.dense(output)
            of_prompts.append(output[:, :number])
            attended[:, part[0], part[1]] = output[:, number:].unflatten(1, (window, window))
    attended = attended.roll((shift, shift), (1, 2))[:, :height, :width].flatten(1, 2)

    def finish(before: Tensor, attended: Tensor) -> Tensor:
        after = before + layer.layernorm_before(attended)
        return after + layer.layernorm_after(layer.output(layer.intermediate(after)))

    return finish(tokens, attended), finish(prompts, torch.stack(of_prompts).mean(0))


@contextmanager
def swinv2_by_hand(
    model: Any, prompts: Mapping[int, Tensor], prefixes: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[list[Tensor]]:
    """A context in which the layers of a bare Swin V2 are computed by hand, with prompts and prefixes."""
    encoder = next(module for module in model.modules() if type(module).__name__ == "Swinv2Encoder")
    carried: list[Tensor] = []

    def run(index: int, layer: Any, tokens: Tensor, size: tuple[int, int], *args: Any) -> tuple[Tensor, ...]:
        none = tokens[:, :0]
        own = prompts[index].expand(len(tokens), -1, -1) if index in prompts else carried[0] if carried else none
        output, became = swinv2_layer(layer, tokens, size, own, prefixes[index] if prefixes else None)
        carried[:] = [became]
        return (output,)

    def merge(merging: Any, *_: Any) -> None:
        carried[:] = [merging.norm(merging.reduction(torch.cat([carried[0]] * 4, dim=-1)))]

    layers = [layer for stage in encoder.layers for layer in stage.blocks]
    handles = [stage.downsample.register_forward_hook(merge) for stage in encoder.layers if stage.downsample]
    with _overridden(layers, run):
        yield carried
    for handle in handles:
        handle.remove()


def hiera_layer(layer: Any, tokens: Tensor, prompts: Tensor | None, prefix: Prefix) -> Tensor:
    """A layer of Hiera: each mask unit attends to the prompts ``(num_prompts, width)`` beside its own tokens."""
    attention, heads = layer.attn, layer.attn.num_heads
    normed = layer.layernorm_before(tokens)
    weights, biases = attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3)
    units = normed.shape[1] // (attention.query_stride * attention.window_size) if attention.use_mask_unit_attn else 1
    parts = []
    for unit in range(units):
        own = seen = normed[:, unit::units]
        if prompts is not None:
            seen = torch.cat([own, layer.layernorm_before(prompts).expand(len(own), -1, -1)], dim=1)
        query, key, value = (
            _split(nn.functional.linear(read, weight, bias), heads)
            for read, weight, bias in zip((own, seen, seen), weights, biases, strict=True)
        )
        query = torch.stack(query.chunk(attention.query_stride, dim=2)).amax(0) / query.shape[-1] ** 0.5
        output = (query @ key.transpose(-2, -1)).softmax(-1) @ value + _apart(query, prefix)
        parts.append(output.transpose(1, 2).flatten(2))
    attended = attention.proj(torch.stack(parts, dim=2).flatten(1, 2))
    if layer.hidden_size != layer.hidden_size_output:
        tokens = torch.stack(layer.proj(normed).chunk(layer.query_stride, dim=1)).amax(0)
    tokens = tokens + attended
    return tokens + layer.mlp(layer.layernorm_after(tokens))


@contextmanager
def hiera_by_hand(
    model: Any, prompts: Mapping[int, Tensor], prefixes: Sequence[tuple[Tensor, Tensor]]
) -> Iterator[list[Tensor]]:
    """A context in which the layers of a bare Hiera are computed by hand, with prompts and prefixes."""
    encoder = next(module for module in model.modules() if type(module).__name__ == "HieraEncoder")

    def run(index: int, layer: Any, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return hiera_layer(layer, tokens, prompts.get(index), prefixes[index] if prefixes else None), None

    with _overridden([layer for stage in encoder.stages for layer in stage.layers], run):
        yield []


@contextmanager
def _overridden(layers: Sequence[Any], run: Callable[..., Any]) -> Iterator[None]:
    for index, layer in enumerate(layers):
        layer.forward = partial(run, index, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _swinv2(name: str, prefix: str = "swinv2.", config: Mapping[str, Any] = SWIN, **fields: Any) -> Family:
    return Family(
        f"Swinv2{name}", "Swinv2Config", config, num_prefix_tokens=0, layers=f"{prefix}encoder.layers", blocks="blocks",
        final_norm=f"{prefix}layernorm", patch_norm=f"{prefix}embeddings.norm", mixes_biases=False,
        reference=swinv2_by_hand, first_layers=(0, 1), **fields,
    )  # fmt: skip


def _hiera(name: str, prefix: str = "hiera.", config: Mapping[str, Any] = HIERA, **fields: Any) -> Family:
    return Family(
        f"Hiera{name}", "HieraConfig", config, num_prefix_tokens=0, layers=f"{prefix}encoder.stages", blocks="layers",
        final_norm=None, reference=hiera_by_hand, key_value_only=True, **fields,
    )  # fmt: skip


STAGES = {"out_features": ["stage1", "stage2"]}
STAGE_FAMILIES: dict[str, Family] = {
    "swinv2": _swinv2("ForImageClassification", classifier="classifier"),
    "swinv2_padded": _swinv2("ForImageClassification", config=PADDED, classifier="classifier", same_layers=True),
    "swinv2_model": _swinv2("Model", "", same_layers=True),
    "swinv2_masked": _swinv2("ForMaskedImageModeling", same_layers=True),
    "swinv2_backbone": _swinv2("Backbone", "", {**SWIN, **STAGES}, same_layers=True),
    "hiera": _hiera("ForImageClassification", classifier="classifier", pooled_norm="hiera.pooler.layernorm"),
    "hiera_model": _hiera("Model", "", same_layers=True),
    "hiera_backbone": _hiera("Backbone", "", {**HIERA, "out_features": ["stage2", "stage3"]}, same_layers=True),
}
