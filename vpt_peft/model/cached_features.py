"""Cached features in the forward call: what an adapter lets be cached, and the checks of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..backbones import Backbone
from ..config import CLASSIFICATION_TASKS
from ..errors import AdapterError, safe_repr
from ..injection import CachedInput, FeatureEntry

TASKS = (*CLASSIFICATION_TASKS, "FEATURE_EXTRACTION")
# Arguments of the forward call that may be given with cached features.
ACCEPTED = ("labels", "return_dict", "interpolate_pos_encoding", "num_items_in_batch")


def find_entry_layer(adapter: Adapter, backbone: Backbone) -> int | None:
    """The layer that cached features of an adapter enter: the first one that it changes, the last one if it changes
    only what is behind the layers. None: it changes only the head, which pooled features enter.

    Raises:
        AdapterError: nothing can be cached, since the adapter changes what is in front of all layers, or the head
            reads more than the last layer.
    """
    name, task = type(backbone.original).__name__, adapter.config.task_type
    if task not in TASKS or backbone.architecture.token_mask is not None:
        reason = "takes images with padding" if task in TASKS else f"has a head for {task}"
        raise AdapterError(
            f"Features can be cached for classifiers and models without a head, got {name}, which {reason}. "
            "Train it on pixel values."
        )
    if adapter.bias.paths:
        raise AdapterError(
            "Features can be cached in front of the first layer that an adapter changes, but with bias='all' it "
            'changes all of them, and the patch embedding. Use bias="none".'
        )
    if adapter.is_in_image:
        raise AdapterError(
            f'Features can be cached in front of the first layer with prompts, but with location="'
            f'{adapter.config.location}" they are in the image. Use location="prepend" and layers_to_transform.'
        )
    changed = [layer for layer, plan in enumerate(adapter.plan) if plan is not None]
    changed += [_layer_of(path, backbone) for path in adapter.modules_to_save.paths]
    if not changed and not backbone.head.paths:
        raise AdapterError(f"The adapter changes nothing of {name}, which has no head: there is nothing to train.")
    if 0 in changed:
        raise AdapterError(
            "Features can be cached in front of the first layer that an adapter changes, but that is layer 0 (of "
            f"{len(backbone.layers)}), so that nothing is left to cache. Give later layers, such as PromptConfig("
            f"layers_to_transform={list(range(len(backbone.layers) * 3 // 4, len(backbone.layers)))})."
        )
    return min(changed, default=None)


def _layer_of(path: str, backbone: Backbone) -> int:
    """The layer that a module is part of; the last one for modules behind the layers.

    Raises:
        AdapterError: the module is in front of layers, or between them.
    """
    module = backbone.model.get_submodule(path)
    for layer in backbone.layers:
        if module in set(layer.module.modules()):
            return layer.index
    if module is backbone.final_norm or module in backbone.pooler_modules:
        return len(backbone.layers) - 1
    raise AdapterError(
        f"Features can be cached in front of the first layer that an adapter changes, but modules_to_save has "
        f"'{path}', which is in front of layers. Leave it out, or train on pixel values."
    )


def enter_features(
    features: Tensor | None,
    key: Tensor | int | None,
    entries: Mapping[int, FeatureEntry],
    adapter: Adapter,
    backbone: Backbone,
    given: Mapping[str, Any],
) -> CachedInput:
    """Checks the features of a batch.

    Args:
        features: ``(num_images, num_tokens, width)``, or ``(num_images, width)`` for the head.
        key: ``(num_images,)``, or a number: the cache that they are from.
        entries: the caches of the model, by key.
        given: the other arguments of the forward call; None: not given.

    Raises:
        AdapterError: they are not from one cache of this model, do not fit the adapter, or another argument needs what
            is not computed.
    """
    keys: set[Any] = set(key.reshape(-1).tolist()) if isinstance(key, Tensor) else {key}
    if features is None or keys == {None}:
        raise AdapterError(
            "cached_features and cache_key must be given together, as in the batches of vpt_peft.training."
            f"cache_features(), got only {'cache_key' if features is None else 'cached_features'}."
        )
    entry = None if len(keys) > 1 else next((entries[key] for key in keys if key in entries), None)
    if entry is None:
        got = f"features of {len(keys)} caches" if len(keys) > 1 else f"cache_key {safe_repr(*keys)}"
        raise AdapterError(
            f"cached_features must be from one cache that was made or opened with this model, got {got}. Call "
            "vpt_peft.training.cache_features(vpt, dataset, folder=...) with it, and batch each data set by itself."
        )
    if features.ndim != 1 + len(entry.shape) or tuple(features.shape[1:]) != entry.shape:
        raise AdapterError(
            f"cached_features must be of shape (num_images, {', '.join(map(str, entry.shape))}), as in the cache, got "
            f"{tuple(features.shape)}. Pass them on unchanged."
        )
    refused = [
        name for name, value in given.items() if name not in ACCEPTED and value is not None and value is not False
    ]
    config = backbone.model.config
    refused += [name for name in ("output_hidden_states", "output_attentions") if getattr(config, name, False)]
    if refused:
        raise AdapterError(
            f"cached_features cannot be combined with {', '.join(dict.fromkeys(refused))}: the pixels are not there, "
            "and the layers in front of the features do not run. Pass pixel values instead."
        )
    layer = find_entry_layer(adapter, backbone)
    fits = layer is None if entry.layer is None else layer is None or entry.layer <= layer
    if not fits or (entry.layer is None and adapter.config.pooling != entry.pooling):
        own, cached = describe_entry(layer, adapter.config.pooling), describe_entry(entry.layer, entry.pooling)
        raise AdapterError(
            f"The cached features enter in front of {cached}, but the active adapter changes {own}, which they would "
            "leave out. Call cache_features() again with this adapter."
        )
    check_eval_mode(backbone)
    return CachedInput(entry, features)


def check_eval_mode(backbone: Backbone) -> None:
    """Raises AdapterError if the backbone, which is frozen, is in training mode."""
    parts = (backbone.model, backbone.encoder, *(layer.module for layer in backbone.layers))
    if any(part.training for part in parts):
        raise AdapterError(
            "The backbone must be in eval mode, since the dropout of its lower layers would be that of the cache in "
            "each epoch, got training mode. Call vpt.train() or vpt.eval(), which keep the backbone in eval mode."
        )


def describe_entry(layer: int | None, pooling: str) -> str:
    """The place of an entry, in words."""
    return f"the head (pooling={pooling!r})" if layer is None else f"layer {layer}"
