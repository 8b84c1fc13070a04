"""How prompts enter that are no tokens beside the image's; :mod:`vpt_peft.adapter.locations` says what they are.

- add, add-shared: added to the tokens that enter a layer, ``E_i = L_i(E_{i-1} + P_{i-1})``.
- border: put around the image where it enters the model.
- channel: as further channels of the image in the patch embedding.

Prompts at "prepend" and "pixel" meet the image's tokens in the attention, see :mod:`.attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import AdapterError, RouteError
from .context import AdapterBatch, ForwardContext, LayerContext


def add_to_tokens(context: LayerContext, *args: Any) -> tuple[Any, ...]:
    """The positional arguments of a layer, with the prompts of ``location="add"`` and ``"add-shared"`` in the first.

    Args:
        args: tokens ``(num_images, num_tokens, width)``, then others.

    Raises:
        RouteError: the layer has another number of tokens than there are prompts.
    """
    forward, layer = context.forward, context.layer
    for batch, plan in zip(forward.batches, context.plans, strict=True):
        if batch.adapter is not None and plan is not None and plan.route == "add":
            prompts = batch.adapter.fresh_prompts(layer.index, forward.count_images(batch), forward.backbone)
            number = None if batch.adapter.config.location == "add-shared" else prompts.shape[1]
            tokens = args[0] if args else None
            if not isinstance(tokens, Tensor) or number not in (None, tokens.shape[1]):
                got = tuple(tokens.shape) if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
                raise RouteError(
                    f"Expected {number or 'the'} tokens as the first argument of layer {layer.index}, to which prompts "
                    f"are added, got {got}. Use images of the size in the backbone's config, or another location."
                )
            if forward.tasks is not None:
                prompts = prompts * (forward.tasks == forward.batches.index(batch))[:, None, None]
            args = (_add(tokens, prompts, batch), *args[1:])
    return args


def _add(tokens: Tensor, prompts: Tensor, batch: AdapterBatch) -> Tensor:
    """Adds prompts, ``(1 or images of the adapter, 1 or num_tokens, width)``, to the tokens of the adapter's images."""
    prompts = prompts.to(tokens.device, tokens.dtype)
    if batch.rows is None:
        return tokens + prompts
    rows = torch.tensor(batch.rows, device=tokens.device)
    return tokens.index_add(0, rows, prompts.expand(len(batch.rows), *tokens.shape[1:]))


def enter_image(context: ForwardContext, images: Tensor) -> Tensor:
    """The images, with the border of ``location="border"`` around them.

    Args:
        images: ``(num_images, num_channels, height, width)``.

    Raises:
        AdapterError: an adapter's prompts fit images of another size only.
    """
    for batch in context.batches:
        if batch.adapter is not None and batch.adapter.image_size not in (None, tuple(images.shape[-2:])):
            height, width = batch.adapter.image_size
            raise AdapterError(
                f'location="{batch.adapter.config.location}" has prompts for images of {height} x {width} pixels, got '
                f"{images.shape[-2]} x {images.shape[-1]}. Resize them, for example with processor(images, "
                f'size={{"height": {height}, "width": {width}}}, return_tensors="pt").'
            )
    adapter = context.batches[0].adapter  # adapters with prompts in the image are never mixed with others
    if adapter is None or not adapter.is_in_image or adapter.config.location != "border":
        return images
    top, bottom, left, right = (
        adapter.fresh_prompts(side, context.num_images, context.backbone)
        .to(images.device, images.dtype)
        .expand(context.num_images, -1, -1, -1)
        for side in ("top", "bottom", "left", "right")
    )
    context.image_reached = True
    return torch.cat([top, torch.cat([left, images, right], dim=3), bottom], dim=2)


def project_with_channels(context: ForwardContext, adapter: Adapter, projection: Any, images: Tensor) -> Tensor:
    """The patch embedding of images with the prompts of ``location="channel"`` as further channels.

    Computed in two parts, ``W [E, P] = W_E E + W_P P``, of which the second is computed once per batch, and always in
    float32: in bfloat16, oneDNN's convolutions of some numbers of channels are wrong on processors with AMX.

    Args:
        projection: the adapter's copy, whose last input channels are the prompts'.
        images: ``(num_images, num_channels, height, width)``.
    """
    weight: Tensor = projection.weight
    prompts = adapter.fresh_prompts("channels", len(images), context.backbone).to(weight.device)
    of_images, of_prompts = weight.split([weight.shape[1] - prompts.shape[1], prompts.shape[1]], dim=1)
    context.image_reached = True
    convolve = partial(
        nn.functional.conv2d, stride=projection.stride, padding=projection.padding, dilation=projection.dilation
    )
    dtype = images.dtype if torch.is_autocast_enabled(images.device.type) else weight.dtype
    embedded = convolve(images.to(weight.device, dtype), of_images, projection.bias)
    with torch.autocast(weight.device.type, enabled=False):
        return embedded + convolve(prompts.float(), of_prompts.float()).to(embedded.dtype)
