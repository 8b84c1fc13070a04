"""Doors: what stands before a module's forward while an adapter is attached, and is gone when it is detached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn


class View:
    """An object seen with some attributes replaced; all others are the original's, live."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_original":  # asked of a view that is only just being copied
            raise AttributeError(name)
        return getattr(self._original, name)


class Door(ABC):
    """Takes calls of ``module.forward``. Outside a pass it lets them through unchanged."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def attach(self) -> None:
        self.previous = self.module.__dict__.get("forward")
        self.forward = self.module.forward
        self.module.forward = self

    def detach(self) -> None:
        del self.module.forward
        if self.previous is not None:
            self.module.forward = self.previous

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def has_doors(model: nn.Module) -> bool:
    """Whether an adapter is attached to the model."""
    return any(isinstance(module.__dict__.get("forward"), Door) for module in model.modules())
