"""Projections of prompts that are kept between calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class ProjectionCache:
    """Queries, keys and values of one adapter's prompts by layer, kept while the model serves.

    They are used again only while the prompts have equal values and the layer's weights are the same tensors at the
    same version. Nothing is kept where gradients are needed, a graph is traced, or autocast may change the precision
    between calls.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]], list[tuple[int, int, int]], list[Tensor]]] = {}

    def get(
        self, layer: int, tokens: Tensor, modules: Sequence[nn.Module], compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """The projections of a layer's prompts, computed again if what they depend on has changed.

        Args:
            tokens: the prompts, ``(1, p, width)``.
            modules: the modules through which ``compute`` passes them.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(tokens.device.type):
            return compute()
        weights = [weight for module in modules for weight in _parameters(module)]
        if any(weight.is_inference() for weight in weights):  # they have no version
            return compute()
        versions = [(id(weight), weight.data_ptr(), weight._version) for weight in weights]
        kept = self._kept.get(layer)
        if kept is None or kept[2] != versions or not _equal(kept[0], tokens):
            # The weights and views are kept, so that no other tensor can get the same id or address. The address of
            # a quantised weight is always 0.
            kept = tokens.clone(), [(weight, weight.detach()) for weight in weights], versions, compute()
            self._kept[layer] = kept
        return kept[3]


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Its parameters; for a module without submodules much faster than ``module.parameters()``."""
    if module._modules:
        return list(module.parameters())
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same in precision, shape, place and values."""
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
