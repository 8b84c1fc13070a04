"""VPTModel: one frozen backbone, and the adapters that tell it what to see."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import card, checkpoint
from .adapter import Adapter
from .backbones import Backbone, find_backbone
from .batch import BASE, check_known
from .config import PromptConfig
from .errors import AdapterError
from .prompted import PromptedModel
from .routes import has_doors
from .version import __version__


class VPTModel(PromptedModel):
    """A frozen vision transformer with prompts, made by :func:`get_vpt_model` or :meth:`from_pretrained`.

    Called like the model that it was made from, it answers with the active adapter's prompts and head. The model
    itself, called directly, stays the bare backbone.

    Args:
        model: a supported vision transformer of ``transformers``; it is frozen until :meth:`unload`.
        config: the first adapter's config.
        adapter_name: the first adapter's name.

    Raises:
        UnsupportedModelError, AdapterError, ConfigError, RouteError: and the model is as it was.
    """

    def __init__(self, model: nn.Module, config: PromptConfig, adapter_name: str = "default") -> None:
        super().__init__()
        check_name(adapter_name)
        backbone = _free_backbone(model)
        self._set_up(backbone, adapter_name, Adapter(_with_origin(config, backbone), backbone), model.training)

    def _set_up(self, backbone: Backbone, name: str, adapter: Adapter, training: bool) -> None:
        self._attach(backbone, training)
        self._put(name, adapter)
        self.set_adapter(name)
        self.train(training)

    def _put(self, name: str, adapter: Adapter) -> None:
        assert self._attachment is not None
        self._attachment.admit([*adapter.modules_by_path, *adapter.biases_by_path])
        adapter.requires_grad_(False)
        self.adapters._modules[name] = adapter.train(self.training)  # unlike item assignment, takes any word as name

    # -- adapters ---------------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that answers."""
        return self._active_adapter

    @property
    def active_config(self) -> PromptConfig:
        """The active adapter's config."""
        return self._active.config

    def add_adapter(self, adapter_name: str, config: PromptConfig, **labels: Any) -> None:
        """Adds an adapter with fresh prompts. The active one stays active.

        Args:
            labels: ``num_labels``, ``id2label``, ``label2id`` or ``problem_type`` where they differ from the model's;
                with another number of labels, the head starts anew.
        """
        self._check_attached()
        self._check_new(adapter_name)
        self._put(adapter_name, Adapter(_with_origin(config, self._backbone), self._backbone, labels))

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> None:
        """Adds a saved adapter. Onto an existing one of equal config, it loads the tensors only.

        Args:
            model_id: the adapter's folder.
            is_trainable: False: the adapter stays frozen, also when it becomes active.
            torch_dtype: precision to keep its tensors in; None: float32.

        Raises:
            CheckpointError: the folder is incomplete or damaged, made for another backbone, or an adapter of that
                name and another config exists. Nothing has changed.
        """
        self._check_attached()
        if adapter_name in self.adapters:
            checkpoint.reload(self._adapters[adapter_name], model_id, self._backbone)
        else:
            check_name(adapter_name)
            self._put(adapter_name, checkpoint.load(model_id, self._backbone, is_trainable, torch_dtype))

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one. It alone trains, unless it was loaded with ``is_trainable=False``."""
        self._check_attached()
        check_known(self.adapters, [adapter_name])  # type: ignore[arg-type]
        for name, adapter in self._adapters.items():
            adapter.requires_grad_(name == adapter_name and not adapter.config.inference_mode)
        self._active_adapter = adapter_name
        # Behind a list, so that a compiled graph sees another adapter of the same shape, not another name.
        self._answering = [self._adapters[adapter_name]]

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter. If it was the active one, the first of the others becomes active, with a warning."""
        self._check_attached()
        check_known(self.adapters, [adapter_name])  # type: ignore[arg-type]
        others = [name for name in self.adapters if name != adapter_name]
        if not others:
            raise AdapterError(f"'{adapter_name}' is the only adapter. Use unload() to get the bare backbone back.")
        del self.adapters[adapter_name]
        if self._caches is not None:
            self._caches.pop(adapter_name, None)
        if adapter_name == self._active_adapter:
            self.set_adapter(others[0])
            warnings.warn(
                f"The active adapter '{adapter_name}' was deleted; '{others[0]}' is active now.", stacklevel=2
            )

    def unload(self) -> Any:
        """Detaches everything and returns the backbone as it was passed in."""
        self._check_attached()
        assert self._attachment is not None
        self._attachment.detach()
        self._attachment = None
        return self.base_model

    def get_base_model(self) -> Any:
        """The bare backbone, with its own head."""
        return self.base_model

    def get_model_status(self) -> dict[str, Any]:
        """What is attached and what of it is active and trains, in the terms of PEFT's ``get_model_status``."""
        trainable, total = self.get_nb_trainable_parameters()
        return {
            "base_model_type": type(self.base_model).__name__,
            "peft_types": {name: adapter.config.peft_type for name, adapter in self._adapters.items()},
            "trainable_params": trainable,
            "total_params": total,
            "num_adapter_layers": {
                name: sum(step is not None for step in adapter.steps) for name, adapter in self._adapters.items()
            },
            "enabled": self._num_disabled == 0,
            "active_adapters": [self._active_adapter],
            "requires_grad": {
                name: any(parameter.requires_grad for parameter in adapter.parameters())
                for name, adapter in self._adapters.items()
            },
            "available_adapters": list(self.adapters),
            "devices": {
                name: sorted({parameter.device.type for parameter in adapter.parameters()})
                for name, adapter in self._adapters.items()
            },
        }

    def _check_new(self, name: str) -> None:
        check_name(name)
        if name in self.adapters:
            raise AdapterError(f"An adapter '{name}' exists already. Delete it first, or choose another name.")

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of parameters that train, and of all."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints what :meth:`get_nb_trainable_parameters` counts, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # -- saving and loading -----------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Saves adapters: "default" into ``save_directory`` itself, any other into a subfolder of its name."""
        self._check_attached()
        names = list(self.adapters) if selected_adapters is None else list(selected_adapters)
        check_known(self.adapters, names)  # type: ignore[arg-type]
        for name in names:
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            checkpoint.save(self._adapters[name], folder, __version__)
            card.write(self._adapters[name], folder)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> VPTModel:
        """Attaches a saved adapter, with its own head and labels, to a backbone. It comes in eval mode.

        Args:
            model: the backbone that the adapter was trained on, freshly loaded.
            model_id: the adapter's folder, or a folder with an only adapter in a subfolder.
            is_trainable: False: the adapter is frozen, for inference.
            torch_dtype: precision to keep its tensors in; None: float32.

        Raises:
            CheckpointError: the folder is incomplete or damaged, or made for another backbone.
            UnsupportedModelError, AdapterError, ConfigError: and the model is as it was.
        """
        check_name(adapter_name)
        backbone = _free_backbone(model)
        adapter = checkpoint.load(model_id, backbone, is_trainable, torch_dtype)
        vpt = cls.__new__(cls)
        nn.Module.__init__(vpt)
        vpt._set_up(backbone, adapter_name, adapter, training=False)
        return vpt


def get_vpt_model(model: nn.Module, config: PromptConfig, adapter_name: str = "default") -> VPTModel:
    """Freezes a vision transformer and gives it prompts to train, together with a head of its own.

    Args:
        model: a supported model of ``transformers``, such as ``ViTForImageClassification``.
        config: what to train; ``PromptConfig()`` is VPT-Deep with 10 prompts a layer.
        adapter_name: the adapter's name.

    Raises:
        VPTError: the model or the config is not supported; the model is as it was.
    """
    return VPTModel(model, config, adapter_name)


def get_adapter_state_dict(model: VPTModel, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors, detached but not copied, under the names of the adapter format."""
    check_known(model.adapters, [adapter_name])  # type: ignore[arg-type]
    return checkpoint.state_dict(model._adapters[adapter_name])


def set_adapter_state_dict(model: VPTModel, state_dict: dict[str, Tensor], adapter_name: str = "default") -> None:
    """Copies tensors into an adapter, all or nothing.

    Raises:
        CheckpointError: names every missing, unexpected and mis-shaped tensor; nothing has changed.
    """
    check_known(model.adapters, [adapter_name])  # type: ignore[arg-type]
    checkpoint.load_state_dict(model._adapters[adapter_name], state_dict)


def check_name(name: str) -> None:
    if not isinstance(name, str) or not name or name == BASE or any(sign in name for sign in "./\\"):
        raise AdapterError(f"An adapter's name must be a word without dots and slashes, not '{BASE}', got {name!r}.")


def _free_backbone(model: nn.Module) -> Backbone:
    if isinstance(model, VPTModel) or (isinstance(model, nn.Module) and has_doors(model)):
        raise AdapterError(
            f"Expected a bare backbone, got {type(model).__name__}, which already carries VPT. Call unload() first."
        )
    return find_backbone(model)


def _with_origin(config: PromptConfig, backbone: Backbone) -> PromptConfig:
    """The config with the backbone's name and revision, where the user gave none."""
    if not isinstance(config, PromptConfig):
        raise AdapterError(f"config must be a PromptConfig, got {type(config).__name__}.")
    if config.base_model_name_or_path is not None:
        return config
    name = getattr(backbone.model.config, "_name_or_path", None) or None
    return config.replace(base_model_name_or_path=name)
