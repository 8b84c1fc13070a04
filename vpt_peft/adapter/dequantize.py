"""Dense copies of quantised modules: the backbone may be quantised, the modules that an adapter trains are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import ConfigError


def dequantize(module: nn.Module, path: str, on_meta: bool = False) -> nn.Module:
    """Replaces quantised linear layers (torchao, bitsandbytes) in a module by ``nn.Linear``.

    Args:
        path: name of the module, for the error message.
        on_meta: create the replacements on the meta device.

    Returns:
        The module, or its replacement.

    Raises:
        ConfigError: it contains another quantised layer.
    """
    if is_quantized(module):
        return _to_linear(module, path, on_meta)
    for name, child in module.named_children():
        setattr(module, name, dequantize(child, f"{path}.{name}", on_meta))
    return module


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight of the module itself is not a plain floating-point tensor."""
    weight: Tensor | None = module._parameters.get("weight")
    if isinstance(weight, DTensor):
        weight = weight.to_local()
    return weight is not None and (type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point())


@torch.no_grad()
def _to_linear(module: nn.Module, path: str, on_meta: bool) -> nn.Linear:
    """The ``nn.Linear`` of equal function, found by applying the quantised layer to the unit vectors: this works for
    every quantisation library."""
    if not isinstance(module, nn.Linear):
        raise ConfigError(
            f"Modules trained by an adapter must be dense or quantised linear layers, got {type(module).__name__} at "
            f"'{path}' with a weight of {module.weight.dtype}. Load the backbone without quantising that module."
        )
    device = torch.device("meta") if on_meta else module.weight.device
    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device=device)
    if not on_meta:
        reference = module.weight if module.bias is None else module.bias  # its dtype is the layer's compute dtype
        dtype = reference.dtype if reference.is_floating_point() else torch.float32
        units = torch.eye(module.in_features, device=device, dtype=dtype)
        outputs = torch.cat([module(rows).float() for rows in units.split(256)])
        linear.weight.copy_((outputs if module.bias is None else outputs - module.bias.float()).T)
        if module.bias is not None:
            linear.bias.copy_(module.bias)
    return linear
