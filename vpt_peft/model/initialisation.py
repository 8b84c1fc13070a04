"""Prompts that start as the layers' own input tokens on images of the task.

Wang et al., Revisiting the Power of Prompt for Visual Tuning, ICML 2024. First :func:`collect_tokens` runs the bare
backbone, and then :func:`write_prompts` copies what it found into the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .. import io
from ..adapter import Adapter, make_keys
from ..backbones import Architecture, Backbone
from ..errors import AdapterError, ConfigError, safe_repr, truncate_list
from .arguments import check_pixel_values

METHODS = ("sample", "kmeans", "mean")
TOKENS_PER_CENTRE = 32  # tokens kept for each centre of k-means
MAX_LISTED = 10


class Reservoir:
    """A uniform random sample, without replacement, of vectors that arrive in batches, in random order.

    Every vector draws a random key, and those with the largest keys stay (reservoir sampling with a random sort).

    Args:
        size: number of vectors to keep.

    Attributes:
        vectors: at most ``size`` of them, ``(n, width)``, float32 on the CPU.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.keys = torch.empty(0, device="cpu")
        self.vectors = torch.empty(0, 0, device="cpu")

    def add(self, vectors: Tensor) -> None:
        """Adds a batch of vectors ``(n, width)``."""
        keys, chosen = torch.rand(len(vectors), device="cpu").topk(min(self.size, len(vectors)))
        arrived = vectors[chosen.to(vectors.device)].float().cpu()
        keys = torch.cat([self.keys, keys])
        self.keys, kept = keys.topk(min(self.size, len(keys)))
        self.vectors = (torch.cat([self.vectors, arrived]) if len(self.vectors) else arrived)[kept]


def check_init(adapter: Adapter, backbone: Backbone, method: object, num_images: object) -> None:
    """Checks that the prompts of an adapter can start as tokens, before the backbone runs.

    Raises:
        ConfigError: the adapter has no prompts of the layers' widths, or an argument is not valid.
        ImportError: ``method="kmeans"`` without scikit-learn.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(map(repr, METHODS))}, got {safe_repr(method)}.")
    if not isinstance(num_images, int) or isinstance(num_images, bool) or num_images < 1:
        raise ConfigError(f"num_images must be an integer of at least 1, got {safe_repr(num_images)}.")
    if not _fresh_layers(adapter):
        raise ConfigError("The active adapter must have prompts, got num_tokens=0. There is nothing to initialise.")
    if adapter.projection is not None:
        raise ConfigError(
            f"Prompts that are projected cannot start as tokens of a layer, which do not fit into their width, got "
            f"projection_dim={adapter.config.projection_dim}. Use projection_dim=None, or keep the prompts as they are."
        )
    if adapter.config.location != "prepend":
        raise ConfigError(
            f'Prompts at location="{adapter.config.location}" are no tokens, and cannot start as some. '
            'Use location="prepend".'
        )
    if backbone.architecture.token_mask is not None:
        raise ConfigError(
            f"Prompts cannot start as tokens of {type(backbone.model).__name__}, whose images are padded, got a call "
            "of init_prompts(). Keep the prompts as they are."
        )
    if method == "kmeans":
        _import_kmeans()


def collect_tokens(
    run: Callable[[Tensor], object],
    backbone: Backbone,
    adapter: Adapter,
    dataloader: Iterable[Any],
    method: str,
    num_images: int,
) -> dict[int, Tensor]:
    """Tokens in the place of an adapter's prompts, from the inputs of its layers.

    Args:
        run: runs the bare backbone on images.

    Returns:
        ``{layer: (num_tokens, width)}``, float32, for each layer with fresh prompts; with ``shared=True`` for the first
        of them. All processes get those of process 0.

    Raises:
        AdapterError: too few images, a batch without images, or tokens that are not finite.
    """
    layers, config = _fresh_layers(adapter), adapter.config
    size = config.num_tokens * (TOKENS_PER_CENTRE if method == "kmeans" else 1)
    reservoirs = {layer: Reservoir(size) for layer in (layers[:1] if config.shared else layers)}

    def collect(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))  # (num_images, num_tokens, width)
        tokens = backbone.image_tokens(hidden).float()
        if not tokens.isfinite().all():
            raise AdapterError(
                f"The tokens of the images must be finite, got NaN or infinite values in layer {layer}. Check the "
                f"images, and that the backbone's precision, {hidden.dtype}, suffices."
            )
        vectors = tokens.mean(1) if method == "mean" else tokens.flatten(0, 1)
        reservoirs[layers[0] if config.shared else layer].add(vectors)

    with ExitStack() as hooks:
        for layer in layers:
            hook = partial(collect, layer)
            handle = backbone.layers[layer].module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for images in _take_images(dataloader, num_images, backbone.architecture):
            run(images)
    return {
        layer: _from_first_process(_choose(reservoir.vectors, method, config.num_tokens, layer), backbone.device)
        for layer, reservoir in reservoirs.items()
    }


def write_prompts(adapter: Adapter, backbone: Backbone, tokens: Mapping[int, Tensor]) -> None:
    """Copies the tokens of :func:`collect_tokens` into the prompts of an adapter, also sharded ones (FSDP2); into a
    prefix, as the keys that the layers make of them."""
    if adapter.config.kind == "token":
        io.load_state_dict(adapter.prompts, {str(layer): values for layer, values in tokens.items()})
        return
    with torch.no_grad():
        for layer, values in tokens.items():
            pair = adapter.prefix[layer]
            keys = make_keys(backbone.layers[layer], values).float()
            io.load_state_dict(pair, {"key": keys, "value": io.gather_state_dict(pair)["value"]})


def _fresh_layers(adapter: Adapter) -> list[int]:
    return [layer for layer, plan in enumerate(adapter.plan) if plan is not None and plan.fresh]


def _take_images(dataloader: Iterable[Any], num_images: int, architecture: Architecture) -> Iterator[Tensor]:
    """The first ``num_images`` images of a dataloader, in its batches."""
    for batch in dataloader:
        images = _find_images(batch, architecture)[:num_images]
        yield images
        num_images -= len(images)
        if num_images == 0:
            break


def _find_images(batch: Any, architecture: Architecture) -> Tensor:
    """The images ``(num_images, num_channels, height, width)``, or videos, in a batch."""
    images, name = batch, architecture.input_name
    if isinstance(batch, Mapping):
        if name not in batch:
            raise AdapterError(
                f"A batch of the dataloader must have the key {name}, got "
                f"{truncate_list([safe_repr(key) for key in batch], MAX_LISTED) or 'none'}."
            )
        images = batch[name]
    elif isinstance(batch, tuple | list) and batch:
        images = batch[0]
    elif not isinstance(batch, Tensor):
        raise AdapterError(
            f"A batch of the dataloader must be a dict with {name}, a tuple or list with the images first, or a "
            f"tensor of images, got {safe_repr(batch)}."
        )
    check_pixel_values(images, architecture.input_dims, name)
    return images


def _choose(vectors: Tensor, method: str, num_tokens: int, layer: int) -> Tensor:
    """``num_tokens`` of the collected vectors, or their cluster centres."""
    if len(vectors) < num_tokens:
        kind = "images" if method == "mean" else "image tokens"
        raise AdapterError(
            f'method="{method}" needs at least as many {kind} as prompts, {num_tokens}, got {len(vectors)} in layer '
            f"{layer}. Give a dataloader with more images, or raise num_images."
        )
    if method != "kmeans":
        return vectors
    seed = int(torch.randint(2**31, (), device="cpu"))
    kmeans = _import_kmeans()(num_tokens, n_init=1, random_state=seed).fit(vectors.numpy())
    return torch.from_numpy(kmeans.cluster_centers_)


def _import_kmeans() -> Any:
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            'method="kmeans" needs scikit-learn: pip install scikit-learn, or use method="sample".'
        ) from error
    return KMeans


def _from_first_process(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the backbone's device. All processes get that of process 0: each has seen other images."""
    values = values.to(device)
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast(values, src=0)
    return values
