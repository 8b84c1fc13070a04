"""Conversion of a checkpoint of the official code to an adapter folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones import Backbone, find_backbone
from ..config import PromptConfig
from ..errors import ConfigError
from ..hub import check_model_name
from ..model import get_adapter_state_dict, get_vpt_model, set_adapter_state_dict
from .official import check_backbone, normalize_names, pop_head, pop_prompts
from .pth import read_tensors


@dataclass(frozen=True)
class Conversion:
    """Result of :func:`convert`.

    Attributes:
        config: config of the adapter.
        shapes: ``{name: shape}`` of the adapter's tensors.
        head: source of the adapter's head: ``"checkpoint"``, ``"model"``, or ``"none"`` if the model has no head.
        left_out: sorted names of the checkpoint's tensors that were not converted, e.g. those of the backbone.
    """

    config: PromptConfig
    shapes: dict[str, tuple[int, ...]]
    head: str
    left_out: list[str]


def convert(
    checkpoint: str | os.PathLike[str],
    model: nn.Module | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    pooling: str | None = None,
    carry: bool = True,
    shared: bool = False,
    keep_head: bool = False,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Conversion:
    """Converts a checkpoint of the official VPT code (github.com/KMnP/vpt) to an adapter folder.

    Two kinds of files are supported: ``prompt_ep*.pth``, which holds the prompts of a ViT as arrays without the head,
    and the state dict of a whole model (ViT or Swin).

    Prompt length, layers and projection are inferred from the tensors. The keyword arguments are not stored in a
    checkpoint. Neither is the prompts' location: they must be tokens of their own (``LOCATION: "prepend"``);
    checkpoints trained with ``LOCATION: "add"`` look the same and would give other logits.

    Args:
        checkpoint: a ``.pth`` or ``.safetensors`` file.
        model: the backbone that the prompts were trained on, without adapters, or its name or folder. The model is
            not changed.
        folder: output folder; an adapter in it is replaced.
        pooling: input of the head. None: the default of the official code, "default" for ViT and "global" for Swin.
            For other values of ``VIT_POOL_TYPE``, pass "image" for img_pool, "prompt" for prompt_pool, and "global"
            for imgprompt_pool.
        carry: pass False if the checkpoint was trained with ``FORWARD_DEEP_NOEXPAND``.
        shared: pass True if the checkpoint was trained with ``DEEP_SHARED``; the unused prompts in it are dropped.
        keep_head: use the model's head instead of the checkpoint's.
        num_labels: number of labels. With ``keep_head``, another number than the model's creates a new head.
        id2label: names of the labels. None: the model's if the number of labels is the same, else LABEL_0 etc.

    Raises:
        CheckpointError: the file contains anything but tensors and arrays, has unknown tensors, or does not fit the
            model. Nothing was written.
        VPTError: the model is not supported, or an argument does not fit it. Nothing was written.
    """
    state = normalize_names(read_tensors(Path(checkpoint)))
    backbone = find_backbone(_load_model(model))
    check_backbone(state, backbone)
    prompts, projection = pop_prompts(state, backbone)
    head = {} if keep_head or not backbone.head.paths else pop_head(state, backbone)
    config = PromptConfig(
        num_tokens=prompts[0].shape[0],
        deep=len(prompts) > 1,
        layers_to_transform=None if len(prompts) in (1, len(backbone.layers)) else tuple(range(len(prompts))),
        carry=carry,
        shared=shared,
        projection_dim=prompts[0].shape[1] if projection else None,
        pooling=_default_pooling(backbone) if pooling is None else pooling,
    )
    if shared and not config.deep:
        raise ConfigError(
            "shared=True requires a VPT-Deep checkpoint, got prompts of the first layer only. Remove shared."
        )
    tensors = {f"prompts.{layer}": prompt for layer, prompt in enumerate(prompts[:1] if shared else prompts)}
    labels = _labels(head, backbone, num_labels, id2label)
    vpt = get_vpt_model(backbone.model, config, adapter_name="without_labels")  # only add_adapter accepts labels
    try:
        vpt.add_adapter("default", config, **labels)
        initial = get_adapter_state_dict(vpt)
        initial_head = {name: tensor for name, tensor in initial.items() if name.startswith("head.")}
        set_adapter_state_dict(vpt, {**(head or initial_head), **projection, **tensors})
        vpt.save_pretrained(folder, selected_adapters=["default"])
    finally:
        vpt.unload()
    shapes = {name: tuple(tensor.shape) for name, tensor in initial.items()}
    return Conversion(config, shapes, "checkpoint" if head else "model" if initial_head else "none", sorted(state))


def _load_model(model: nn.Module | str | os.PathLike[str]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForImageClassification

    check_model_name(model)
    loaded: nn.Module = AutoModelForImageClassification.from_pretrained(model)
    return loaded


def _default_pooling(backbone: Backbone) -> str:
    """The official ViT classifies ``[CLS]``; the official Swin classifies the mean of prompts and image tokens."""
    is_swin, is_classifier = bool(backbone.architecture.blocks), backbone.head.task_type == "IMAGE_CLASSIFICATION"
    return "global" if is_swin and is_classifier else "default"


def _labels(
    head: Mapping[str, Tensor], backbone: Backbone, num_labels: int | None, id2label: Mapping[int, str] | None
) -> dict[str, Any]:
    """The label arguments for ``add_adapter``; empty if the adapter has the model's labels."""
    counts = {tensor.shape[0] for tensor in head.values()}
    counts |= {count for count in (num_labels, None if id2label is None else len(id2label)) if count is not None}
    if len(counts) > 1:
        raise ConfigError(
            f"The head, num_labels and id2label must agree on the number of labels, got {sorted(counts)}."
        )
    default = int(backbone.model.config.num_labels)
    count = counts.pop() if counts else default
    if id2label is None and count == default:
        return {}
    if count < 1:
        raise ConfigError(f"The number of labels must be at least 1, got {count}.")
    return {"num_labels": count, "id2label": id2label}
