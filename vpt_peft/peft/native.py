"""Native adapters: those that transformers itself adds to a model, by ``model.load_adapter`` and ``model.add_adapter``.

The backbone then is the model that is called. Its forward hands over to a VPTModel around it, and the adapters' modules
are in it as ``{part}.{adapter_name}``, where transformers looks for the tensors ``{part}.{...}`` of a file.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from ..errors import AdapterError, RouteError
from ..injection.context import current_forward
from ..injection.overrides import ForwardOverride
from .config import LABELS, VPTConfig
from .layer import VPTConfigs, VPTLayer
from .model import PromptedModel

if TYPE_CHECKING:
    from typing_extensions import Self

LAYER = "visual_prompts"
LOADERS = "PeftModel.from_pretrained(model, adapter), VPTModel.from_pretrained(model, adapter) or AutoVPTModel"


def add_native_adapter(model: Any, config: VPTConfig, adapter_name: str) -> None:
    """Adds an adapter to a backbone, and makes it the active one.

    Raises:
        AdapterError: transformers has no place for the adapter; VPTError: as for a PromptedModel. The model is
            unchanged.
    """
    layer = model._modules.get(LAYER)
    if layer is None:
        vpt = PromptedModel(model, config, adapter_name)
        try:
            layer = NativeLayer(vpt)
        except BaseException:
            vpt.unload()
            raise
    else:
        with layer.as_backbone():
            layer.vpt.add(adapter_name, config)
        try:
            layer.show(adapter_name)
        except BaseException:
            layer.vpt.delete_adapter(adapter_name)
            raise
    model.peft_config[adapter_name] = config
    layer.set_adapter(adapter_name, config.inference_mode)
    layer.train(layer.vpt.training)


class NativeLayer(VPTLayer):
    """The layer of a backbone with native adapters, which puts all that is needed into it.

    Args:
        vpt: a model with one adapter.

    Raises:
        AdapterError: transformers has no place for the adapter. The backbone is unchanged.
    """

    def __init__(self, vpt: PromptedModel) -> None:
        super().__init__(vpt)
        model, original = vpt.base_model, vpt.backbone.original
        if model is not original or vpt._is_dual_encoder:
            reason = "has no classifier" if model is not original else "would get features of images without prompts"
            raise AdapterError(
                f"transformers cannot load this adapter into a {type(original).__name__} itself, which {reason}. "
                f"Use {LOADERS}."
            )
        self.own_labels = {name: getattr(model.config, name) for name in LABELS}
        self.names: set[str] = set()  # of the modules put into the backbone
        self.is_switching = False
        self.show(vpt.active_adapter)
        self.entries = [NativeEntry(vpt, module) for module in dict.fromkeys((vpt.backbone.encoder, model))]
        for entry in self.entries:
            entry.inject()
        model.peft_config = VPTConfigs()

    def show(self, adapter_name: str) -> None:
        """Puts the modules of an adapter into the backbone, and this layer behind them.

        Raises:
            AdapterError: the backbone has a module of that name; it is unchanged.
        """
        model = self.vpt.base_model
        adapter = self.adapters[adapter_name]
        parts = {part: module for part, module in adapter._modules.items() if module and module.state_dict()}
        taken = [part for part in parts if part not in self.names and hasattr(model, part)]
        if taken:
            raise AdapterError(
                f"transformers loads the tensors '{taken[0]}' of an adapter into a module of that name, but a "
                f"{type(model).__name__} has one of its own. Use {LOADERS}."
            )
        for part, module in parts.items():
            model._modules.setdefault(part, nn.ModuleDict())._modules[adapter_name] = module
        model._modules.pop(LAYER, None)
        model._modules[LAYER] = self  # behind all others, see train()
        self.names |= {*parts, LAYER}

    @contextmanager
    def as_backbone(self) -> Iterator[None]:
        """A context in which the backbone has its own modules and labels only."""
        model = self.vpt.base_model
        shown = model._modules
        model._modules = self._own_modules()
        self._set_labels(self.own_labels)
        try:
            yield
        finally:
            model._modules = shown
            self._update_labels()

    def _own_modules(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.vpt.base_model._modules.items() if name not in self.names}

    def _update_labels(self) -> None:
        """Lets the model's config have the labels of the active adapter, which pipelines read there."""
        labels = self.own_labels
        if self.vpt.enabled:
            labels = {name: getattr(self.vpt.config, name) for name in LABELS}
        self._set_labels(labels)

    def _set_labels(self, labels: dict[str, Any]) -> None:
        for name, value in labels.items():
            setattr(self.vpt.base_model.config, name, value)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in :class:`VPTLayer`."""
        super().set_adapter(adapter_names, inference_mode)
        self._update_labels()

    def enable_adapters(self, enabled: bool) -> None:
        """As in :class:`VPTLayer`."""
        super().enable_adapters(enabled)
        self._update_labels()

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter; with the last one, all that was put into the backbone."""
        if list(self.adapters) == [adapter_name]:
            for entry in reversed(self.entries):
                entry.remove()
            self.vpt.unload()
            self._set_labels(self.own_labels)
            self.vpt.base_model._modules = self._own_modules()  # PEFT is iterating over the other dictionary
            return
        super().delete_adapter(adapter_name)
        for name in self.names - {LAYER}:
            self.vpt.base_model._modules[name]._modules.pop(adapter_name, None)
        self._update_labels()

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the adapters after that of the backbone, which stays in eval mode while they train."""
        if not self.is_switching:
            self.is_switching = True
            try:
                self.vpt.train(mode)  # reaches this layer again
                self.training = self.vpt.base_model.training = mode
                for adapter in self.adapters.values():
                    adapter.train(mode)
            finally:
                self.is_switching = False
        return self

    def __reduce__(self) -> NoReturn:
        raise AdapterError(
            "A model with adapters that transformers has loaded into it cannot be copied or pickled. Save it by "
            f"save_pretrained() and load it again, or use {LOADERS}."
        )


class NativeEntry(ForwardOverride):
    """Hands the forward of a backbone over to the VPTModel around it."""

    def __init__(self, vpt: PromptedModel, module: nn.Module) -> None:
        super().__init__(vpt.backbone, module)
        self.vpt = vpt
        self.__wrapped__ = MethodType(type(module).forward, module)  # for inspect.signature, which Trainer asks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.vpt.enabled or current_forward(self.backbone) is not None:
            return self.forward(*args, **kwargs)
        model = self.backbone.model
        if self.module is not model:
            raise RouteError(
                f"The adapter is that of the {type(model).__name__}, got a call of the {type(self.module).__name__} in "
                "it, which would ignore its prompts. Call the model itself, or disable_adapters() before."
            )
        if "adapter_names" in kwargs:
            raise AdapterError(f"Adapters that transformers has loaded cannot be mixed in a batch. Use {LOADERS}.")
        names = inspect.signature(self.__wrapped__).parameters
        return self.vpt(**dict(zip(names, args, strict=False)), **kwargs)
