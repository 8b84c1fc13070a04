"""Tensor names and shapes in checkpoints of the official VPT code (Jia et al., ECCV 2022, github.com/KMnP/vpt).

``state`` is a checkpoint's state dict under the names that the prompted transformer gives its tensors. The ``pop_``
functions remove the tensors that they convert from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..backbones import Backbone
from ..errors import CheckpointError, safe_repr, truncate_list

PREFIXES = ("module.", "model.", "enc.", "transformer.")  # of the modules that contain the prompted transformer
ALIASES = {"shallow_prompt": "prompt_embeddings", "deep_prompt": "deep_prompt_embeddings"}  # in prompt_ep*.pth
SHAPES = {
    "prompt_embeddings": ("1", "num_tokens", "width"),
    "deep_prompt_embeddings": ("layers", "num_tokens", "width"),  # Swin: one per stage, with suffix _0, _1 etc.
    "prompt_proj.weight": ("width", "projection_dim"),
    "prompt_proj.bias": ("width",),
    "head.weight": ("labels", "width"),  # of the backbone
    "head.bias": ("labels",),
    "head.last_layer.weight": ("labels", "width"),  # of the model around it
    "head.last_layer.bias": ("labels",),
}
BACKBONE_PREFIXES = (
    "embeddings.", "encoder.", "patch_embed.", "pos_embed", "absolute_pos_embed", "cls_token", "blocks.", "layers.",
    "norm.",
)  # fmt: skip
MAX_LISTED = 100


def normalize_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the names of containing modules, and checks that the tensors are known.

    Raises:
        CheckpointError: two tensors have the same name, or a tensor belongs neither to prompts, head nor backbone, or
            has an unexpected shape.
    """
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        name = ALIASES.get(name, name)
        if name in state:
            raise CheckpointError(
                f"Expected one tensor named {safe_repr(name)}, got several, one as {safe_repr(key)}. Remove all but "
                "one from the checkpoint."
            )
        state[name] = tensor
    unknown = [name for name in state if _without_stage(name) not in SHAPES and not name.startswith(BACKBONE_PREFIXES)]
    if unknown:
        raise CheckpointError(
            f"Expected prompts, a linear head and a backbone, got unknown tensors: "
            f"{truncate_list(sorted(unknown), MAX_LISTED)}. Prompts at other locations (pad), heads of several layers "
            "and pooling before the final norm (MAE) are not supported."
        )
    for name, tensor in state.items():
        expected = SHAPES.get(_without_stage(name))
        if expected and (tensor.ndim != len(expected) or (expected[0] == "1" and tensor.shape[0] != 1)):
            raise CheckpointError(
                f"{name} must have shape ({', '.join(expected)}), got {tuple(tensor.shape)}. Only prompts that are "
                'tokens of their own (LOCATION "prepend") are supported.'
            )
    return state


def check_backbone(state: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Compares the final norm, which has the same weight and bias in both implementations.

    Raises:
        CheckpointError: the checkpoint contains a final norm that differs from the model's.
    """
    for part in ("weight", "bias"):
        saved = state.get(f"encoder.encoder_norm.{part}", state.get(f"norm.{part}"))
        own = getattr(backbone.final_norm, part, torch.empty(0)).detach().cpu()
        if saved is None or (
            saved.shape == own.shape and torch.allclose(saved.to(own.dtype), own, rtol=1e-4, atol=1e-5)
        ):
            continue
        raise CheckpointError(
            f"The checkpoint must contain the model's backbone, but the {part} of its final norm, of shape "
            f"{tuple(saved.shape)}, differs from the model's, of shape {tuple(own.shape)}. Pass the model that the "
            "prompts were trained on. Checkpoints of methods that train the backbone too (prompt+bias, end2end) are "
            "not supported."
        )


def pop_prompts(state: dict[str, Tensor], backbone: Backbone) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Removes the prompts and their projection from ``state``.

    Returns:
        The prompts of the first layers, each of shape ``(num_tokens, width)`` or ``(num_tokens, projection_dim)``, and
        the projection under the adapter's names, empty if there is none.

    Raises:
        CheckpointError: there are no prompts, or they do not fit the backbone.
    """
    first, deep = "prompt_embeddings", "deep_prompt_embeddings"
    is_swin = bool(backbone.architecture.blocks)
    # The official Swin creates a projection if configured, but does not use it.
    projection = {} if is_swin else _pop_linear(state, "prompt_proj", "projection")
    names = [first, *(f"{deep}_{stage}" for stage in range(len(backbone.mergings) + 1))] if is_swin else [first, deep]
    given = [name for name in state if _without_stage(name) in (first, deep)]
    if first not in given or set(given) - set(names):
        raise CheckpointError(
            f"Expected {first} and, for VPT-Deep, {', '.join(names[1:])} for {type(backbone.model).__name__}, got "
            f"{truncate_list(sorted(given), MAX_LISTED) or 'no prompts'}. Pass a model of the class that the prompts "
            "were trained on. Prompts of the last layers only (REVERSE_DEEP) are not supported: the official code "
            "overwrites image tokens with them."
        )
    prompts = [prompt for name in names if name in state for prompt in state.pop(name)]
    num_layers = len(backbone.layers)
    if len(prompts) not in ((1, num_layers) if is_swin else range(1, num_layers + 1)):
        raise CheckpointError(
            f"Expected prompts for {'1 or' if is_swin else '1 to'} {num_layers} layers, got prompts for "
            f"{len(prompts)}. Pass the model that the prompts were trained on."
        )
    for layer, prompt in enumerate(prompts):
        width = projection["projection.weight"].shape[1] if projection else backbone.widths[layer]
        if prompt.shape[1] != width:
            raise CheckpointError(
                f"Expected prompts of width {width} for layer {layer}, got width {prompt.shape[1]}. Pass the model "
                "that the prompts were trained on. If they were trained with PROJECT, convert a checkpoint of the "
                "whole model: prompt_ep*.pth files do not contain the projection."
            )
    return prompts, projection


def pop_head(state: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Removes the classifier from ``state``.

    Returns:
        The weight, of shape ``(labels, width)``, and the bias, of shape ``(labels,)``, under the adapter's names.

    Raises:
        CheckpointError: the checkpoint has no head, or the model is no classifier.
    """
    if backbone.head.task_type != "IMAGE_CLASSIFICATION":
        raise CheckpointError(
            f"Expected a model for image classification, got {type(backbone.model).__name__}. Pass a classification "
            "model, or use keep_head=True (--keep-head) to keep the model's head."
        )
    head = _pop_linear(
        state, "head.last_layer" if "head.last_layer.weight" in state else "head", f"head.{backbone.head.paths[0]}"
    )
    if not head:
        raise CheckpointError(
            "Expected a head (head.last_layer.weight or head.weight), got none. prompt_ep*.pth files do not contain "
            "it: convert a checkpoint of the whole model, or use keep_head=True (--keep-head) to keep the model's head."
        )
    return head


def _pop_linear(state: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Removes a linear layer's tensors from ``state`` and renames them; empty if its weight is missing."""
    if f"{source}.weight" not in state:
        return {}
    names = [name for name in ("weight", "bias") if f"{source}.{name}" in state]
    return {f"{target}.{name}": state.pop(f"{source}.{name}") for name in names}


def _without_stage(name: str) -> str:
    """The name of Swin's prompts without the number of their stage."""
    return "deep_prompt_embeddings" if name.startswith("deep_prompt_embeddings_") else name
