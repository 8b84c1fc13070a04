"""Cached features in place of pixels: where they enter a model, and the modules in front of them that are skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class FeatureEntry:
    """The place where cached features enter a model.

    Attributes:
        layer: the layer in front of which tokens enter; None: pooled features enter the head.
        input_shape: shape of one image, ``(num_channels, height, width)``, or of one video.
        shape: shape of the features of one image: tokens ``(num_tokens, width)``, or ``(width,)``.
        widths: width of the features of each module of the head, by path, which are joined along the last dimension.
        pooling: of the adapter whose head reads the features.
        returned: number of values that each skipped layer returns, None for a tensor that is not in a tuple; found out
            by one run of the layer.
    """

    layer: int | None
    input_shape: tuple[int, ...]
    shape: tuple[int, ...]
    widths: dict[str, int] = field(default_factory=dict)
    pooling: str = "default"
    returned: dict[int, int | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CachedInput:
    """The features of a batch.

    The forward of the model runs as always, but on a single empty image in front of the entry: what it computes from
    the shape of images (masks, position biases, sizes of feature maps) is right, and heads and poolers need no care.

    Attributes:
        features: ``(num_images, *entry.shape)``.
    """

    entry: FeatureEntry
    features: Tensor

    def skips(self, layer: int) -> bool:
        """Whether the output of a layer has no effect."""
        return self.entry.layer is None or layer < self.entry.layer

    def skip(self, layer: int, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The input of a layer in the form of its output.

        Args:
            run: the forward of the layer.
            args: the tokens of the empty image, then others.
        """
        if layer not in self.entry.returned:
            output = run(*args, **kwargs)
            self.entry.returned[layer] = len(output) if isinstance(output, tuple) else None
            return output
        number = self.entry.returned[layer]
        return args[0] if number is None else (args[0], *[None] * (number - 1))

    def enter_layer(self, layer: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The positional arguments of a layer, of which the first are the tokens."""
        if layer != self.entry.layer:
            return args
        return (_like(self.features, args[0]), *args[1:])

    def enter_head(self, path: str, features: Any) -> Any:
        """The features of a module of the head."""
        if self.entry.layer is not None:
            return features
        start = 0
        for name, width in self.entry.widths.items():
            if name == path:
                return _like(self.features[:, start : start + width].contiguous(), features)
            start += width
        raise AssertionError(path)  # the entry has all modules of the head


def _like(features: Tensor, computed: Tensor) -> Tensor:
    """Features on the device, in the precision and in the layout in memory of those that a model computes, so that
    matrix products round in the same way."""
    features = features.to(computed.device, computed.dtype)
    if computed.is_contiguous():
        return features
    order = sorted(range(computed.ndim), key=computed.stride, reverse=True)
    inverse = sorted(range(computed.ndim), key=order.__getitem__)
    return features.permute(order).contiguous().permute(inverse)
