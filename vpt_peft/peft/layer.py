"""VPTLayer: where PEFT and transformers look for the adapters in a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError
from ..model.arguments import TO_HAVE_BOTH, check_adapters_exist
from .config import VPTConfig
from .model import PromptedModel

if TYPE_CHECKING:
    from typing_extensions import Self


class VPTLayer(nn.Module, BaseTunerLayer):
    """The adapters of a model, as the one layer of PEFT that it has.

    Args:
        vpt: the model, which is no submodule.
    """

    adapter_layer_names = ("adapters",)
    vpt: PromptedModel

    def __init__(self, vpt: PromptedModel) -> None:
        nn.Module.__init__(self)
        self.__dict__["vpt"] = vpt

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters by name."""
        return self.vpt.adapters

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self.vpt.active_adapter

    @property
    def disable_adapters(self) -> bool:
        """Whether the model answers as the bare backbone."""
        return not self.vpt.enabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switches all adapters on or off."""
        self.vpt.enabled = enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter the active one, which trains, as in PEFT.

        Args:
            adapter_names: a name, or a list of one.
            inference_mode: True: it does not train.
        """
        self.vpt.set_adapter(adapter_names)
        self.adapters[self.active_adapter].requires_grad_(not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable, or freezes them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_adapters_exist(self.adapters, names)  # type: ignore[arg-type]
        for name in names:
            self.adapters[name].requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Makes all adapters trainable, or freezes them."""
        self.set_requires_grad(list(self.adapters), requires_grad)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, if it exists."""
        if adapter_name in self.adapters:
            self.vpt.delete_adapter(adapter_name)

    @contextmanager
    def as_backbone(self) -> Iterator[None]:
        """A context in which the backbone is as it was without adapters; here, it always is."""
        yield

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        self.adapters[adapter_name].to(device or self.vpt.device)


class VPTConfigs(dict[str, VPTConfig]):
    """The configs of a model's adapters, to which PEFT adds those of new ones before it makes them."""

    def __setitem__(self, name: str, config: Any) -> None:
        if not isinstance(config, VPTConfig):
            raise AdapterError(
                f"A backbone with prompts takes no other adapters of PEFT, got {type(config).__name__}. {TO_HAVE_BOTH}"
            )
        super().__setitem__(name, config)

    def update(self, configs: Any) -> None:  # type: ignore[override]  # PEFT gives a dict
        """Adds configs."""
        for name, config in configs.items():
            self[name] = config
