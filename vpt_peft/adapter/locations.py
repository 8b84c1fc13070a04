"""Where prompts enter (``PromptConfig.location``): what they consist of at each location, and what they require.

The locations are those of the ablation in Jia et al., ECCV 2022, section 4.3. For images of ``C`` channels and
``H x W`` pixels, patches of ``h x w`` pixels, and a layer with ``n`` tokens of width ``d``:

| location | prompts | shapes |
|---|---|---|
| prepend | tokens | ``{layer}``: ``(num_tokens, d)``, or ``(num_tokens, projection_dim)`` |
| pixel | patches, which become tokens | ``{layer}``: ``(num_tokens, C, h, w)`` |
| add | a vector for each token | ``{layer}``: ``(n, d)`` |
| add-shared | a vector for all tokens | ``{layer}``: ``(1, d)`` |
| border | pixels around the image, from 0 to 1 | ``top``, ``bottom``: ``(C, num_tokens, W)``; |
| | | ``left``, ``right``: ``(C, H - 2 num_tokens, num_tokens)`` |
| channel | channels of the image | ``channels``: ``(num_tokens, H, W)`` |

How they enter is in :mod:`vpt_peft.injection.locations`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..backbones import Backbone
from ..config import IN_IMAGE, SPATIAL_TASKS, PromptConfig
from ..errors import ConfigError

# Mean and standard deviation of the pixels of ImageNet, red, green and blue, by which the official code normalises a
# border, whatever the image processor of the backbone.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def prompt_shapes(config: PromptConfig, backbone: Backbone, fresh: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """``{name: shape}`` of an adapter's prompts, as in the table above.

    Args:
        fresh: ``{layer: width}`` of the layers with fresh prompts, in order.

    Raises:
        ConfigError: the location does not fit the backbone.
        UnsupportedModelError: its patch embedding is not known.
    """
    if config.num_tokens == 0 or config.kind == "prefix":
        return {}
    num_dims = backbone.architecture.input_dims
    if num_dims != 4 and config.location not in ("prepend", "add-shared"):
        inputs = "videos" if num_dims == 5 else "patches of images of any size"
        raise ConfigError(
            f'location="{config.location}" needs images of one size, but {type(backbone.model).__name__} takes '
            f'{inputs}, got that location. Use "prepend" or "add-shared".'
        )
    if config.location == "border":
        return _border_shapes(config, backbone)
    if config.location == "channel":
        return {"channels": (config.num_tokens, *_padded_size(backbone))}
    if config.location == "pixel":
        patch = _patch_shape(backbone, fresh)
        return {str(layer): (config.num_tokens, *patch) for layer in fresh}
    if config.location == "add":
        return {str(layer): (count_tokens(backbone, layer), width) for layer, width in fresh.items()}
    number = 1 if config.location == "add-shared" else config.num_tokens
    return {str(layer): (number, config.projection_dim or width) for layer, width in fresh.items()}


def patch_embedding(config: PromptConfig, backbone: Backbone) -> list[str]:
    """Paths of the modules of the patch embedding that prompts go through ("pixel") or that is copied ("channel")."""
    if config.num_tokens == 0 or config.location not in ("pixel", "channel"):
        return []
    paths = list(backbone.find_patch_embedding())
    return paths if config.location == "pixel" else paths[:1]


def required_size(config: PromptConfig, backbone: Backbone) -> tuple[int, int] | None:
    """Height and width that images must have; None: any that the backbone takes."""
    if config.num_tokens == 0 or config.location not in ("add", *IN_IMAGE):
        return None
    height, width = backbone.image_size
    border = 2 * config.num_tokens if config.location == "border" else 0
    return height - border, width - border


def count_tokens(backbone: Backbone, layer: int) -> int:
    """Number of tokens that enter a layer, prefix and suffix tokens included, for images of the backbone's size."""
    rows, columns = (side // backbone.patch_size for side in _padded_size(backbone))
    for merging in backbone.mergings:
        if merging < layer:
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
    return backbone.num_prefix_tokens + rows * columns + backbone.num_suffix_tokens


def _padded_size(backbone: Backbone) -> tuple[int, int]:
    """Height and width of the images that reach the patch embedding: Swin pads them to whole patches."""
    height, width = backbone.image_size
    if backbone.architecture.blocks is None:
        return height, width
    side = backbone.patch_size
    return -(-height // side) * side, -(-width // side) * side


def _border_shapes(config: PromptConfig, backbone: Backbone) -> dict[str, tuple[int, ...]]:
    size, (height, width) = config.num_tokens, backbone.image_size
    channels = backbone.num_channels
    if 2 * size >= min(height, width):
        raise ConfigError(
            f"A border must leave a part of the {height} x {width} pixels of the backbone's images, got one of "
            f"num_tokens={size} pixels at each side. Use fewer."
        )
    if channels != len(MEAN):
        raise ConfigError(f'location="border" needs images of {len(MEAN)} channels (RGB), got {channels}.')
    if backbone.head.task_type in SPATIAL_TASKS:
        raise ConfigError(
            f'location="border" needs a model without outputs for places in the image, got '
            f"{type(backbone.model).__name__}, whose outputs would include the border. Use another location, such as "
            '"channel".'
        )
    ends, sides = (channels, size, width), (channels, height - 2 * size, size)
    return {"top": ends, "bottom": ends, "left": sides, "right": sides}


def _patch_shape(backbone: Backbone, fresh: Mapping[int, int]) -> tuple[int, ...]:
    weight: Any = next(iter(backbone.find_patch_embedding().values())).weight
    width = weight.shape[0]
    others = [layer for layer in fresh if fresh[layer] != width]
    if others:
        raise ConfigError(
            f'location="pixel" needs layers of the width of the patch embedding, {width}, got layers {others} of '
            f"widths {[fresh[layer] for layer in others]}. Choose layers of the first stage with layers_to_transform, "
            "or use deep=False."
        )
    return tuple(weight.shape[1:])


def embed_patches(patches: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """The tokens of patches, without position embeddings.

    Args:
        patches: ``(num_tokens, C, h, w)``.
        modules: the convolution that embeds patches, and the norm after it if there is one.

    Returns:
        ``(num_tokens, d)``.
    """
    projection, *norms = modules
    weight: Any = projection.weight
    tokens = projection(patches.to(weight.device, weight.dtype)).flatten(1)
    for norm in norms:
        tokens = norm(tokens)
    return tokens


def normalize_pixels(pixels: Tensor) -> Tensor:
    """Pixels from 0 to 1, normalised by the statistics of ImageNet.

    Args:
        pixels: ``(3, height, width)``.
    """
    mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std
