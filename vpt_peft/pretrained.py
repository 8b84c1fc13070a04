"""What transformers, its Trainer and accelerate ask of a model, answered for a frozen backbone with adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from . import state
from .adapter import Adapter
from .backbones import Backbone
from .dense import is_quantized
from .errors import AdapterError, CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self

BACKBONE = re.compile(r"(^|\.)base_model\.")


class LoadResult(NamedTuple):
    """What ``load_state_dict`` returns, as everywhere in torch."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class AdaptedModel(PreTrainedModel):
    """A ``PreTrainedModel`` whose state is its adapters: the backbone is frozen, and comes from elsewhere.

    So checkpoints hold adapters alone. The module's own ``state_dict`` names tensors by their place in the module, as
    torch's tools for several processes need it; ``load_state_dict`` takes those names, or the active adapter's tensors
    under the names of the adapter format.
    """

    main_input_name = "pixel_values"
    # Trainer's num_items_in_batch reaches some tasks' losses and not others: it is to divide by itself, which is right
    # for all of them.
    accepts_loss_kwargs = False
    adapters: nn.ModuleDict
    _backbone: Backbone
    _answering: list[Adapter]

    def __init__(self) -> None:
        nn.Module.__init__(self)  # a config of its own, weights to draw, an attention to choose: there are none
        self.register_load_state_dict_pre_hook(_refuse_backbone)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_no_backbone)  # type: ignore[no-untyped-call]

    @property
    def base_model(self) -> Any:
        """The bare backbone, with its own head."""
        return self._modules["base_model"]

    @property
    def _active(self) -> Adapter:
        return self._answering[0]

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
        return next(self._backbone.trunk.parameters()).dtype

    @property
    def name_or_path(self) -> str:
        """The backbone's name on the Hub, or its folder."""
        return str(self.config.name_or_path)

    @property
    def _no_split_modules(self) -> Any:
        """Classes of layers, for sharding."""
        return self.base_model._no_split_modules

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the backbone does."""
        return bool(self.base_model.supports_gradient_checkpointing)

    @property
    def hf_device_map(self) -> Any:
        """Where the backbone's parts are, if it was loaded onto several devices."""
        return self.base_model.hf_device_map

    @property
    def loss_function(self) -> Any:
        """The backbone's loss, or the one that was set in its place: ``loss_function(labels, logits, config)``."""
        return self.__dict__.get("_own_loss_function") or self.base_model.loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.__dict__["_own_loss_function"] = value

    def train(self, mode: bool = True) -> Self:
        """Sets the adapters' mode. The frozen backbone stays in eval mode: no dropout, no stochastic depth."""
        nn.Module.train(self, mode)
        self.base_model.eval()
        for module in self.base_model.modules():
            if is_quantized(module):  # in eval mode some pack their weights for inference, and give no gradients then
                module.training = True
            elif hasattr(module, "neftune_noise_alpha"):  # Trainer was asked for noise on what it gives
                module.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves backbone and adapters, as everywhere in torch.

        Raises:
            AdapterError: the move is to the meta device, from which the backbone would not come back.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta":
            raise AdapterError(
                "A VPTModel cannot go to the meta device: its state dict holds adapters alone, so that the backbone's "
                "weights would be lost. With FSDP2 by Accelerate, set cpu_ram_efficient_loading to False."
            )
        return super().to(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        raise AdapterError(
            "A VPTModel cannot be copied to several GPUs by nn.DataParallel, which Trainer uses where one process sees "
            "several. Start one process for each with torchrun or accelerate launch, or show the process a single one "
            "(CUDA_VISIBLE_DEVICES=0)."
        )

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Sets the backbone's attention, as its own method does; prompts go on reaching it."""
        self.base_model.set_attn_implementation(*args, **kwargs)

    def get_input_embeddings(self) -> Any:
        """The backbone's."""
        return self.base_model.get_input_embeddings()

    # -- state dict -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors of all adapters by their place in the module, ``adapters.{name}.…``; not the backbone's."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        tensors = super().state_dict(*args, **kwargs)
        for name in [name for name in tensors if name.startswith(f"{prefix}base_model.")]:
            del tensors[name]
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies tensors into adapters.

        Args:
            state_dict: as :meth:`state_dict` gives it; or the active adapter's, as ``get_adapter_state_dict`` gives
                it and ``adapter_model.safetensors`` holds it, which is taken in strictly.
            strict: False: adapters that it does not speak of stay as they are, with a warning for the active one.

        Raises:
            CheckpointError: tensors of the backbone are among them, other than its own as they are, or they do not
                fit. Nothing has changed.
        """
        given = state.unwrapped(state_dict)
        _refuse_backbone(self, given, "")
        if any(name.startswith("adapters.") for name in given):
            return self._load_adapters(given, strict, assign)
        state.load_state_dict(self._active, given)
        return LoadResult([], [])

    def _load_adapters(self, given: dict[str, Any], strict: bool, assign: bool) -> Any:
        own = dict(self.state_dict())
        both = own.keys() & given.keys()
        if not strict and both:  # with nothing in common, all that is wrong is named below
            state.check(*({name: some[name] for name in both} for some in (own, given)))
        else:
            state.check(own, given)
        spoken_of = {name.split(".")[1] for name in both}
        if self._active_adapter not in spoken_of:
            warnings.warn(
                f"The state dict holds {', '.join(sorted(spoken_of))}, while {self._active_adapter} is active, which "
                f"stays as it was. To go on from a checkpoint, call set_adapter({min(spoken_of)!r}) before training.",
                stacklevel=3,
            )
        return super().load_state_dict(given, strict, assign)

    # -- activation checkpointing -----------------------------------------------------------------------------------

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


def _refuse_backbone(module: AdaptedModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes the backbone's own tensors out of a state dict, to which torch's tools add them, and refuses others."""
    base, prefix = module.base_model, f"{prefix}base_model."
    theirs = [name for name in state_dict if name.startswith(prefix)]
    if not theirs:
        return
    own = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    others = [name for name in theirs if not _is_same(state_dict[name], own.get(name.removeprefix(prefix)))]
    if others:
        raise CheckpointError(
            f"Expected tensors of adapters, got {len(others)} of the backbone, such as {others[0]}. The backbone "
            "never changes: load it by its own from_pretrained, and only adapters here."
        )
    for name in theirs:
        del state_dict[name]


def _is_same(given: Any, own: torch.Tensor | None) -> bool:
    if given is own or own is None or not isinstance(given, torch.Tensor):
        return given is own
    one, other = ((tensor.shape, tensor.dtype, tensor.device) for tensor in (given, own))
    return one == other and torch.equal(given, own)


def _expect_no_backbone(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not BACKBONE.search(name)]
