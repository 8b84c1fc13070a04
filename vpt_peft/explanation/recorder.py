"""Records attention weights while a backbone runs, with and without prompts.

All families call ``F.scaled_dot_product_attention`` in the end, with the prompts as the last keys, if their attention
implementation is "sdpa". There the weights are computed once more, for the queries that are asked for:

    weights = softmax(q [k_E, k_P]^T / sqrt(head_dim) + mask)

so that neither the implementation that the user has set nor the family has to return them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..backbones import Backbone, Layer
from ..errors import UnsupportedModelError
from ..injection.attention import attend_to_prefixes
from ..injection.context import current_layer
from ..injection.overrides import AttributeProxy
from ..injection.prompt_batch import gather_prefixes

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """Where the reading tokens of one image look in one layer: their attention weights, averaged over these tokens.

    For each head, the weights of patches, prefix tokens and prompts add up to 1 (in Swin, together with the tokens that
    pad its windows). All tensors are float32 on the CPU.

    Attributes:
        patches: ``(num_heads, rows, columns)``, the patches in the places that they have in the image.
        prefix_tokens: ``(num_heads, num_prefix_tokens)``, ``[CLS]`` first.
        prompts: ``(num_heads, num_prompts)``; none for a prefix, which has a softmax of its own.
        prompt_share: how much comes from the prompts, from 0 to 1; None: the attention of this layer has none.
            Token prompts: the sum of their weights, averaged over the heads. A prefix: ``|a_P| / (|a_E| + |a_P|)``,
            averaged over the reading tokens, where ``a_E`` is the output of the attention to the image and ``a_P`` that
            of the attention to the prefix, of all heads, in front of the output projection of their sum.
    """

    patches: Tensor
    prefix_tokens: Tensor
    prompts: Tensor
    prompt_share: float | None


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Which tokens of an image the rows of a layer's attention are.

    Attributes:
        index: ``(num_windows, num_rows)``, numbers of the tokens, ``num_tokens`` for padding; one window: all tokens.
        num_tokens: number of tokens of the image.
        grid: number of rows and columns of patches; tokens behind the last patch are padding.
    """

    index: Tensor
    num_tokens: int
    grid: tuple[int, int]


class AttentionRecorder(TorchFunctionMode):
    """While it is open, computes the attention weights of the layer that runs.

    Args:
        backbone: the backbone.
        reads_class_token: the reading token is ``[CLS]``; False: all patches.
        grid: number of rows and columns of patches; None: each layer is told (Swin).

    Attributes:
        records: the attention of each layer that has run.
    """

    def __init__(self, backbone: Backbone, reads_class_token: bool, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_prefix_tokens = backbone.num_prefix_tokens
        self.reads_class_token = reads_class_token
        self.grid = grid
        self.records: dict[int, LayerAttention] = {}
        self._running: tuple[int, TokenLayout] | None = None

    def enter_layer(self, layer: Layer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of a layer.

        Raises:
            UnsupportedModelError: its tokens are not one for each patch.
        """
        arguments = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        if layer.architecture.blocks:
            layout = window_layout(module, arguments)
        else:
            hidden: Tensor = next(value for value in arguments.values() if isinstance(value, Tensor))
            assert self.grid is not None
            layout = TokenLayout(torch.arange(hidden.shape[1], device=hidden.device)[None], hidden.shape[1], self.grid)
        num_patches = layout.num_tokens - self.num_prefix_tokens
        if layout.grid[0] * layout.grid[1] > num_patches:
            raise UnsupportedModelError(
                f"A map of attention needs one token for each patch, got {num_patches} tokens for "
                f"{layout.grid[0]} x {layout.grid[1]} patches in layer {layer.index} ({type(module).__name__})."
            )
        self._running = layer.index, layout

    def leave_layer(self, *_: Any) -> None:
        """A forward hook of a layer."""
        self._running = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if function is nn.functional.scaled_dot_product_attention and self._running is not None:
            arguments = {**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **kwargs}
            index, layout = self._running
            self.records[index] = self._record(
                layout,
                arguments["query"],
                arguments["key"],
                arguments.get("attn_mask"),
                arguments.get("scale"),
                output,
            )
        return output

    def _record(
        self, layout: TokenLayout, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, output: Tensor
    ) -> LayerAttention:
        """
        Args:
            query, key: ``(num_windows, num_heads, num_rows and prompts, head_dim)``; queries may lack the prompts, and
                several heads of queries may share keys.
            mask: broadcast to ``(num_windows, num_heads, queries, keys)``, boolean or additive.
            output: ``(num_windows, num_heads, queries, head_dim)``.
        """
        num_rows = layout.index.shape[1]
        reading = self._reading(layout)
        read_by = reading / reading.sum()  # (num_windows, num_rows)
        weights = mean_weights(query[:, :, :num_rows], key, mask, scale, read_by)  # (num_heads, num_windows, keys)
        totals = weights.new_zeros(len(weights), layout.num_tokens + 1)
        totals.index_add_(1, layout.index.flatten(), weights[:, :, :num_rows].flatten(1))
        prompts = weights[:, :, num_rows:].sum(1)
        first, (rows, columns) = self.num_prefix_tokens, layout.grid
        return LayerAttention(
            patches=totals[:, first : first + rows * columns].unflatten(1, (rows, columns)).cpu(),
            prefix_tokens=totals[:, :first].cpu(),
            prompts=prompts.cpu(),
            prompt_share=prompts.sum(1).mean().item()
            if prompts.shape[1]
            else prefix_share(query, scale, output, read_by),
        )

    def _reading(self, layout: TokenLayout) -> Tensor:
        """1 for the rows of reading tokens, else 0: ``(num_windows, num_rows)``."""
        reading = torch.zeros(layout.num_tokens + 1, device=layout.index.device)
        first, (rows, columns) = self.num_prefix_tokens, layout.grid
        reading[0 if self.reads_class_token else slice(first, first + rows * columns)] = 1
        return reading[layout.index]


def mean_weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, read_by: Tensor) -> Tensor:
    """Attention weights, averaged over reading tokens.

    Args:
        query: ``(num_windows, num_heads, num_rows, head_dim)``.
        key: ``(num_windows, num_heads or fewer, num_keys, head_dim)``.
        mask: see :meth:`AttentionRecorder._record`.
        scale: factor of the products; None: ``head_dim ** -0.5``.
        read_by: weights of the rows in the average, ``(num_windows, num_rows)``.

    Returns:
        ``(num_heads, num_windows, num_keys)``, float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = read_by.sum(0).nonzero().flatten()
    shape = (*query.shape[:3], key.shape[2])
    if mask is not None:
        mask = mask[..., : shape[2], :].expand(shape)[:, :, rows]
    query, read_by = query[:, :, rows].float(), read_by[:, rows]
    heads = []
    for head in range(shape[1]):  # one after the other: weights of all tokens to all tokens are large
        scores = query[:, head] @ key[:, head * key.shape[1] // shape[1]].float().transpose(-1, -2) * scale
        if mask is not None:
            own = mask[:, head]
            scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
        heads.append(torch.einsum("wr,wrk->wk", read_by, scores.softmax(-1)))
    return torch.stack(heads)


def prefix_share(query: Tensor, scale: float | None, output: Tensor, read_by: Tensor) -> float | None:
    """The share of a prefix in the output of the attention, see :class:`LayerAttention`; None: there is none.

    Args:
        query, output: ``(num_windows, num_heads, num_rows, head_dim)``, of the attention to the image.
        read_by: weights of the rows in the average, ``(num_windows, num_rows)``.
    """
    context = current_layer()
    prefixes = gather_prefixes(context, query.device) if context is not None else []
    if context is None or not prefixes:
        return None
    of_image = output.transpose(1, 2)
    of_prefix = attend_to_prefixes(torch.zeros_like(of_image), query, prefixes, context.forward, scale)
    image, prefix = (part.flatten(2).float().norm(dim=-1) for part in (of_image, of_prefix))
    return float((read_by * (prefix / (image + prefix))).sum())


def window_layout(module: Any, arguments: dict[str, Any]) -> TokenLayout:
    """The tokens in the windows of a layer of Swin, as that shifts and pads them.

    Args:
        arguments: of the layer's forward.
    """
    height, width = arguments["input_dimensions"]
    size, shift = module.window_size, module.shift_size
    if min(height, width) <= size and not arguments.get("always_partition", False):
        size, shift = min(height, width), 0
    tokens = torch.arange(height * width, device=next(module.parameters()).device).view(height, width)
    padded = nn.functional.pad(tokens, (0, -width % size, 0, -height % size), value=height * width)
    shifted = padded.roll((-shift, -shift), dims=(0, 1))
    windows = shifted.unflatten(1, (-1, size)).unflatten(0, (-1, size)).transpose(1, 2)  # (down, across, size, size)
    return TokenLayout(windows.reshape(-1, size * size), height * width, (height, width))


@contextmanager
def record_attention(
    backbone: Backbone, layers: Sequence[int], reads_class_token: bool, grid: tuple[int, int] | None
) -> Iterator[dict[int, LayerAttention]]:
    """A context in which the attention of layers is recorded, of the last forward pass of one image.

    The model is unchanged afterwards, also after an error. Inside, it computes attention by the "sdpa" implementation.

    Args:
        layers: indices of the layers.
        reads_class_token, grid: see :class:`AttentionRecorder`.
    """
    recorder = AttentionRecorder(backbone, reads_class_token, grid)
    with ExitStack() as stack:
        stack.enter_context(_using_sdpa(backbone))
        for index in layers:
            layer = backbone.layers[index]
            enter = partial(recorder.enter_layer, layer)
            stack.callback(layer.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.module.register_forward_hook(recorder.leave_layer).remove)
        stack.enter_context(recorder)
        yield recorder.records


@contextmanager
def _using_sdpa(backbone: Backbone) -> Iterator[None]:
    """A context in which the backbone uses the "sdpa" implementation of attention, and makes the masks for it."""
    configs = [backbone.encoder.config]
    if not backbone.architecture.uses_sdpa:
        configs += [layer.part("caller").config for layer in backbone.layers]
    # Those of the attention are proxies of the configs that the user has set, see AttentionOverride.
    originals = [config._original if isinstance(config, AttributeProxy) else config for config in configs]
    previous = {id(config): (config, config._attn_implementation) for config in originals}
    changed = [(config, name) for config, name in previous.values() if name != "sdpa"]
    try:
        for config, _ in changed:
            config._attn_implementation = "sdpa"
        yield
    finally:
        for config, name in changed:
            config._attn_implementation = name
