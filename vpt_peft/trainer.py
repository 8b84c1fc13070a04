"""What helps transformers' Trainer: a learning rate of its own for the head, and whole adapters in each push."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from .backbones import find_backbone
from .errors import AdapterError, UnsupportedModelError, shown
from .model import VPTModel


def parameter_groups(
    model: nn.Module,
    learning_rate: float = 3e-3,
    head_learning_rate: float | None = 1e-2,
    weight_decay: float = 0.01,
) -> list[dict[str, Any]]:
    """What trains, in groups for any optimizer of torch: prompts and whatever else there is, and the head.

    Args:
        model: a :class:`~vpt_peft.VPTModel`, wrapped or not, whose active adapter trains; or a supported model of
            ``transformers``, all of which trains.
        learning_rate: of the prompts.
        head_learning_rate: of the head; None: the same.
        weight_decay: of matrices; biases and norms, which have one dimension, get none.

    Returns:
        Up to four groups, each with ``params``, ``lr`` and ``weight_decay``; none is empty.

    Raises:
        AdapterError: a value is out of range, nothing trains, or the model's head is not known.
    """
    head_learning_rate = learning_rate if head_learning_rate is None else head_learning_rate
    values = {"learning_rate": learning_rate, "head_learning_rate": head_learning_rate, "weight_decay": weight_decay}
    for name, value in values.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise AdapterError(f"{name} must be a number of at least 0, got {shown(value)}.")
    head = {id(parameter) for parameter in _head_parameters(model)}
    if not head and head_learning_rate != learning_rate and not _adapted(model):
        raise AdapterError(
            f"head_learning_rate needs a VPTModel or a model that it could be made from, got {type(model).__name__}, "
            "whose head is not known. Set it to None."
        )
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in head, parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise AdapterError("Nothing of the model trains. Load the adapter with is_trainable=True, or add a new one.")
    return [
        {
            "params": parameters,
            "lr": head_learning_rate if of_head else learning_rate,
            "weight_decay": weight_decay if is_matrix else 0.0,
        }
        for (of_head, is_matrix), parameters in groups.items()
    ]


def _adapted(model: nn.Module) -> list[VPTModel]:
    """The model itself, or what is wrapped in it, for DDP, say."""
    return [module for module in model.modules() if isinstance(module, VPTModel)]


def _head_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    adapted = _adapted(model)
    for vpt in adapted:
        yield from vpt._active.head_parameters()
    if not adapted:
        with suppress(UnsupportedModelError):
            for path in find_backbone(model).head.paths:
                yield from model.get_submodule(path).parameters()


def adamw(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[type[torch.optim.AdamW], dict[str, Any]]:
    """AdamW over :func:`parameter_groups`, whose arguments it takes, as ``Trainer`` takes an optimizer:
    ``Trainer(vpt, args, optimizer_cls_and_kwargs=adamw(vpt), ...)``."""
    return torch.optim.AdamW, {"params": parameter_groups(model, *args, **kwargs)}


class PushAdapter(TrainerCallback):
    """Makes each push of a ``Trainer(vpt, args, callbacks=[PushAdapter()])`` a whole adapter.

    While it trains, Trainer itself uploads what transformers calls a model, and the adapter's files only if ``peft`` is
    installed. What it pushes at the end is whole in any case, but for the model card, which is Trainer's own:
    ``vpt.push_to_hub`` writes ours. Where several processes share the adapter (FSDP2), it does nothing.
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Saves the active adapter where Trainer is about to upload from. Its card names the repository."""
        found = _adapted(model)
        is_shared = any(isinstance(one, DTensor) for vpt in found for one in vpt.adapters.parameters())
        if state.is_world_process_zero and found and not is_shared:  # only one process comes here, and cannot gather
            found[0].save_pretrained(args.output_dir, [found[0].active_adapter], model_id=_repository(args))


def _repository(args: Any) -> str:
    """The repository that Trainer pushes to, with its owner, whom arguments need not name."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if "/" in name:
        return str(name)
    return create_repo(name, token=args.hub_token, private=args.hub_private_repo, exist_ok=True).repo_id
