"""Dense copies of quantised modules: a backbone may be quantised, but what an adapter trains never is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import ConfigError


def dense(module: nn.Module, path: str, on_meta: bool = False) -> nn.Module:
    """The module with plain linear layers in place of quantised ones (torchao, bitsandbytes).

    Args:
        path: its name, for the error.
        on_meta: the plain layers take no memory, since other values will take their place.

    Raises:
        ConfigError: something else in it is quantised.
    """
    if is_quantized(module):
        return _linear(module, path, on_meta)
    for name, child in module.named_children():
        setattr(module, name, dense(child, f"{path}.{name}", on_meta))
    return module


def is_quantized(module: nn.Module) -> bool:
    """Whether its own weight is anything but a tensor of floating point."""
    weight: Tensor | None = module._parameters.get("weight")
    if isinstance(weight, DTensor):  # shared by several processes
        weight = weight.to_local()
    return weight is not None and (type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point())


@torch.no_grad()
def _linear(module: nn.Module, path: str, on_meta: bool) -> nn.Linear:
    """A linear layer that computes what a quantised one does, whoever quantised it: its weight is what the module
    makes of the unit vectors."""
    if not isinstance(module, nn.Linear):
        raise ConfigError(
            f"What an adapter trains must be dense or a quantised linear layer, got {type(module).__name__} at "
            f"'{path}' with a weight of {module.weight.dtype}. Load the backbone without quantising that module."
        )
    device = torch.device("meta") if on_meta else module.weight.device
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device=device)
    if not on_meta:
        like = module.weight if module.bias is None else module.bias  # what the module computes in
        units = torch.eye(
            module.in_features, device=device, dtype=like.dtype if like.is_floating_point() else torch.float32
        )
        made = torch.cat([module(part).float() for part in units.split(256)])
        linear.weight.copy_((made if module.bias is None else made - module.bias.float()).T)
        if module.bias is not None:
            linear.bias.copy_(module.bias)
    return linear
