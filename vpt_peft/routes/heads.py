"""What stands in at the ends of the model: the adapter's own head, what it reads, and trained copies of modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..passes import Group, Pass, current_pass
from .doors import Door, View


class TrunkDoor(Door):
    """Notes the trunk's output, for a classifier that reads other tokens than the backbone would give it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        running = current_pass()
        if running is not None and any(group.pooling != "default" for group in running.groups):
            running.last_hidden_state = output.last_hidden_state
        return output


class StandInDoor(Door):
    """Lets the adapter's own copy or bias stand in for the model's. Adapters that have any never share a pass."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__(module)
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        group = running.groups[0] if running is not None else Group()
        if self.path in group.modules:
            return call_in_own_precision(group.modules[self.path], *args, **kwargs)
        if self.path in group.biases:
            bias = group.biases[self.path].to(args[0].device)
            weight = getattr(self.module, "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point():
                bias = bias.to(weight.dtype)
            return type(self.module).forward(View(self.module, bias=bias), *args, **kwargs)
        return self.forward(*args, **kwargs)


class HeadDoor(Door):
    """Calls each adapter's own head, on what its pooling gives it."""

    def __init__(self, backbone: Backbone, path: str) -> None:
        super().__init__(backbone.model.get_submodule(path))
        self.backbone = backbone
        self.path = path

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        if running is None:
            return self.forward(features, *args, **kwargs)
        outputs = [self._call_head(running, group, features, *args, **kwargs) for group in running.groups]
        return outputs[0] if running.groups[0].rows is None else in_rows(outputs, running)

    def _call_head(self, running: Pass, group: Group, features: Any, *args: Any, **kwargs: Any) -> Any:
        if group.pooling != "default":
            features = pool_tokens(running, group, self.backbone)
        else:
            features = each_tensor(group.select, features) if group.rows is not None else features
        if self.path in group.modules:
            return call_in_own_precision(group.modules[self.path], features, *args, **kwargs)
        return self.forward(features, *args, **kwargs)


def pool_tokens(running: Pass, group: Group, backbone: Backbone) -> Tensor:
    """What an adapter's ``pooling`` gives to the classifier: the mean over image tokens, prompts or both, behind the
    final norm and without ``[CLS]``, ``(images of the group, width)``."""
    assert running.last_hidden_state is not None  # the trunk has just run
    image = group.select(running.last_hidden_state)[:, backbone.architecture.num_prefix_tokens :]
    norm = backbone.pooled_norm or nn.Identity()
    if group.pooling == "image":
        return norm(image.mean(1))
    assert group.tokens is not None  # the plan makes sure of it
    prompts = backbone.final_norm(group.tokens)
    if group.pooling == "prompt":
        return norm(prompts.mean(1))
    return norm(torch.cat([image, prompts], dim=1).mean(1))


def in_rows(outputs: Sequence[Any], running: Pass) -> Any:
    """What the groups' heads gave, in the batch's order: ``(num_images, most labels, ...)``, padded with zeros behind
    a task's own labels, or a tuple of such. Zeros, since segmentation models still interpolate what they get."""
    if not isinstance(outputs[0], Tensor):
        return tuple(in_rows(parts, running) for parts in zip(*outputs, strict=True))
    width = max(output.shape[1] for output in outputs)
    padded = [
        nn.functional.pad(output, (*(0, 0) * (output.ndim - 2), 0, width - output.shape[1])) for output in outputs
    ]
    order = [row for group in running.groups for row in group.rows or ()]
    positions = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(padded)[positions]


def each_tensor(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to a tensor, or to each in a list or tuple of feature maps."""
    if isinstance(value, Tensor):
        return function(value)
    return [each_tensor(function, one) for one in value] if isinstance(value, list | tuple) else value


def call_in_own_precision(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module that may be kept in another precision, or on another device, than the backbone around it."""
    parameter = next(module.parameters(), None)
    if parameter is None or not parameter.is_floating_point():
        return module(*args, **kwargs)

    def like(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        autocast = torch.is_autocast_enabled(value.device.type)
        return value.to(parameter.device, value.dtype if autocast else parameter.dtype)

    return module(*(each_tensor(like, value) for value in args), **kwargs)
