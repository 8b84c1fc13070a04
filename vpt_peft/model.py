"""VPTModel: one frozen backbone, and the adapters that tell it what to see."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, hub, state
from .adapter import Adapter
from .backbones import Backbone
from .batch import check_known, check_name
from .config import PromptConfig
from .errors import AdapterError
from .origin import free_backbone, warn_of_change, with_origin
from .saving import SavableModel
from .status import ModelStatus, describe


class VPTModel(SavableModel):
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
        backbone = free_backbone(model)
        self._set_up(backbone, adapter_name, Adapter(with_origin(config, backbone), backbone), model.training)

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
    def active_adapters(self) -> list[str]:
        """The same in a list, as in PEFT."""
        return [self._active_adapter]

    @property
    def peft_config(self) -> dict[str, PromptConfig]:
        """The config of each adapter."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

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
        self._put(adapter_name, Adapter(with_origin(config, self._backbone), self._backbone, labels))

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **source: Any,
    ) -> None:
        """Adds a saved adapter. Onto an existing one of equal config, it loads the tensors only.

        Args:
            model_id: the adapter's folder or repository on the Hub.
            source: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, for the Hub.
            is_trainable: False: the adapter stays frozen, also when it becomes active.
            dtype: precision to keep its tensors in; None: float32. ``torch_dtype`` is its older name.

        Raises:
            CheckpointError: the folder is incomplete or damaged, made for another backbone, or an adapter of that
                name and another config exists. Nothing has changed.
        """
        self._check_attached()
        dtype = state.storage_dtype(dtype, torch_dtype)
        if adapter_name in self.adapters:
            with hub.pulled(model_id, **source) as folder:
                checkpoint.reload(self._adapters[adapter_name], folder, self._backbone)
        else:
            check_name(adapter_name)
            with hub.pulled(model_id, **source) as folder:
                adapter = checkpoint.load(folder, self._backbone, is_trainable, dtype)
            warn_of_change(adapter.config, self.base_model)
            self._put(adapter_name, adapter)

    def set_adapter(self, adapter_name: str) -> None:
        """Makes an adapter the active one. It alone trains, unless it was loaded with ``is_trainable=False``."""
        self._check_attached()
        check_known(self.adapters, [adapter_name])  # type: ignore[arg-type]
        for before in self._answering:
            before.requires_grad_(False)
        adapter: Any = self.adapters[adapter_name]
        adapter.requires_grad_(not adapter.config.inference_mode)
        self._active_adapter = adapter_name
        # Behind a list, so that a compiled graph sees another adapter of the same shape, not another name.
        self._answering = [adapter]

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

    def get_model_status(self) -> ModelStatus:
        """What is attached, and what of it is active and trains, as PEFT's ``get_model_status`` tells it."""
        trainable, total = self.get_nb_trainable_parameters()
        model_type = type(self.base_model).__name__
        return describe(self._adapters, self._active_adapter, self._num_disabled == 0, model_type, trainable, total)

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

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **source: Any,
    ) -> VPTModel:
        """Attaches a saved adapter, with its own head and labels, to a backbone. It comes in eval mode.

        Args:
            model: the backbone that the adapter was trained on, freshly loaded.
            model_id: the adapter's folder or repository on the Hub; or one with an only adapter in a subfolder.
            is_trainable: False: the adapter is frozen, for inference.
            dtype: precision to keep its tensors in; None: float32. ``torch_dtype`` is its older name.
            source: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only``, for the Hub.

        Raises:
            CheckpointError: the folder is incomplete or damaged, or made for another backbone.
            UnsupportedModelError, AdapterError, ConfigError: and the model is as it was.
        """
        check_name(adapter_name)
        dtype = state.storage_dtype(dtype, torch_dtype)
        backbone = free_backbone(model)
        with hub.pulled(model_id, **source) as folder:
            adapter = checkpoint.load(folder, backbone, is_trainable, dtype)
        warn_of_change(adapter.config, model)
        vpt = cls.__new__(cls)
        SavableModel.__init__(vpt)
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
    return state.state_dict(model._adapters[adapter_name])


def set_adapter_state_dict(model: VPTModel, state_dict: dict[str, Tensor], adapter_name: str = "default") -> None:
    """Copies tensors into an adapter, all or nothing.

    Raises:
        CheckpointError: names every missing, unexpected and mis-shaped tensor; nothing has changed.
    """
    check_known(model.adapters, [adapter_name])  # type: ignore[arg-type]
    state.load_state_dict(model._adapters[adapter_name], state_dict)
