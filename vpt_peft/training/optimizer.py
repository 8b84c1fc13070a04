"""Optimizers with a learning rate for each kind of parameter."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..backbones import find_backbone
from ..errors import AdapterError, UnsupportedModelError, safe_repr
from ..model import VPTModel

LEARNING_RATE = 3e-3
PREFIX_LEARNING_RATE = 3e-2


def parameter_groups(
    model: nn.Module,
    learning_rate: float | None = None,
    head_learning_rate: float | None = 1e-2,
    weight_decay: float = 0.01,
    bias_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """The parameters that train, in groups for any optimizer of torch, with a learning rate for each kind.

    Args:
        model: a :class:`~vpt_peft.VPTModel`, wrapped or not, whose active adapter trains; or a supported model of
            ``transformers``, all of which trains.
        learning_rate: of all parameters but those of the following; None: 0.03 for a prefix, 0.003 for all others.
        head_learning_rate: of the head; None: that of the others.
        weight_decay: of matrices; parameters of one dimension (biases and norms) have none.
        bias_learning_rate: of the biases of an adapter with ``bias="all"``; None: that of the others.

    Returns:
        Groups with ``params``, ``lr`` and ``weight_decay``, one for each pair of rate and weight decay that occurs.

    Raises:
        AdapterError: a value is out of range, no parameter trains, or the model's head is unknown.
    """
    rates = {
        "learning_rate": learning_rate,
        "head_learning_rate": head_learning_rate,
        "bias_learning_rate": bias_learning_rate,
    }
    for name, value in {**rates, "weight_decay": weight_decay}.items():
        if value is None and name != "weight_decay":
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise AdapterError(f"{name} must be a number of at least 0, got {safe_repr(value)}.")
    parts = _parts_of_parameters(model)
    if "head" not in parts.values() and head_learning_rate not in (None, learning_rate) and not find_vpt_models(model):
        raise AdapterError(
            f"head_learning_rate needs a VPTModel or a supported backbone, got {type(model).__name__}, whose head is "
            "unknown. Set it to None."
        )

    def rate(parameter: nn.Parameter) -> float:
        part = parts.get(id(parameter))
        own = rates.get(f"{part}_learning_rate")
        if own is None:
            own = learning_rate
        if own is None:
            own = PREFIX_LEARNING_RATE if part == "prefix" else LEARNING_RATE
        return own

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate(parameter), decay), []).append(parameter)
    if not groups:
        raise AdapterError(
            "No parameter of the model trains. Load the adapter with is_trainable=True, or add a new one."
        )
    return [{"params": found, "lr": lr, "weight_decay": decay} for (lr, decay), found in groups.items()]


def find_vpt_models(model: nn.Module) -> list[VPTModel]:
    """The model itself, or the one that is wrapped in it, by DDP for example."""
    return [module for module in model.modules() if isinstance(module, VPTModel)]


def _parts_of_parameters(model: nn.Module) -> dict[int, str]:
    """``{id of a parameter: part of the adapter that it belongs to}``, such as "prefix", "bias" or "head"; of a bare
    model, only the head."""
    adapted = find_vpt_models(model)
    parts = {
        id(parameter): part
        for vpt in adapted
        for part, module in vpt._active.named_children()
        for parameter in module.parameters()
    }
    if not adapted:
        with suppress(UnsupportedModelError):
            for path in find_backbone(model).head.paths:
                parts |= {id(parameter): "head" for parameter in model.get_submodule(path).parameters()}
    return parts


def adamw(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[type[torch.optim.AdamW], dict[str, Any]]:
    """AdamW with :func:`parameter_groups`, whose arguments it takes, for ``Trainer``:
    ``Trainer(vpt, args, optimizer_cls_and_kwargs=adamw(vpt), ...)``."""
    return torch.optim.AdamW, {"params": parameter_groups(model, *args, **kwargs)}
