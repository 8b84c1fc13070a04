"""Injector: puts all hooks and overrides on a backbone, and takes them off again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from ..backbones import Backbone
from .attention import AttentionOverride
from .hooks import BackboneOutputHook, LayerHook, PatchMergingHook
from .overrides import ForwardOverride, HeadOverride, ModuleOverride

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class Injection(Protocol):
    """A hook or an override of one module."""

    def inject(self) -> None: ...
    def remove(self) -> None: ...


class Injector:
    """Injects prompts and adapters' modules into a backbone, and freezes it; :meth:`remove` restores it.

    Args:
        backbone: the backbone; if the injection fails, it is as it was before.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        model = backbone.model
        self.requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.training = [(module, module.training) for module in model.modules()]
        self.checkpointing = [
            (module, {name: module.__dict__[name] for name in CHECKPOINTING if name in module.__dict__})
            for module in model.modules()
            if hasattr(module, "gradient_checkpointing")
        ]
        self.overridden = set(backbone.head.paths)
        self.injections: list[Injection] = []
        try:
            self._inject(BackboneOutputHook(backbone.encoder))
            for layer in backbone.layers:
                self._inject(LayerHook(layer))
                self._inject(AttentionOverride(layer))
            for merging in backbone.mergings.values():
                self._inject(PatchMergingHook(merging))
            for path in backbone.head.paths:
                self._inject(HeadOverride(backbone, path))
            model.requires_grad_(False)
        except BaseException:
            self.remove()
            raise

    def _inject(self, injection: Injection) -> None:
        injection.inject()
        self.injections.append(injection)

    def add_overrides(self, paths: Iterable[str]) -> None:
        """Lets adapters replace the modules at these paths of the model, or their biases."""
        for path in set(paths) - self.overridden:
            self._inject(ModuleOverride(self.backbone.model.get_submodule(path), path))
            self.overridden.add(path)

    def remove(self) -> None:
        """Removes all hooks and overrides, and restores gradients, modes and gradient checkpointing."""
        for injection in reversed(self.injections):
            injection.remove()
        self.injections.clear()
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)
        for module, training in self.training:
            module.training = training
        for module, settings in self.checkpointing:
            for name in CHECKPOINTING:
                module.__dict__.pop(name, None)
            module.__dict__.update(settings)


def has_overrides(model: nn.Module) -> bool:
    """Whether adapters are injected into a model."""
    return any(isinstance(module.__dict__.get("forward"), ForwardOverride) for module in model.modules())
