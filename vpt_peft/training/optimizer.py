"""Optimizers with a separate learning rate for the head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..backbones import find_backbone
from ..errors import AdapterError, UnsupportedModelError, safe_repr
from ..model import VPTModel


def parameter_groups(
    model: nn.Module,
    learning_rate: float = 3e-3,
    head_learning_rate: float | None = 1e-2,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """The parameters that train, in groups for any optimizer of torch: the head, and all others.

    Args:
        model: a :class:`~vpt_peft.VPTModel`, wrapped or not, whose active adapter trains; or a supported model of
            ``transformers``, all of which trains.
        learning_rate: of prompts and all other parameters but the head.
        head_learning_rate: of the head; None: ``learning_rate``.
        weight_decay: of matrices; parameters of one dimension (biases and norms) have none.

    Returns:
        Up to four groups, each with ``params``, ``lr`` and ``weight_decay``; none is empty.

    Raises:
        AdapterError: a value is out of range, no parameter trains, or the model's head is unknown.
    """
    head_learning_rate = learning_rate if head_learning_rate is None else head_learning_rate
    values = {"learning_rate": learning_rate, "head_learning_rate": head_learning_rate, "weight_decay": weight_decay}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise AdapterError(f"{name} must be a number of at least 0, got {safe_repr(value)}.")
    head = {id(parameter) for parameter in _head_parameters(model)}
    if not head and head_learning_rate != learning_rate and not find_vpt_models(model):
        raise AdapterError(
            f"head_learning_rate needs a VPTModel or a supported backbone, got {type(model).__name__}, whose head is "
            "unknown. Set it to None."
        )
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in head, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise AdapterError(
            "No parameter of the model trains. Load the adapter with is_trainable=True, or add a new one."
        )
    return [
        {
            "params": parameters,
            "lr": head_learning_rate if of_head else learning_rate,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for (of_head, is_matrix), parameters in groups.items()
    ]


def find_vpt_models(model: nn.Module) -> list[VPTModel]:
    """The model itself, or the one that is wrapped in it, by DDP for example."""
    return [module for module in model.modules() if isinstance(module, VPTModel)]


def _head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    adapted = find_vpt_models(model)
    for vpt in adapted:
        yield from vpt._active.head_parameters()
    if not adapted:
        with suppress(UnsupportedModelError):
            for path in find_backbone(model).head.paths:
                yield from model.get_submodule(path).parameters()


def adamw(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[type[torch.optim.AdamW], dict[str, Any]]:
    """AdamW with :func:`parameter_groups`, whose arguments it takes, for ``Trainer``:
    ``Trainer(vpt, args, optimizer_cls_and_kwargs=adamw(vpt), ...)``."""
    return torch.optim.AdamW, {"params": parameter_groups(model, *args, **kwargs)}
