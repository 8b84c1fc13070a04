"""A cache of prompts' keys and values, for serving: they are the same for every batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Fingerprint = tuple[tuple[int, int, torch.dtype, torch.device], ...]


class ProjectionCache:
    """Projections of one adapter's prompts by layer, each kept as long as all that it was computed from is the same.

    A tensor counts as the same while its storage, device, precision and version are; what writes past torch's
    version counter (``tensor.data``) is not seen. Nothing is kept where gradients are wanted, a graph is traced, or
    autocast may change the precision from call to call.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Fingerprint, list[Tensor]]] = {}

    def keep(self, layer: int, sources: Sequence[nn.Module], compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """A layer's projections, computed anew if any parameter of ``sources`` has changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type(sources)):
            return compute()
        fingerprint = tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype, tensor.device)
            for source in sources
            for tensor in source.parameters()
        )
        kept = self._kept.get(layer)
        if kept is None or kept[0] != fingerprint:
            kept = fingerprint, compute()
            self._kept[layer] = kept
        return kept[1]


def device_type(sources: Sequence[nn.Module]) -> str:
    return next(sources[0].parameters()).device.type
