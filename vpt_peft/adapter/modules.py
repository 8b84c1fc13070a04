"""Modules owned by an adapter: copies of the head and of ``modules_to_save``, under their paths in the model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ..backbones import Backbone
from ..config import CLASSIFICATION_TASKS, PromptConfig
from ..errors import ConfigError
from .dequantize import dequantize, is_quantized

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class ModuleTree(nn.Module):
    """Modules and parameters under dotted paths, as nested modules: the keys of its state dict are those paths.

    Paths are those of another model, so any word may occur in them. They are resolved in the dictionaries of
    ``nn.Module``, where no attribute shadows them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def add(self, path: str, value: nn.Module | nn.Parameter) -> None:
        """Adds a module or parameter."""
        *parents, name = path.split(".")
        node: nn.Module = self
        for parent in parents:
            node._modules.setdefault(parent, nn.Module())
            node = node._modules[parent]  # type: ignore[assignment]
        values: Any = node._modules if isinstance(value, nn.Module) else node._parameters
        values[name] = value
        self.paths.append(path)

    def find(self, path: str) -> Any:
        """The module or parameter at a path; None if there is none."""
        *parents, name = path.split(".")
        node: Any = self
        for parent in parents:
            node = node._modules.get(parent)
            if node is None:
                return None
        found = node._parameters.get(name)
        return node._modules.get(name) if found is None else found


def copy_head(
    backbone: Backbone, path: str, num_labels: int, device: torch.device, pooling: str = "default"
) -> nn.Module:
    """A copy of a module of the model's head, with new output layers if the number of labels differs.

    Args:
        pooling: as in :class:`~vpt_peft.PromptConfig`, on which the width of an added classifier depends.

    Raises:
        ConfigError: the model's head does not have the number of outputs in its config, or cannot be copied.
    """
    if backbone.has_added_head and backbone.head.task_type in CLASSIFICATION_TASKS:
        joined = 2 if pooling == "class_and_image" else 1
        return nn.Linear(joined * backbone.num_features, num_labels, device=device)
    on_meta = device.type == "meta"
    head = dequantize(clone(backbone.model.get_submodule(path), on_meta), path, on_meta)
    for output in backbone.head.label_layers:
        if output == path:
            return _output_layer(head, output, backbone, num_labels, device)
        if output.startswith(path + "."):
            inside = output.removeprefix(path + ".")
            parent, _, name = inside.rpartition(".")
            modules = dict(head.named_modules())
            layer = _output_layer(modules.get(inside), output, backbone, num_labels, device)
            if layer is not modules.get(inside):
                setattr(modules[parent], name, layer)
    return head


def _output_layer(layer: Any, path: str, backbone: Backbone, num_labels: int, device: torch.device) -> Any:
    """A copied layer of the head, or a new one for another number of labels.

    Args:
        layer: the copy; None if a head of the user's own has no such layer.
    """
    expected, extra = len(backbone.model.config.id2label or ()), backbone.head.extra_outputs
    if num_labels == expected:
        is_conv = isinstance(layer, nn.Conv2d)
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels if is_conv else None
        outputs = expected if outputs is None else outputs - extra
        if outputs != expected:
            raise ConfigError(
                f"The head must have an output for each label in the model's config, got {outputs} outputs of '{path}' "
                f"for num_labels={expected}. Load the model with num_labels={outputs}, or correct model.config first: "
                f"its num_labels, or the names in its id2label and label2id."
            )
        return layer
    if num_labels == 0:
        if backbone.head.task_type not in CLASSIFICATION_TASKS:
            raise ConfigError(f"{type(backbone.model).__name__} needs at least one label, got num_labels=0.")
        return nn.Identity()  # as transformers does
    if isinstance(layer, nn.Linear | nn.Identity):
        num_features = layer.in_features if isinstance(layer, nn.Linear) else backbone.num_features
        return nn.Linear(num_features, num_labels + extra, device=device)
    if isinstance(layer, nn.Conv2d):
        size, stride, padding = layer.kernel_size, layer.stride, layer.padding
        return nn.Conv2d(layer.in_channels, num_labels + extra, size, stride, padding, device=device)  # type: ignore[arg-type]
    raise ConfigError(
        f"A head with {num_labels} labels can replace a linear layer or a convolution, got {type(layer).__name__} at "
        f"'{path}'. Load the backbone with num_labels={num_labels}."
    )


def describe(module: nn.Module) -> str:
    """The classes of a module and of those inside, such as ``Sequential(Dropout, Linear)``."""
    inside = ", ".join(describe(child) for child in module.children())
    return f"{type(module).__name__}({inside})" if inside else type(module).__name__


def find_modules_to_save(config: PromptConfig, backbone: Backbone) -> dict[str, nn.Module]:
    """The modules that ``modules_to_save`` names, by path, without those of the head.

    Raises:
        ConfigError: a name matches no module, a list of modules, overlapping modules, or one that contains a layer.
    """
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
                _check_copyable(path, module, backbone)
                found[path] = module
    for path in found:
        outer = [other for other in found if path.startswith(other + ".")]
        if outer:
            raise ConfigError(f"modules_to_save must not overlap, got '{path}' inside '{outer[0]}'. Name one of them.")
    return found


def _check_copyable(path: str, module: nn.Module, backbone: Backbone) -> None:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise ConfigError(f"modules_to_save must name modules that are called, got the list '{path}'. Name its parts.")
    inside = {id(part) for part in module.modules()}
    hooked = [backbone.encoder, *backbone.mergings.values()]
    hooked += [part for layer in backbone.layers for part in (layer.module, layer.part("caller"))]
    if any(id(part) in inside for part in hooked):
        raise ConfigError(
            f"modules_to_save must not name modules that contain an attention or a layer, got '{path}'. "
            "Name smaller parts, such as 'mlp' or 'layernorm_after'."
        )
    if any(module is layer.part("qkv") and layer.part("q_bias") is not None for layer in backbone.layers):
        raise ConfigError(
            f"modules_to_save must name modules that are called, got '{path}', whose weight the attention reads "
            "together with biases of its own. Name other parts."
        )


def copy_patch_projection(
    backbone: Backbone, path: str, num_channels: int, copied: list[str], device: torch.device
) -> nn.Module:
    """A copy of the convolution that embeds patches, with further input channels, initialised as torch does.

    Args:
        path: of the convolution in the model.
        num_channels: number of further channels.
        copied: paths of the modules that the adapter copies already.
        device: device of the copy; on "meta" it gets no values.

    Raises:
        ConfigError: it is no plain convolution, or part of a module that is copied already.
    """
    outer = [other for other in copied if f"{path}.".startswith(f"{other}.")]
    if outer:
        raise ConfigError(
            f"location=\"channel\" trains '{path}' as it is, got modules_to_save with '{outer[0]}', which contains it. "
            "Name other modules."
        )
    original: Any = backbone.model.get_submodule(path)
    if type(original) is not nn.Conv2d or (original.groups, original.padding_mode) != (1, "zeros"):
        raise ConfigError(
            f"location=\"channel\" adds channels to a plain torch.nn.Conv2d, got {describe(original)} at '{path}'."
        )
    projection: Any = clone(original, on_meta=device.type == "meta")
    number = projection.in_channels
    projection.in_channels += num_channels
    new = nn.Conv2d(
        projection.in_channels, projection.out_channels, projection.kernel_size, bias=False, device=device
    ).weight[:, number:]
    projection.weight = nn.Parameter(torch.cat([projection.weight.detach(), new.detach().to(projection.weight)], dim=1))
    return projection


def clone(module: nn.Module, on_meta: bool = False) -> nn.Module:
    """A deep copy without hooks and overrides of ``forward``, and without the objects that those refer to.

    Args:
        on_meta: create its parameters on the meta device, for weights that are loaded next.
    """
    _check_plain(module)
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
        for name in HOOKS:  # each module needs dictionaries of its own
            setattr(part, name, OrderedDict())
        part.__dict__.pop("forward", None)
    return copied


def _check_plain(module: nn.Module) -> None:
    """Raises ConfigError if a hook computes a tensor of the module from parameters: copies have no hooks."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            computed = isinstance(value, torch.Tensor) and any(own.startswith(f"{name}_") for own in part._parameters)
            if computed and not is_quantized(part):
                raise ConfigError(
                    f"Modules trained by an adapter must own their parameters, got a {type(part).__name__} with a hook "
                    f"that computes its {name}, as of torch.nn.utils.prune, weight_norm or spectral_norm. Remove it "
                    "before (prune.remove, remove_weight_norm), or use torch.nn.utils.parametrizations."
                )


def find_biases(config: PromptConfig, backbone: Backbone, owned: list[str]) -> dict[str, nn.Parameter]:
    """``{module path: bias}`` of the biases that ``bias="all"`` trains: those that reach the head.

    Args:
        owned: paths of modules that the adapter copies, whose biases are part of those copies.
    """
    if config.bias == "none":
        return {}
    unread = backbone.unread_modules
    if config.pooling not in ("default", "pooled"):
        unread |= backbone.pooler_modules
    return {
        path: module.bias
        for path, module in backbone.model.named_modules()
        if module not in unread
        and isinstance(getattr(module, "bias", None), nn.Parameter)
        and not any(path == root or path.startswith(root + ".") for root in owned)
    }
