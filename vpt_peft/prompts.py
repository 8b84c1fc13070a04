"""Prompts: the only new learnable tensors of the method."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import PromptConfig


def uniform_bound(patch_size: int, dim: int) -> float:
    """Half the width of the uniform distribution that prompts start from: ``sqrt(6 / (3 · patch² + dim))``.

    Xavier's bound for a linear map from an RGB patch of ``patch_size`` pixels a side to ``dim`` channels
    (Jia et al., ECCV 2022, section 3).
    """
    return math.sqrt(6 / (3 * patch_size**2 + dim))


class Prompts(nn.Module):
    """The prompts of one adapter: a ``(num_tokens, dim)`` tensor for each layer that gets fresh ones.

    Args:
        config: the adapter's config.
        widths: ``{layer: width}`` of the layers that get fresh prompts, in order.
        patch_size: side of the backbone's patches in pixels; it sets the scale of the initial values.
        device: where to create them.
    """

    def __init__(self, config: PromptConfig, widths: Mapping[int, int], patch_size: int, device: torch.device) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.widths = dict(widths)
        self.first = min(widths, default=0)
        self.shared = config.shared
        own = list(widths)[:1] if config.shared else list(widths)
        self.embeddings = nn.ParameterDict(
            {
                str(layer): nn.Parameter(
                    torch.empty(config.num_tokens, config.projection_dim or widths[layer], device=device)
                )
                for layer in own
            }
        )
        self.projections = nn.ModuleDict(
            {
                str(width): nn.Linear(config.projection_dim, width, device=device)
                for width in sorted(set(widths.values()))
            }
            if config.projection_dim
            else {}
        )
        if device.type != "meta":
            self.reset(config.init, patch_size)

    @torch.no_grad()
    def reset(self, init: str, patch_size: int) -> None:
        """Draws initial values anew."""
        for embedding in self.embeddings.values():
            if init == "uniform":
                bound = uniform_bound(patch_size, embedding.shape[-1])
                nn.init.uniform_(embedding, -bound, bound)
            else:
                nn.init.normal_(embedding, std=0.02)
        for projection in self._projections.values():
            nn.init.kaiming_normal_(projection.weight, mode="fan_out")
            nn.init.zeros_(projection.bias)

    def forward(self, layer: int, num_images: int) -> Tensor:
        """The fresh prompts of a layer: ``(1, num_tokens, width)``, the same for all images, or
        ``(num_images, num_tokens, width)`` where dropout makes them differ."""
        tokens = self.embeddings[str(self.first if self.shared else layer)].unsqueeze(0)
        if self.projections:
            tokens = self.projections[str(self.widths[layer])](tokens)
        if self.dropout and self.training:
            tokens = nn.functional.dropout(tokens.expand(num_images, -1, -1), self.dropout)
        return tokens

    @property
    def _projections(self) -> dict[str, nn.Linear]:
        return dict(self.projections.items())  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors under the names of the adapter format: ``prompts.{layer}`` and ``projection.*``."""
        tensors: dict[str, Tensor] = {f"prompts.{layer}": tensor for layer, tensor in self.embeddings.items()}
        for width, projection in self._projections.items():
            prefix = "projection" if len(self.projections) == 1 else f"projection.{width}"
            tensors |= {f"{prefix}.weight": projection.weight, f"{prefix}.bias": projection.bias}
        return tensors
