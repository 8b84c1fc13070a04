"""From the names and shapes of the authors' code (Jia et al., ECCV 2022, github.com/KMnP/vpt) to ours.

``found`` is a checkpoint's tensors by their names in the prompted transformer; what is taken is removed from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .backbones import Backbone
from .errors import CheckpointError

WRAPPERS = ("module.", "model.", "enc.", "transformer.")
SYNONYMS = {"shallow_prompt": "prompt_embeddings", "deep_prompt": "deep_prompt_embeddings"}
SHAPES = {
    "prompt_embeddings": "(1, num_tokens, width)",
    "deep_prompt_embeddings": "(layers, num_tokens, width)",  # with _0, _1 and so on behind it for Swin's stages
    "prompt_proj.weight": "(width, projection_dim)",
    "prompt_proj.bias": "(width)",
    "head.weight": "(labels, width)",
    "head.bias": "(labels)",
    "head.last_layer.weight": "(labels, width)",
    "head.last_layer.bias": "(labels)",
}
OF_BACKBONE = (
    "embeddings.", "encoder.", "patch_embed.", "pos_embed", "absolute_pos_embed", "cls_token", "blocks.", "layers.",
    "norm.",
)  # fmt: skip


def by_short_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the names of what is wrapped around the prompted transformer.

    Raises:
        CheckpointError: names every tensor that is neither prompt nor head nor of a backbone, or of another shape.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key
        while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
            name = name.removeprefix(wrapper)
        name = SYNONYMS.get(name, name)
        if name in found:
            raise CheckpointError(f"Expected one tensor named '{name}', got several, one as '{key}'. Keep one of them.")
        found[name] = tensor
    unknown = [name for name in found if _general(name) not in SHAPES and not name.startswith(OF_BACKBONE)]
    if unknown:
        raise CheckpointError(
            f"Expected prompts, a linear head and a backbone, got unknown names: {', '.join(sorted(unknown))}. Prompts "
            "elsewhere (pad), heads of several layers and pooling before the norm (MAE) cannot be converted."
        )
    for name, tensor in found.items():
        expected = SHAPES.get(_general(name))
        is_first_of_many = name == "prompt_embeddings" and tensor.shape[:1] != (1,)
        if expected and (tensor.ndim != expected.count(",") + 1 or is_first_of_many):
            raise CheckpointError(
                f"{name} must have shape {expected}, got {tuple(tensor.shape)}. Only prompts that are tokens beside "
                'those of the image (LOCATION "prepend") can be converted.'
            )
    return found


def check_backbone(found: Mapping[str, Tensor], backbone: Backbone) -> None:
    """Raises CheckpointError if the last norm, which every code keeps as the same tensors, is not the model's."""
    for part in ("weight", "bias"):
        theirs = found.get(f"encoder.encoder_norm.{part}", found.get(f"norm.{part}"))
        ours = getattr(backbone.final_norm, part).detach().cpu()
        if theirs is None or (
            theirs.shape == ours.shape and torch.allclose(theirs.to(ours.dtype), ours, rtol=1e-4, atol=1e-5)
        ):
            continue
        raise CheckpointError(
            f"Expected the model's backbone, got another one: the {part} of its last norm, {tuple(theirs.shape)}, "
            f"is not equal to the model's, {tuple(ours.shape)}. Give the model that the prompts were trained on. Where "
            "the backbone was trained along (prompt+bias, end2end), prompts alone are another function."
        )


def take_prompts(found: dict[str, Tensor], backbone: Backbone) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The prompts of the first layer and of those behind it, ``(num_tokens, width)`` each, and their projection.

    Raises:
        CheckpointError: they are not the prompts of this backbone.
    """
    first, deep = "prompt_embeddings", "deep_prompt_embeddings"
    is_swin = bool(backbone.architecture.blocks)
    # The authors' Swin may have a projection, but does not use it.
    projection = {} if is_swin else _take_linear(found, "prompt_proj", "projection")
    names = [first, *(f"{deep}_{stage}" for stage in range(len(backbone.mergings) + 1))] if is_swin else [first, deep]
    given = [name for name in found if _general(name) in (first, deep)]
    if first not in given or set(given) - set(names):
        raise CheckpointError(
            f"Expected {first} and, if deep, {', '.join(names[1:])} for {type(backbone.model).__name__}, got "
            f"{', '.join(sorted(given)) or 'no prompts'}. Give the kind of model that they were trained on. Prompts of "
            "the last layers only (REVERSE_DEEP) cannot be converted: in the authors' code they overwrite image tokens."
        )
    prompts = [prompt for name in names if name in found for prompt in found.pop(name)]
    counts = (1, len(backbone.layers)) if is_swin else range(1, len(backbone.layers) + 1)
    if len(prompts) not in counts:
        raise CheckpointError(
            f"Expected prompts for at most the model's {len(backbone.layers)} layers, and for one or all of them if it "
            f"is Swin, got them for {len(prompts)}. Give the model that they were trained on."
        )
    for layer, prompt in enumerate(prompts):
        width = projection["projection.weight"].shape[1] if projection else backbone.widths[layer]
        if prompt.shape[1] != width:
            raise CheckpointError(
                f"Expected prompts of width {width} for layer {layer}, got {prompt.shape[1]}. Give the model that they "
                "were trained on. Where that was done with PROJECT, convert a checkpoint of the model: prompt_ep*.pth "
                "files lack the projection."
            )
    return prompts, projection


def take_head(found: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The classifier, ``(labels, width)`` and ``(labels)``; CheckpointError if there is none, or no place for one."""
    theirs = "head.last_layer" if "head.last_layer.weight" in found else "head"  # of their wrapper, or of a backbone
    if backbone.head.task_type != "IMAGE_CLASSIFICATION":
        raise CheckpointError(
            f"Expected a model for image classification, got {type(backbone.model).__name__}. Load that one, or say "
            "keep_head=True (--keep-head) to take the model's own head."
        )
    if f"{theirs}.weight" not in found:
        raise CheckpointError(
            "Expected a head (head.last_layer.weight or head.weight), got none, as in prompt_ep*.pth files. "
            "Convert a checkpoint of the model, or say keep_head=True (--keep-head) to take the model's own head."
        )
    return _take_linear(found, theirs, f"head.{backbone.head.paths[0]}")


def _take_linear(found: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    if f"{theirs}.weight" not in found:
        return {}
    return {
        f"{ours}.{part}": found.pop(f"{theirs}.{part}") for part in ("weight", "bias") if f"{theirs}.{part}" in found
    }


def _general(name: str) -> str:
    return "deep_prompt_embeddings" if name.startswith("deep_prompt_embeddings_") else name
