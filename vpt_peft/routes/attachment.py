"""An attachment: all doors on one model, and the settings that are restored when they go."""

from __future__ import annotations

from collections.abc import Iterable

from ..backbones import Backbone
from .attention import AttentionDoor
from .doors import Door
from .heads import HeadDoor, StandInDoor, TrunkDoor
from .layers import LayerDoor, MergingDoor

CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class Attachment:
    """Puts doors on a backbone and freezes it; :meth:`detach` leaves nothing of that behind.

    Args:
        backbone: the backbone to attach to.
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
        self.stand_ins: set[str] = set(backbone.head.paths)
        self.doors: list[Door | AttentionDoor] = [
            TrunkDoor(backbone.trunk),
            *(LayerDoor(layer) for layer in backbone.layers),
            *(AttentionDoor(layer) for layer in backbone.layers),
            *(MergingDoor(merging) for merging in backbone.mergings.values()),
            *(HeadDoor(backbone, path) for path in backbone.head.paths),
        ]
        for door in self.doors:
            door.attach()
        model.requires_grad_(False)

    def admit(self, paths: Iterable[str]) -> None:
        """Lets adapters' copies stand in for the modules at these paths."""
        for path in set(paths) - self.stand_ins:
            door = StandInDoor(self.backbone.model.get_submodule(path), path)
            door.attach()
            self.doors.append(door)
            self.stand_ins.add(path)

    def detach(self) -> None:
        """Takes all doors away and restores what was set before."""
        for door in reversed(self.doors):
            door.detach()
        self.doors.clear()
        for parameter, requires_grad in self.requires_grad:
            parameter.requires_grad_(requires_grad)
        for module, training in self.training:
            module.training = training
        for module, settings in self.checkpointing:
            for name in CHECKPOINTING:
                module.__dict__.pop(name, None)
            module.__dict__.update(settings)
