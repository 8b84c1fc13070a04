"""Checks that an adapter and its backbone belong together, and that nothing else is trained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..adapter import Adapter, make_labels
from ..backbones import Backbone, add_classifier, add_decode_head, find_backbone
from ..config import CLASSIFICATION_TASKS
from ..errors import AdapterError, ConfigError, truncate_list
from ..injection import has_overrides
from ..io import Fingerprint, take_fingerprint

MAX_LISTED = 5
ADDED_HEADS = {**dict.fromkeys(CLASSIFICATION_TASKS, "classifier"), "SEMANTIC_SEGMENTATION": "decode head"}


def find_bare_backbone(model: nn.Module) -> Backbone:
    """The backbone in a model without adapters.

    Raises:
        AdapterError: the model has adapters of this library or of PEFT.
        UnsupportedModelError: no declaration fits the model.
    """
    if isinstance(model, nn.Module) and has_overrides(model):
        raise AdapterError(
            f"Expected a bare backbone, got {type(model).__name__}, which already has adapters. Call unload() on the "
            "VPTModel that was made from it, or load the model again."
        )
    layers = _peft_layers(model) if isinstance(model, nn.Module) else []
    if layers:
        raise AdapterError(
            f"Expected a bare backbone, got {type(model).__name__} with layers of PEFT, which would be frozen and not "
            f"be saved with the prompts: {truncate_list(layers, MAX_LISTED)}. Remove them, or merge them into the "
            "weights (merge_and_unload()) and save the result as a checkpoint."
        )
    return find_backbone(model)


def with_head(backbone: Backbone, task_type: str | None, labels: Mapping[str, Any]) -> Backbone:
    """The backbone; with a linear head for the task of an adapter if the model has none.

    Args:
        labels: of the adapter.

    Raises:
        ConfigError: there are no labels, or the task is that of other inputs.
        UnsupportedModelError: the model has no tokens for a decode head.
    """
    if task_type not in ADDED_HEADS or backbone.head.task_type != "FEATURE_EXTRACTION":
        return backbone
    name = ADDED_HEADS[task_type]
    expected = backbone.architecture.classification
    if task_type in CLASSIFICATION_TASKS and task_type != expected:
        raise ConfigError(
            f'The classifier that is added to {type(backbone.model).__name__} needs task_type="{expected}", got '
            f'"{task_type}", which is for other inputs than the model takes.'
        )
    if not any(labels.get(name) for name in ("num_labels", "id2label", "label2id")):
        raise ConfigError(
            f"The {name} that is added to {type(backbone.model).__name__} needs labels, got none. Give num_labels "
            "or id2label: get_vpt_model(model, config, num_labels=5)."
        )
    add_head = add_classifier if task_type in CLASSIFICATION_TASKS else add_decode_head
    return add_head(backbone, len(make_labels(backbone.model.config, labels)["id2label"]))


def warn_of_initialised_parts(backbone: Backbone, adapter: Adapter) -> None:
    """Warns of parts of the backbone that no checkpoint contained and that are not saved with the adapter."""
    copied = tuple(f"{path}." for path in (*backbone.head.paths, *adapter.modules_to_save.paths))
    unread = {parameter for module in backbone.unread_pooler_modules for parameter in module.parameters()}
    parameters = {name: one for name, one in backbone.model.named_parameters() if one not in unread}
    loaded = {name for name, parameter in parameters.items() if getattr(parameter, "_is_hf_initialized", False)}
    initialised = [name for name in parameters if name not in loaded and not (copied and name.startswith(copied))]
    if loaded and initialised:
        warnings.warn(
            f"{truncate_list(initialised, MAX_LISTED)} of the backbone were not in its checkpoint and have random "
            "values, which are not saved with the adapter: it can be loaded only onto this very model. Load a "
            "checkpoint that has them, or train and save them with PromptConfig(modules_to_save=[...]).",
            stacklevel=4,
        )


def warn_of_float16_on_cpu(backbone: Backbone, stacklevel: int) -> None:
    """Warns of a backbone in float16 on a machine without an accelerator.

    Args:
        stacklevel: as in ``warnings.warn``.
    """
    parameter = next(backbone.encoder.parameters())
    if parameter.dtype == torch.float16 and parameter.device.type == "cpu" and not torch.accelerator.is_available():
        warnings.warn(
            "The backbone is in float16 on a CPU: on most CPUs, training and inference are several times slower than "
            "in float32. Load it with dtype=torch.float32, or with torch.bfloat16 if the CPU supports it.",
            stacklevel=stacklevel + 1,
        )


def check_untrained(backbone: Backbone, fingerprint: Fingerprint) -> None:
    """Checks before saving that the backbone, which is not saved, is as it was when adapters were attached.

    Args:
        fingerprint: of the backbone at that time. Sharded backbones (FSDP2) are not compared.

    Raises:
        AdapterError: it has changed. If it only may change, since a parameter requires a gradient, there is a warning.
    """
    parameters = dict(backbone.model.named_parameters())
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    is_sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    changed = [] if is_sharded else fingerprint.differences(take_fingerprint(backbone))
    if not changed and not trainable:
        return
    message = (
        f"Parameters of the backbone are not saved, but {truncate_list(trainable or changed, MAX_LISTED)} "
        f"{'changed' if changed else 'requires a gradient'}. Train copies of those modules instead, with "
        "PromptConfig(modules_to_save=[...])."
    )
    if changed:
        raise AdapterError(f"{message} Nothing was saved.")
    warnings.warn(message, stacklevel=3)


def _peft_layers(model: nn.Module) -> list[str]:
    """Names of layers with PEFT's adapters, such as LoRA."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
