"""What stands in at the ends of the model: the adapter's own head, what it reads, and trained copies of modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import Backbone
from ..passes import Pass, current_pass
from .doors import Door, View


class TrunkDoor(Door):
    """Notes the trunk's output, for a classifier that reads other tokens than the backbone would give it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        running = current_pass()
        if running is not None and running.pooling != "default":
            running.last_hidden_state = output.last_hidden_state
        return output


class StandInDoor(Door):
    """Lets the adapter's own module or bias stand in for the model's."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__(module)
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        if running is None:
            return self.forward(*args, **kwargs)
        if self.path in running.modules:
            return self._call_module(running.modules[self.path], *args, **kwargs)
        if self.path in running.biases:
            weight = getattr(self.module, "weight", None)
            bias = running.biases[self.path]
            bias = bias.to(weight) if isinstance(weight, Tensor) and weight.is_floating_point() else bias
            return type(self.module).forward(View(self.module, bias=bias), *args, **kwargs)
        return self.forward(*args, **kwargs)

    def _call_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trained copies may be kept in another precision than the backbone around them."""
        return module(*(_like(module, value) for value in args), **kwargs)


class HeadDoor(StandInDoor):
    """Calls the adapter's own head, on what the adapter's pooling gives it."""

    def __init__(self, backbone: Backbone, path: str) -> None:
        super().__init__(backbone.model.get_submodule(path), path)
        self.backbone = backbone

    def _call_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        if running is not None and running.pooling != "default":
            args = (pool_tokens(running, self.backbone), *args[1:])
        return super()._call_module(module, *args, **kwargs)


def _like(module: nn.Module, value: Any) -> Any:
    parameter = next(module.parameters(), None)
    if not isinstance(value, Tensor) or parameter is None or not value.is_floating_point():
        return value
    if torch.is_autocast_enabled(value.device.type):
        return value.to(parameter.device)
    return value.to(parameter.device, parameter.dtype if parameter.is_floating_point() else value.dtype)


def pool_tokens(running: Pass, backbone: Backbone) -> Tensor:
    """What an adapter's ``pooling`` gives to the classifier: the mean over image tokens, prompts or both, behind the
    final norm and without ``[CLS]``, ``(num_images, width)``."""
    assert running.last_hidden_state is not None  # the trunk has just run
    image = running.last_hidden_state[:, backbone.architecture.num_prefix_tokens :]
    if running.pooling == "image":
        return image.mean(1)
    assert running.tokens is not None  # the plan makes sure of it
    prompts = backbone.final_norm(running.tokens)
    if running.pooling == "prompt":
        return prompts.mean(1)
    return torch.cat([image, prompts], dim=1).mean(1)
