"""The prompts of an adapter, and their projection to the widths of the backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import PromptConfig


def uniform_bound(patch_size: int, dim: int) -> float:
    """Bound of the initial uniform distribution of prompts: ``sqrt(6 / (3 · patch² + dim))``.

    The Xavier bound of a linear map from an RGB patch of ``patch_size`` pixels a side to ``dim`` channels
    (Jia et al., ECCV 2022, section 3).
    """
    return math.sqrt(6 / (3 * patch_size**2 + dim))


def draw_prompts(prompts: Tensor, init: str, patch_size: int) -> Tensor:
    """Overwrites prompts ``(..., dim)`` with initial values, and returns them.

    Args:
        init: ``"uniform"`` or ``"normal"``, as in :class:`~vpt_peft.PromptConfig`.
        patch_size: side of the backbone's patches in pixels, see :func:`uniform_bound`.
    """
    if init == "normal":
        return nn.init.normal_(prompts, std=0.02)
    bound = uniform_bound(patch_size, prompts.shape[-1])
    return nn.init.uniform_(prompts, -bound, bound)


class Prompts(nn.Module):
    """One parameter for each layer with fresh prompts, named by the layer's index, or for each part of the image.

    Args:
        config: the adapter's config.
        shapes: ``{name: shape}``, see :func:`~vpt_peft.adapter.locations.prompt_shapes`; of shared prompts, all have
            the first one's parameter.
        patch_size: side of the backbone's patches in pixels, see :func:`uniform_bound`.
        device: device of the parameters; on "meta" they are not initialised.
    """

    def __init__(
        self, config: PromptConfig, shapes: Mapping[str, tuple[int, ...]], patch_size: int, device: torch.device
    ) -> None:
        super().__init__()
        self.shared_name = next(iter(shapes), None) if config.shared else None
        for name in shapes if self.shared_name is None else [self.shared_name]:
            self.register_parameter(name, nn.Parameter(torch.empty(shapes[name], device=device)))
        if device.type != "meta":
            for prompts in self.parameters():
                if config.location == "border" and config.init == "uniform":
                    nn.init.uniform_(prompts)  # pixels
                else:
                    draw_prompts(prompts, config.init, patch_size)

    def __getitem__(self, name: int | str) -> Tensor:
        """The prompts of a layer, or of a part of the image."""
        prompts: Tensor = getattr(self, str(name) if self.shared_name is None else self.shared_name)
        return prompts


def make_projection(config: PromptConfig, widths: Mapping[int, int], device: torch.device) -> nn.Module | None:
    """Projection from ``projection_dim`` to the widths of the layers.

    Args:
        widths: ``{layer: width}`` of the layers with fresh prompts.

    Returns:
        A linear layer or, for a prefix, an ``nn.ModuleDict`` of one for ``key`` and one for ``value``; if there are
        several widths, an ``nn.ModuleDict`` of those by width. None without ``projection_dim``.
    """
    if not config.projection_dim or not widths:
        return None

    def make(width: int) -> nn.Module:
        if config.kind == "prefix":
            return nn.ModuleDict({"key": make_linear(width), "value": make_linear(width)})
        return make_linear(width)

    def make_linear(width: int) -> nn.Linear:
        linear = nn.Linear(config.projection_dim or width, width, device=device)
        if device.type != "meta":
            nn.init.kaiming_normal_(linear.weight, mode="fan_out")
            nn.init.zeros_(linear.bias)
        return linear

    projections = {str(width): make(width) for width in sorted(set(widths.values()))}
    return nn.ModuleDict(projections) if len(projections) > 1 else next(iter(projections.values()))
