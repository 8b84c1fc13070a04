"""VPTModel: one frozen backbone, and the adapters that tell it what to see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import card, checkpoint
from .adapter import Adapter
from .backbones import Backbone, find_backbone
from .config import PromptConfig
from .errors import AdapterError, RouteError
from .passes import Pass, current
from .routes import Attachment, has_doors
from .version import __version__


class VPTModel(nn.Module):
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
        backbone = _free_backbone(model)
        config = _with_origin(config, backbone)
        adapter = Adapter(config, backbone)
        self._set_up(backbone, adapter, adapter_name)

    def _set_up(self, backbone: Backbone, adapter: Adapter, adapter_name: str, training: bool | None = None) -> None:
        _check_name(adapter_name)
        training = backbone.model.training if training is None else training
        self._backbone = backbone
        self._attachment: Attachment | None = Attachment(backbone)
        self._active_adapter = adapter_name
        self.base_model = backbone.model
        self.adapters = nn.ModuleDict({adapter_name: adapter})
        self._attachment.admit([*adapter.modules_by_path, *adapter.biases_by_path])
        self.train(training)

    # -- the model at work ------------------------------------------------------------------------------------------

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the backbone with the active adapter. Arguments and output are the backbone's own.

        Args:
            pixel_values: ``(num_images, num_channels, height, width)``, as the backbone's image processor makes them.
            labels: ``(num_images,)`` class numbers, or what the task's loss takes; the output then holds the loss.

        Raises:
            RouteError: prompts did not reach a layer that they should have reached.
        """
        self._check_attached()
        optional = {
            "bool_masked_pos": bool_masked_pos, "interpolate_pos_encoding": interpolate_pos_encoding,
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
        }  # fmt: skip
        kwargs |= {name: value for name, value in optional.items() if value is not None}
        if pixel_values is None:
            raise AdapterError("pixel_values must be given, got None. Use the backbone's image processor to make them.")

        adapter = self._active
        running = Pass(pixel_values.shape[0], [adapter.group()], self.training)
        with current.entered(running):
            output = self.base_model(pixel_values, return_dict=True, **kwargs)
        expected = sum(running.meets(layer) for layer in range(len(self._backbone.layers)))
        if running.num_reached != expected:
            raise RouteError(
                f"Prompts must reach {expected} layers, but reached {running.num_reached}: the backbone skipped some, "
                "or its layers were replaced after the adapter was attached. Unload and attach it again."
            )
        if labels is not None:
            output = self._with_loss(output, labels, adapter, kwargs)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _with_loss(self, output: Any, labels: Tensor, adapter: Adapter, kwargs: dict[str, Any]) -> Any:
        """The backbone's own loss function, told of the adapter's labels instead of the backbone's."""
        if "logits" not in output:
            raise AdapterError(
                f"labels need a model with a classifier, got {type(self.base_model).__name__}. Leave labels out."
            )
        counted = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
        loss = self.base_model.loss_function(labels, output.logits, adapter.model_config, **counted)
        return type(output)(**{**output, "loss": loss})

    @property
    def _active(self) -> Adapter:
        adapter = self.adapters[self._active_adapter]
        assert isinstance(adapter, Adapter)
        return adapter

    @property
    def active_adapter(self) -> str:
        """Name of the adapter that answers."""
        return self._active_adapter

    @property
    def active_config(self) -> PromptConfig:
        """The active adapter's config."""
        return self._active.config

    @property
    def config(self) -> Any:
        """The backbone's config with the active adapter's labels."""
        return self._active.model_config

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        return self._backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's precision."""
        return next(self.base_model.parameters()).dtype

    @property
    def routes(self) -> dict[int, str]:
        """``{layer: "tokens" or "key_value"}``: how the active adapter's prompts reach the layers that they do."""
        return {layer: step.route for layer, step in enumerate(self._active.steps) if step is not None}

    # -- training ---------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> VPTModel:
        """Sets the adapters' mode. The frozen backbone stays in eval mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.base_model.eval()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Trades time for memory while training, layer by layer. Arguments are those of the backbone's own method."""
        enable = getattr(self.base_model, "activation_checkpointing_enable", None)
        if enable is None:  # transformers before the method got its new name
            self.base_model.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        else:
            enable(activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Ends what :meth:`activation_checkpointing_enable` began."""
        disable = getattr(self.base_model, "activation_checkpointing_disable", None)
        (disable or self.base_model.gradient_checkpointing_disable)()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The older name of :meth:`activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of parameters that train, and of all."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Prints what :meth:`get_nb_trainable_parameters` counts, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    # -- saving and loading -----------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Saves the adapters: "default" into ``save_directory`` itself, any other into a subfolder of its name."""
        self._check_attached()
        for name, adapter in self.adapters.items():
            assert isinstance(adapter, Adapter)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            checkpoint.save(adapter, folder, __version__)
            card.write(adapter, folder)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> VPTModel:
        """Attaches a saved adapter, with its own head and labels, to a backbone. It comes in eval mode.

        Args:
            model: the backbone that the adapter was trained on, freshly loaded.
            model_id: the adapter's folder.
            is_trainable: False: the adapter is frozen, for inference.

        Raises:
            CheckpointError: the folder is incomplete or damaged, or made for another backbone.
            UnsupportedModelError, AdapterError, ConfigError: and the model is as it was.
        """
        _check_name(adapter_name)
        backbone = _free_backbone(model)
        saved = checkpoint.load(model_id)
        checkpoint.check_fit(saved, backbone)
        adapter = Adapter(saved.config.replace(inference_mode=not is_trainable), backbone, saved.labels)
        checkpoint.load_state_dict(adapter, saved.tensors)
        adapter.requires_grad_(is_trainable)
        vpt = cls.__new__(cls)
        nn.Module.__init__(vpt)
        vpt._set_up(backbone, adapter, adapter_name, training=False)
        return vpt

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

    def _check_attached(self) -> None:
        if self._attachment is None:
            raise AdapterError("This VPTModel was unloaded and has no backbone any more. Make a new one.")


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
    return checkpoint.state_dict(_adapter(model, adapter_name))


def set_adapter_state_dict(model: VPTModel, state_dict: dict[str, Tensor], adapter_name: str = "default") -> None:
    """Copies tensors into an adapter, all or nothing.

    Raises:
        CheckpointError: names every missing, unexpected and mis-shaped tensor; nothing has changed.
    """
    checkpoint.load_state_dict(_adapter(model, adapter_name), state_dict)


def _adapter(model: VPTModel, name: str) -> Adapter:
    if name not in model.adapters:
        raise AdapterError(f"The model has the adapters {list(model.adapters)}, got '{name}'.")
    adapter = model.adapters[name]
    assert isinstance(adapter, Adapter)
    return adapter


def _check_name(name: str) -> None:
    taken = isinstance(name, str) and hasattr(nn.ModuleDict, name)
    if not isinstance(name, str) or not name or taken or any(sign in name for sign in "./\\"):
        raise AdapterError(
            f"An adapter's name must be a word without dots and slashes, and none of torch's own, got {name!r}."
        )


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
