"""An adapter's own copies of the model's modules: its head, and whatever else it is to train of the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from .backbones import Backbone
from .config import PromptConfig
from .dense import dense, is_quantized
from .errors import ConfigError

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def own_head(backbone: Backbone, path: str, num_labels: int, device: torch.device) -> nn.Module:
    """A copy of a module of the model's head; with new output layers where it has another number of labels."""
    on_meta = device.type == "meta"
    head = dense(clone(backbone.model.get_submodule(path), on_meta), path, on_meta)
    if num_labels == backbone.model.config.num_labels:
        return head
    for output in backbone.head.label_layers:
        if output == path:
            return _new_output(head, output, backbone, num_labels, device)
        if output.startswith(path + "."):
            parent, _, name = output.removeprefix(path + ".").rpartition(".")
            holder = head.get_submodule(parent)
            setattr(holder, name, _new_output(getattr(holder, name), output, backbone, num_labels, device))
    return head


def _new_output(layer: Any, path: str, backbone: Backbone, num_labels: int, device: torch.device) -> nn.Module:
    if isinstance(layer, nn.Linear | nn.Identity):
        return nn.Linear(backbone.num_features, num_labels, device=device)
    if isinstance(layer, nn.Conv2d):
        return nn.Conv2d(layer.in_channels, num_labels, kernel_size=1, device=device)
    raise ConfigError(
        f"The head at '{path}' must be a linear layer or a convolution to be replaced by one with {num_labels} labels, "
        f"got {type(layer).__name__}. Load the backbone with num_labels={num_labels}."
    )


def modules_to_save(config: PromptConfig, backbone: Backbone) -> dict[str, nn.Module]:
    """The modules named in ``modules_to_save`` by their paths; the head, which is saved anyway, is left out."""
    found: dict[str, nn.Module] = {}
    for name in config.modules_to_save or ():
        matches = {
            path: module for path, module in backbone.model.named_modules() if path == name or path.endswith("." + name)
        }
        if not matches:
            raise ConfigError(
                f"modules_to_save must name modules of {type(backbone.model).__name__}, got '{name}', which is none. "
                "model.named_modules() lists them."
            )
        for path, module in matches.items():
            if not any(path == head or path.startswith(head + ".") for head in backbone.head.paths):
                found[path] = _check_free(path, module, backbone)
    for path in found:
        outer = [other for other in found if path.startswith(other + ".")]
        if outer:
            raise ConfigError(f"modules_to_save must not overlap, got '{path}' inside '{outer[0]}'. Name one of them.")
    return found


def _check_free(path: str, module: nn.Module, backbone: Backbone) -> nn.Module:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ConfigError(f"modules_to_save must name modules that are called, got the list '{path}'. Name its parts.")
    inside = {id(part) for part in module.modules()}
    guarded = [backbone.trunk, *backbone.mergings.values()]
    guarded += [part for layer in backbone.layers for part in (layer.module, layer.part("attention"))]
    if any(id(part) in inside for part in guarded):
        raise ConfigError(
            f"modules_to_save must not name a module through which prompts pass, got '{path}'. "
            "Name smaller parts, such as 'mlp' or 'layernorm_after'."
        )
    return module


def clone(module: nn.Module, on_meta: bool = False) -> nn.Module:
    """A deep copy without hooks or doors, which would bring along whatever they hold on to.

    Args:
        on_meta: its parameters take no memory, since others will take their place.
    """
    memo: dict[int, Any] = {}
    if on_meta:
        plain = [own for part in module.modules() if not is_quantized(part) for own in part.parameters(recurse=False)]
        memo |= {id(own): nn.Parameter(torch.empty_like(own, device="meta")) for own in plain}
    for part in module.modules():
        memo |= {id(part.__dict__[name]): OrderedDict() for name in HOOKS}
        if "forward" in part.__dict__:
            memo[id(part.__dict__["forward"])] = None
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name in HOOKS:  # one empty dict each: the memo shares its own
            setattr(part, name, OrderedDict())
        part.__dict__.pop("forward", None)
    return copied
