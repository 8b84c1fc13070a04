"""VPTTuner: what PEFT makes of a model and a VPTConfig."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from .. import io
from ..errors import AdapterError
from .config import VPTConfig
from .layer import VPTConfigs, VPTLayer
from .model import PromptedModel
from .native import add_native_adapter


class VPTTuner(BaseTuner):
    """The ``base_model`` of a PeftModel. Its ``model`` is a :class:`~vpt_peft.VPTModel`, which answers for what a
    PeftModel lacks.

    Args:
        model: the backbone.
        peft_config: ``{adapter_name: config}``; or a config, from ``inject_adapter_in_model``, by which transformers
            adds adapters to the backbone itself.
        adapter_name: name of the adapter.
    """

    prefix = "vpt_"
    tuner_layer_cls = VPTLayer
    layer: VPTLayer

    def __init__(
        self, model: nn.Module, peft_config: VPTConfig | dict[str, VPTConfig], adapter_name: str, **_: Any
    ) -> None:
        nn.Module.__init__(self)  # that of BaseTuner would look for layers to replace
        if isinstance(peft_config, VPTConfig):
            add_native_adapter(model, copy.copy(peft_config), adapter_name)
            self.model = model
        else:
            config = copy.copy(peft_config[adapter_name])
            self.model = PromptedModel(model, config, adapter_name)
            self.layer = VPTLayer(self.model)
            self.peft_config = VPTConfigs({adapter_name: config})  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Makes the adapter whose config PeftModel has added."""
        config: Any = copy.copy(self.peft_config[adapter_name])
        self.layer.vpt.add(adapter_name, config)
        self.peft_config[adapter_name] = config

    @property
    def active_adapter(self) -> str:  # type: ignore[override]  # an attribute there
        """Name of the active adapter."""
        return self.layer.active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The name of the active adapter."""
        return [self.active_adapter]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes an adapter the active one, which trains unless ``inference_mode``."""
        self.layer.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable, or freezes them."""
        self.layer.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. AdapterError: it is the only one."""
        self.layer.vpt.delete_adapter(adapter_name)
        del self.peft_config[adapter_name]

    def disable_adapter_layers(self) -> None:
        """Lets the model answer as the bare backbone."""
        self.layer.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        """Reverts :meth:`disable_adapter_layers`."""
        self.layer.enable_adapters(True)

    def unload(self) -> Any:
        """Removes all adapters and returns the original backbone."""
        return self.layer.vpt.unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises AdapterError."""
        raise AdapterError(
            "Prompts cannot be merged into the backbone's weights. Keep the adapter, or call unload() for the bare "
            "backbone."
        )

    merge_adapter = unmerge_adapter = merge_and_unload

    @contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        if adapter_names is None:
            yield
        else:
            with self.layer.vpt.mixing(adapter_names):
                yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            self.layer.adapters[adapter_name].float()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("Prompts replace no layers.")

    # -- files ------------------------------------------------------------------------------------------------------
    # PEFT calls these for any model with our layer, a PeftModel or a backbone with native adapters.

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override]
        cls,
        model: nn.Module,
        config: VPTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The tensors to save by their names in the file, and the config that belongs to them."""
        layer = _find_layer(model)
        keys = _find_keys(model, layer, adapter_name)
        with layer.as_backbone():
            # without keys in which the name of another adapter occurs, which may be any word
            given = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
            return layer.vpt.tensors_to_save(adapter_name, config, given)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: VPTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of a file by their keys in the model's state dict.

        Raises:
            CheckpointError: they are not those of the adapter. PEFT itself would load what fits.
        """
        layer = _find_layer(model)
        if all(name.startswith(io.PEFT_PREFIX) for name in state_dict):
            state_dict = {name.removeprefix(io.PEFT_PREFIX): tensor for name, tensor in state_dict.items()}
        io.check_state_dict(layer.adapters[adapter_name].layout, state_dict)  # type: ignore[arg-type]
        keys = _find_keys(model, layer, adapter_name)
        return {keys[name]: tensor for name, tensor in state_dict.items()}


def _find_layer(model: nn.Module) -> VPTLayer:
    return next(module for module in model.modules() if isinstance(module, VPTLayer))


def _find_keys(model: nn.Module, layer: VPTLayer, adapter_name: str) -> dict[str, str]:
    """``{name in the file: key in the model's state dict}`` of an adapter's tensors."""
    keys = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
    own = layer.adapters[adapter_name].state_dict(keep_vars=True)
    return {name: keys[id(tensor)] for name, tensor in own.items()}
