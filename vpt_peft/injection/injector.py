"""Injector: puts all hooks and overrides on a backbone, and takes them off again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Protocol

from torch import nn

from ..backbones import Backbone
from ..errors import RouteError, UnsupportedModelError
from .attention import override_attention
from .hooks import CheckpointingOverride, LayerHook, PatchMergingHook, TokensHook
from .overrides import EntryOverride, ForwardOverride, HeadOverride, ModuleOverride

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func", "grad_checkpointing")  # the last is timm's

# {id of a parameter: (ids of the settings that freeze it, whether it required gradients before)}: models share weights.
# The settings keep their parameters alive, so that no id is given out again.
_frozen: dict[int, tuple[set[int], bool]] = {}


class Injection(Protocol):
    """A hook or an override of one module."""

    def inject(self) -> None: ...
    def remove(self) -> None: ...


class ModelSettings:
    """The settings of a model that attaching adapters changes: gradients, modes and gradient checkpointing."""

    def __init__(self, model: nn.Module) -> None:
        self.requires_grad = [
            (parameter, _frozen.get(id(parameter), (None, parameter.requires_grad))[1])
            for parameter in model.parameters()
        ]
        self.training = [(module, module.training) for module in model.modules()]
        self.checkpointing = [
            (module, {name: module.__dict__[name] for name in CHECKPOINTING if name in module.__dict__})
            for module in model.modules()
            if hasattr(module, "gradient_checkpointing") or hasattr(module, "grad_checkpointing")
        ]

    def freeze(self) -> None:
        """Freezes all parameters."""
        for parameter, requires_grad in self.requires_grad:
            _frozen.setdefault(id(parameter), (set(), requires_grad))[0].add(id(self))
            parameter.requires_grad_(False)
        weakref.finalize(self, _forget, id(self), [id(parameter) for parameter, _ in self.requires_grad])

    def restore(self) -> None:
        """Restores all settings; parameters that other settings freeze too stay frozen."""
        _forget(id(self), [id(parameter) for parameter, _ in self.requires_grad])
        for parameter, requires_grad in self.requires_grad:
            if id(parameter) not in _frozen:
                parameter.requires_grad_(requires_grad)
        for module, training in self.training:
            module.training = training
        for module, settings in self.checkpointing:
            for name in CHECKPOINTING:
                module.__dict__.pop(name, None)
            module.__dict__.update(settings)


def _forget(settings: int, parameters: list[int]) -> None:
    """Ends the freezing of parameters by settings, both given by id."""
    for parameter in parameters:
        users = _frozen.get(parameter, (set[int](), False))[0]
        users.discard(settings)
        if not users:
            _frozen.pop(parameter, None)


class Injector:
    """Injects prompts and adapters' modules into a backbone, and freezes it; :meth:`remove` restores it.

    Args:
        backbone: the backbone; if the injection fails, it is as it was before.
        settings: what to restore; None: the current settings.

    Raises:
        UnsupportedModelError: weights of the backbone are on the meta device, as those that accelerate offloads.
    """

    def __init__(self, backbone: Backbone, settings: ModelSettings | None = None) -> None:
        _check_in_memory(backbone)
        self.backbone = backbone
        self.settings = settings or ModelSettings(backbone.model)
        self.overridden: set[str] = set()
        self.injections: list[Injection] = []
        # {(parent, name): child}: the modules through which a forward pass must go.
        self._children: dict[tuple[nn.Module, str], nn.Module] = {}
        self.settings.freeze()
        try:
            paths = {module: path for path, module in backbone.model.named_modules()}
            for entry in dict.fromkeys((backbone.model, backbone.encoder)):
                self._inject(EntryOverride(backbone, entry), paths[entry])
            for layer in backbone.layers:
                self._inject(LayerHook(backbone, layer), paths[layer.module])
                self._inject(override_attention(backbone, layer), paths[layer.part("caller")])
            for merging in backbone.mergings.values():
                self._inject(PatchMergingHook(backbone, merging), paths[merging])
            if backbone.head.tokens is not None:
                tokens = backbone.encoder.get_submodule(backbone.head.tokens)
                self._inject(TokensHook(backbone, tokens), paths[tokens])
            if hasattr(backbone.wrapped, "set_grad_checkpointing"):
                self._inject(CheckpointingOverride(backbone), paths[backbone.wrapped])
            for path in backbone.head.paths:
                self._inject(HeadOverride(backbone, path), path)
            self.overridden.update(backbone.head.paths)
        except BaseException:
            self.remove()
            raise

    def _inject(self, injection: Injection, path: str) -> None:
        injection.inject()
        self.injections.append(injection)
        module: nn.Module = self.backbone.model
        for name in path.split(".") if path else ():
            parent, module = module, module.get_submodule(name)
            self._children[parent, name] = module

    def add_overrides(self, paths: Iterable[str]) -> None:
        """Lets adapters replace the modules at these paths of the model, or their biases."""
        for path in sorted(set(paths) - self.overridden):
            self._inject(ModuleOverride(self.backbone, path), path)
            self.overridden.add(path)

    def check_modules(self) -> None:
        """Raises RouteError if a module with a hook or an override has been replaced, and is not inside of its
        replacement, since its prompts, head, copy or bias would be ignored."""
        for (parent, name), child in self._children.items():
            found = parent._modules.get(name)
            if found is not child and (found is None or all(inner is not child for inner in found.modules())):
                raise RouteError(
                    f"The module '{name}' of {type(parent).__name__} was replaced after the adapter was attached, so "
                    "that the adapter would be ignored there. Replace modules before get_vpt_model(), or after "
                    "unload(); an adapter's own head and copies are in vpt.adapters."
                )

    def remove(self) -> None:
        """Removes all hooks and overrides, and restores the settings of the backbone."""
        for injection in reversed(self.injections):
            injection.remove()
        self.injections.clear()
        self.settings.restore()


def has_overrides(model: nn.Module) -> bool:
    """Whether adapters are injected into a model."""
    return any(isinstance(module.__dict__.get("forward"), ForwardOverride) for module in model.modules())


def _check_in_memory(backbone: Backbone) -> None:
    missing = next((name for name, tensor in backbone.model.named_parameters() if tensor.is_meta), None)
    if missing is not None:
        raise UnsupportedModelError(
            f"The weights of the backbone must be in memory, but {missing} is on the meta device: it was offloaded, or "
            "never loaded. Load the backbone without offloading (device_map), or with quantised weights."
        )
