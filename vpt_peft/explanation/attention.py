"""explain_attention: what prompts do to the attention of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..backbones import Backbone
from ..config import SPATIAL_TASKS, PromptConfig
from ..errors import AdapterError, RouteError, UnsupportedModelError, safe_repr
from ..model import VPTModel
from ..model.arguments import check_pixel_values
from ..model.modes import evaluating
from .recorder import LayerAttention, record_attention

QUERIES = ("class", "patches")
READ_AS_MAPS = (*SPATIAL_TASKS, "MASKED_IMAGE_MODELING")


@dataclass(frozen=True, eq=False)
class Explanation:
    """The attention of some layers to one image, with an adapter and without.

    Attributes:
        adapter_name: name of the adapter.
        kind: kind of its prompts, ``"token"`` or ``"prefix"``, see :class:`~vpt_peft.PromptConfig`.
        query: the reading tokens: ``"class"``, ``[CLS]``, or ``"patches"``, all of them.
        layers: indices of the layers.
        with_adapter: the attention of each of these layers.
        without_adapter: likewise, of the bare backbone.
    """

    adapter_name: str
    kind: str
    query: str
    layers: tuple[int, ...]
    with_adapter: tuple[LayerAttention, ...]
    without_adapter: tuple[LayerAttention, ...]


def explain_attention(
    vpt: VPTModel, pixel_values: Tensor, layers: Sequence[int] | None = None, query: str | None = None, **inputs: Any
) -> Explanation:
    """The attention to the patches of an image and to the prompts, with the active adapter and without it.

    It works with every attention implementation, and leaves the model unchanged. While it runs, other threads must not
    use the model, unless its implementation is "sdpa".

    Args:
        vpt: the model.
        pixel_values: one image, ``(1, num_channels, height, width)``; for SigLIP 2 its patches.
        layers: indices of layers, from 0 (Swin's blocks are numbered across stages); None: all.
        query: whose attention: ``"class"``: that of ``[CLS]``; ``"patches"``: the mean over the patches; None: what the
            task's head reads, ``"class"`` if that is ``[CLS]``, alone or joined with others. For ``pooling="prompt"``,
            what the bare backbone's head reads.
        inputs: further arguments of the forward call, such as ``interpolate_pos_encoding=True``.

    Raises:
        AdapterError: an argument is not valid.
        RouteError: with ``location="border"``, the adapter and the bare backbone need images of different sizes.
        UnsupportedModelError: the tokens of the model are not one for each patch, or its attention cannot be recorded.
    """
    if not isinstance(vpt, VPTModel):
        raise AdapterError(f"vpt must be a VPTModel, got {safe_repr(vpt)}. Make one with get_vpt_model().")
    backbone, config = vpt.backbone, vpt.active_config
    if backbone.architecture.input_dims == 5 or backbone.architecture.attention_forward is not None:
        raise UnsupportedModelError(
            "Expected a model of images whose attention calls F.scaled_dot_product_attention, got a "
            f"{type(backbone.original).__name__}, which is explained by no map of attention."
        )
    check_pixel_values(pixel_values, backbone.architecture.input_dims)
    if len(pixel_values) != 1:
        raise AdapterError(f"pixel_values must be one image, got {len(pixel_values)}. Explain one after the other.")
    if config.location == "border" and config.num_tokens:
        raise RouteError(
            'With location="border", the bare backbone needs larger images than the adapter, so that their attention '
            "cannot be compared, got an adapter with a border. Explain adapters with prompts at other locations."
        )
    indices = _check_layers(layers, len(backbone.layers))
    query = _check_query(query, backbone, config)

    def run() -> tuple[LayerAttention, ...]:
        images = pixel_values.to(vpt.device, vpt.dtype)
        call = vpt.get_image_features if backbone.head.task_type == "ZERO_SHOT_IMAGE_CLASSIFICATION" else vpt
        with record_attention(backbone, indices, query == "class", _find_grid(backbone, images, inputs)) as records:
            call(pixel_values=images, **inputs)
        for layer in indices:
            if layer not in records:
                raise UnsupportedModelError(
                    f"Attention is recorded where it calls F.scaled_dot_product_attention, but layer {layer} "
                    f"({type(backbone.layers[layer].part('caller')).__name__}) did not, with the 'sdpa' implementation."
                )
        return tuple(records[layer] for layer in indices)

    with evaluating(vpt):
        with_adapter = run()
        with vpt.disable_adapter():
            without_adapter = run()
    return Explanation(vpt.active_adapter, config.kind, query, indices, with_adapter, without_adapter)


def _check_layers(layers: Sequence[int] | None, number: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(number))
    is_list = isinstance(layers, list | tuple | range) and len(layers) > 0
    if not is_list or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise AdapterError(f"layers must be None or a list of layer numbers, got {safe_repr(layers)}.")
    missing = [layer for layer in layers if not 0 <= layer < number]
    if missing or len(set(layers)) < len(layers):
        raise AdapterError(
            f"layers must be different numbers from 0 to {number - 1}, the layers that the head reads, got "
            f"{safe_repr(list(layers))}."
        )
    return tuple(layers)


def _check_query(query: str | None, backbone: Backbone, config: PromptConfig) -> str:
    if query is None:
        return "class" if _reads_class_token(backbone, config.pooling) else "patches"
    if query not in QUERIES:
        raise AdapterError(f"query must be None, 'class' or 'patches', got {safe_repr(query)}.")
    if query == "class" and backbone.num_prefix_tokens == 0:
        raise AdapterError(
            f"query='class' is the attention of [CLS], which {type(backbone.original).__name__} does not have. Use "
            "query='patches'."
        )
    return query


def _reads_class_token(backbone: Backbone, pooling: str) -> bool:
    """Whether the head reads ``[CLS]``, alone or joined with other tokens."""
    if backbone.num_prefix_tokens == 0 or pooling in ("image", "global"):
        return False
    if pooling in ("class", "class_and_image"):
        return True
    head = backbone.head
    if head.task_type == "IMAGE_CLASSIFICATION":
        # Or the mean over the patches: in BEiT behind a norm of its own, in CLIP in front of the final norm.
        return backbone.pooled_norm is None and backbone.head_is_normed
    return head.layers_read is None and head.task_type not in READ_AS_MAPS


def _find_grid(backbone: Backbone, images: Tensor, inputs: dict[str, Any]) -> tuple[int, int] | None:
    """Number of rows and columns of patches; None: each layer is told (Swin)."""
    if backbone.architecture.blocks:
        return None
    if backbone.architecture.input_dims == 4:
        return images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    shapes = inputs.get("spatial_shapes")
    if not isinstance(shapes, Tensor) or shapes.shape != (1, 2):
        raise AdapterError(
            f"spatial_shapes must be a tensor of shape (1, 2), the rows and columns of patches, got "
            f"{safe_repr(shapes)}. Pass all that the image processor returns: explain_attention(vpt, **inputs)."
        )
    rows, columns = shapes[0].tolist()
    return rows, columns
