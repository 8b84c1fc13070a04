"""The prompts of one layer for a whole batch: gathered from the adapters, and expanded to each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .context import AdapterBatch, ForwardContext, LayerContext, activate_alone


@dataclass(eq=False)
class LayerPrompts:
    """The prompts of one adapter in one layer.

    Attributes:
        index: index of the adapter's batch in the forward pass.
        batch: that batch.
        tokens: ``(1 or images of the adapter, p, width)``; of a prefix, its keys and values side by side.
        fresh: they are the layer's own, not outputs of the previous layer.
        needs_output: their outputs are computed.
    """

    index: int
    batch: AdapterBatch
    tokens: Tensor
    fresh: bool
    needs_output: bool


@dataclass(eq=False)
class PromptBatch:
    """The prompts of all adapters in one layer, and which of them each image attends to.

    Attributes:
        tokens: ``(1 or num_images, p, width)`` for a single adapter, else ``(1, total, width)``.
        prompt_index: ``(num_images, p)``, indices into the ``total`` prompts; None for a single adapter.
        valid_mask: ``(num_images, p)``, False for padding; None if all images have the same number of prompts.
    """

    tokens: Tensor
    prompt_index: Tensor | None = None
    valid_mask: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of prompts of each image, with padding, p."""
        return self.tokens.shape[1] if self.prompt_index is None else self.prompt_index.shape[1]

    def append(self, image: Tensor, heads: Tensor, num_images: int) -> Tensor:
        """Appends queries, keys or values of the prompts to those of every window of every image.

        Args:
            image: ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
            heads: ``(1 or num_images, num_heads, p, head_dim)``, see :meth:`split_heads`.

        Returns:
            ``(num_images · num_windows, num_heads, num_tokens + p, head_dim)``.
        """
        if heads.dtype != image.dtype:
            heads = heads.to(image.dtype)
        num_rows = image.shape[0]
        if heads.shape[0] == 1 and torch.compiler.is_exporting():  # runtimes index faster than they expand
            heads = heads.index_select(0, torch.zeros(num_rows, dtype=torch.int64, device=heads.device))
        if heads.shape[0] in (1, num_rows):
            return torch.cat([image, heads.expand(num_rows, -1, -1, -1)], dim=2)
        windows = image.unflatten(0, (num_images, -1))
        heads = heads.unsqueeze(1).expand(-1, windows.shape[1], -1, -1, -1)
        return torch.cat([windows, heads], dim=3).flatten(0, 1)

    def split_heads(self, prompts: Tensor, image: Tensor) -> Tensor:
        """Queries, keys or values of the prompts of each image, by head.

        Args:
            image: queries, keys or values of the image, ``(..., head_dim)``.
            prompts: ``(1 or num_images, total, num_heads · head_dim)``, of :attr:`tokens`.

        Returns:
            ``(1 or num_images, num_heads, p, head_dim)``.
        """
        if self.prompt_index is not None:
            prompts = prompts[0].index_select(0, self.prompt_index.flatten()).view(*self.prompt_index.shape, -1)
        if prompts.dtype != image.dtype:
            prompts = prompts.to(image.dtype)
        num_images, num_tokens, _ = prompts.shape
        return prompts.view(num_images, num_tokens, -1, image.shape[-1]).transpose(1, 2)


def gather_prefixes(context: LayerContext, device: torch.device) -> list[LayerPrompts]:
    """The prefixes that the adapters have in a layer, on its device."""
    gathered = []
    layer, forward = context.layer.index, context.forward
    for index, (batch, plan) in enumerate(zip(forward.batches, context.plans, strict=True)):
        if plan is not None and plan.route == "prefix" and batch.adapter is not None:
            prefix = batch.adapter.fresh_prefix(layer, forward.count_images(batch)).to(device)
            gathered.append(LayerPrompts(index, batch, prefix, fresh=True, needs_output=False))
    return gathered


def gather_prompts(context: LayerContext) -> list[LayerPrompts]:
    """The prompts that the adapters have as tokens of a layer."""
    gathered = []
    layer, forward = context.layer, context.forward
    for index, (batch, plan) in enumerate(zip(forward.batches, context.plans, strict=True)):
        if plan is None or plan.route in ("add", "prefix") or batch.adapter is None:
            continue
        tokens = context.prompts_in[index]
        if plan.fresh:
            is_pixel = batch.adapter.config.location == "pixel"
            with activate_alone(forward, batch) if is_pixel else nullcontext():  # through the patch embedding
                tokens = batch.adapter.fresh_prompts(layer.index, forward.count_images(batch), forward.backbone)
        assert tokens is not None  # the plan carries prompts only out of layers that have them
        gathered.append(LayerPrompts(index, batch, layer.to_layer(tokens), plan.fresh, plan.route == "tokens"))
    return gathered


def batch_prompts(prompts: Sequence[LayerPrompts], forward: ForwardContext) -> PromptBatch:
    """Batches the prompts of several adapters, padded to the longest."""
    first, num_images = prompts[0], forward.num_images
    if forward.tasks is not None:
        tokens = select_by_task({own.index: own.tokens for own in prompts}, forward)
        lengths = {own.index: own.tokens.shape[1] for own in prompts}
        table = [[row < lengths.get(task, 0) for row in range(tokens.shape[1])] for task in range(len(forward.batches))]
        valid_mask = None if all(map(all, table)) else torch.tensor(table, device=tokens.device)[forward.tasks]
        return PromptBatch(tokens, valid_mask=valid_mask)
    if first.batch.rows is None:
        return PromptBatch(first.tokens)
    shapes = first.tokens.device, *((own.index, *own.tokens.shape[:2]) for own in prompts)
    tables = forward.prompt_tables.get(shapes)
    if tables is None:
        tables = _make_tables(prompts, num_images)
        if not torch.compiler.is_compiling():  # the same in all layers of a device
            forward.prompt_tables[shapes] = tables
    return PromptBatch(torch.cat([own.tokens.flatten(0, 1) for own in prompts]).unsqueeze(0), *tables)


def _make_tables(prompts: Sequence[LayerPrompts], num_images: int) -> tuple[Tensor, Tensor | None]:
    """``prompt_index`` and ``valid_mask`` of a :class:`PromptBatch`."""
    longest = max(own.tokens.shape[1] for own in prompts)
    index = [[0] * longest for _ in range(num_images)]
    valid = [[False] * longest for _ in range(num_images)]
    total = 0
    for own in prompts:
        copies, length = own.tokens.shape[:2]
        for number, row in enumerate(own.batch.rows or ()):
            start = total + (length * number if copies > 1 else 0)
            index[row][:length] = range(start, start + length)
            valid[row][:length] = [True] * length
        total += copies * length
    device = prompts[0].tokens.device
    valid_mask = None if all(map(all, valid)) else torch.tensor(valid, device=device)
    return torch.tensor(index, device=device), valid_mask


def select_by_task(parts: Mapping[int, Tensor], forward: ForwardContext) -> Tensor:
    """For each image, what belongs to its own task; see ``tasks`` in :class:`~.context.ForwardContext`.

    Args:
        parts: ``{index of a part: (1 or num_images, length, ...)}``. Lengths may differ, and parts may be missing.

    Returns:
        ``(num_images, longest, ...)``, padded with zeros.
    """
    assert forward.tasks is not None
    longest = max(part.shape[1] for part in parts.values())
    example = next(iter(parts.values()))
    missing = example.new_zeros(1, longest, *example.shape[2:])
    padded = [_pad(parts.get(index, missing), longest) for index in range(len(forward.batches))]
    if all(part.shape[0] == 1 for part in padded):
        return torch.cat(padded).index_select(0, forward.tasks)
    stacked = torch.stack([part.expand(forward.num_images, *part.shape[1:]) for part in padded])
    return stacked[forward.tasks, torch.arange(forward.num_images, device=stacked.device)]


def _pad(part: Tensor, length: int) -> Tensor:
    """Zeros behind the second dimension, up to a length."""
    return nn.functional.pad(part, (*(0, 0) * (part.ndim - 2), 0, length - part.shape[1]))
