"""What transformers, its Trainer and accelerate ask of a model, answered for a frozen backbone with adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapter import Adapter, is_quantized
from ..backbones import Backbone
from ..errors import AdapterError, CheckpointError
from ..io import check_state_dict, strip_compile_prefix

if TYPE_CHECKING:
    from typing_extensions import Self

DISPATCH_FIRST = (
    "Load the backbone with from_pretrained(..., device_map=...) before get_vpt_model(), or move the whole model with "
    "vpt.to(device)."
)
BACKBONE_KEY = re.compile(r"(^|\.)base_model\.")

# Methods and properties of PreTrainedModel that are the backbone's.
DELEGATED = (
    "_no_split_modules", "can_record_outputs", "dummy_inputs", "ep_plan", "fsdp_plan", "fsdp_size",
    "get_correct_attn_implementation", "get_decoder", "get_encoder", "get_expanded_tied_weights_keys",
    "get_input_embeddings", "get_output_embeddings", "input_modalities", "is_distributed_loading_by_transformers",
    "pp_plan", "set_attn_implementation", "supports_gradient_checkpointing", "tie_weights", "tp_plan", "tp_size",
    "use_kernels",
)  # fmt: skip

# Methods of PreTrainedModel that do not apply to a model with adapters, by what to use instead.
UNSUPPORTED = {
    "Use `with vpt.disable_adapter():`.": (
        "disable_adapter_layers", "disable_adapters", "enable_adapter_layers", "enable_adapters",
    ),
    "load_adapter() onto an existing name replaces its tensors without recompilation.": ("enable_peft_hotswap",),
    "Adapters are saved by save_pretrained(); each process of FSDP2 must call it.": (
        "barrier_after_gathered_checkpoint_save", "gather_sharded_state_dict_for_save", "save_distributed_checkpoint",
        "should_save_on_this_rank",
    ),
    "Tags in the metadata of the model card (README.md) are kept when it is updated.": ("add_model_tags",),
    "Load adapters by AutoVPTModel.": ("register_for_auto_class",),
    "Prompts cannot be merged into the backbone's weights. Keep the adapter, or call unload() for the bare backbone.": (
        "merge_adapter", "merge_and_unload", "unmerge_adapter",
    ),
    "Prompts and heads of several adapters cannot be combined into one.": ("add_weighted_adapter",),
    "Use get_model_status().": ("get_layer_status",),
    "Use torch.compile(vpt).": ("get_compiled_call",),
    "Change the backbone before get_vpt_model(), or after unload().": (
        "dequantize", "get_experts_implementation", "get_correct_experts_implementation", "get_init_context",
        "get_position_embeddings", "init_parallel_plans", "init_weights", "initialize_weights", "kernelize",
        "mark_tied_weights_as_initialized", "maybe_distribute_model", "post_init", "prepare_distribute_model",
        "resize_position_embeddings", "resize_token_embeddings", "retrieve_modules_from_names", "set_decoder",
        "set_encoder", "set_experts_implementation", "set_input_embeddings", "set_output_embeddings",
        "set_use_kernels",
    ),
    "Attention masks of texts are made by the backbone.": (
        "create_extended_attention_mask_for_decoder", "get_extended_attention_mask", "invert_attention_mask",
        "warn_if_padding_and_no_attention_mask",
    ),
}  # fmt: skip


class PreTrainedAdapterModel(PreTrainedModel):
    """A ``PreTrainedModel`` whose state is its adapters; the frozen backbone is loaded separately.

    The keys of its state dict are ``adapters.{name}.{key}``, with the adapter's own keys, those of its file.
    """

    # Not every task's loss takes Trainer's num_items_in_batch; dividing by the number of steps is right for all.
    accepts_loss_kwargs = False
    supports_tp_plan = supports_pp_plan = supports_context_parallel = False
    adapters: nn.ModuleDict
    backbone: Backbone
    _active: Adapter
    _active_adapter: str

    def __init__(self) -> None:
        nn.Module.__init__(self)  # PreTrainedModel's own would choose an attention and initialise weights
        self.register_load_state_dict_pre_hook(_drop_backbone_keys)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_ignore_missing_backbone)  # type: ignore[no-untyped-call]

    @property
    def base_model(self) -> Any:
        """The bare backbone with its own head."""
        return self._modules["base_model"]

    @property
    def config(self) -> Any:  # type: ignore[override]  # an attribute there
        """The backbone's config with the labels of the active adapter."""
        return self._active.model_config

    @property
    def device(self) -> torch.device:
        """Device of the backbone."""
        return self.backbone.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone."""
        return next(self.backbone.encoder.parameters()).dtype

    @property
    def name_or_path(self) -> str:  # type: ignore[override]  # an attribute there
        """Name of the backbone on the Hub, or its folder."""
        return str(self.config.name_or_path)

    @property
    def main_input_name(self) -> str:  # type: ignore[override]  # an attribute there
        """Name of the images or videos in the forward call of the backbone."""
        return self.backbone.architecture.input_name

    @property
    def loss_function(self) -> Any:
        """The backbone's loss function, or the one that was set: ``loss_function(labels, logits, config)``."""
        return self.__dict__.get("_loss_function") or self.base_model.loss_function

    @loss_function.setter
    def loss_function(self, value: Callable[..., torch.Tensor] | None) -> None:
        self.__dict__["_loss_function"] = value

    def train(self, mode: bool = True) -> Self:
        """Sets the mode of the adapters. The frozen backbone stays in eval mode: no dropout, no stochastic depth."""
        nn.Module.train(self, mode)
        self.base_model.eval()
        for module in self.base_model.modules():
            if is_quantized(module):  # in eval mode some pack their weights for inference, without gradients
                module.training = True
            elif hasattr(module, "neftune_noise_alpha"):  # Trainer's noise on the output of the embeddings
                module.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Moves backbone and adapters.

        Raises:
            AdapterError: the target is the meta device, where the backbone's weights would be lost.
        """
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and device.type == "meta":
            raise AdapterError(
                "A VPTModel cannot be moved to the meta device: its state dict contains only adapters, so the weights "
                "of the backbone would be lost. With FSDP2 by Accelerate, set cpu_ram_efficient_loading to False."
            )
        return super().to(*args, **kwargs)

    @property
    def _old_forward(self) -> Any:
        """The attribute that hooks of accelerate set first."""
        raise AttributeError("A VPTModel has no hooks of accelerate.")

    @_old_forward.setter
    def _old_forward(self, value: Any) -> NoReturn:
        raise AdapterError(f"A VPTModel cannot get hooks of accelerate. {DISPATCH_FIRST}")

    @property
    def hf_device_map(self) -> Any:
        """The backbone's."""
        return self.base_model.hf_device_map

    @hf_device_map.setter
    def hf_device_map(self, value: Any) -> NoReturn:
        raise AdapterError(f"A VPTModel cannot be dispatched by accelerate. {DISPATCH_FIRST}")

    def enable_input_require_grads(self) -> None:
        """Does nothing: prompts require gradients in every layer, and checkpointing must be non-reentrant."""

    def disable_input_require_grads(self) -> None:
        """Does nothing, as :meth:`enable_input_require_grads`."""

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise AdapterError(
            "A VPTModel does not support nn.DataParallel, which Trainer uses where one process sees several GPUs. "
            "Start one process per GPU with torchrun or accelerate launch, or show the process a single one "
            "(CUDA_VISIBLE_DEVICES=0)."
        )

    # -- state dict -------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The tensors of all adapters, ``adapters.{name}.{key}``, without the backbone's."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        tensors = super().state_dict(*args, **kwargs)
        for name in [name for name in tensors if name.startswith(f"{prefix}base_model.")]:
            del tensors[name]
        return tensors

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copies tensors into adapters.

        Args:
            state_dict: with the keys of :meth:`state_dict`. For the keys of one adapter's file use
                :func:`~vpt_peft.set_adapter_state_dict`.
            strict: False: adapters without any key stay as they are, with a warning for the active one.

        Raises:
            CheckpointError: tensors do not match, or differ from the backbone's own. Nothing has changed.
        """
        given = strip_compile_prefix(state_dict)
        _drop_backbone_keys(self, given, "")
        of_one_adapter = [name for name in given if name.partition(".")[0] in self._active._modules]
        if of_one_adapter or (given and not any(name.startswith("adapters.") for name in given)):
            key = (of_one_adapter or list(given))[0]
            raise CheckpointError(
                f"Expected keys such as adapters.{self._active_adapter}.prompts.0, got {key}. For the folder of an "
                "adapter use load_adapter(folder, name); for the state dict of one, set_adapter_state_dict(model, "
                "state_dict, name)."
            )
        own = dict(self.state_dict())
        common = own.keys() & given.keys()
        if not strict and common:  # with nothing in common, the error lists everything
            check_state_dict(*({name: tensors[name] for name in common} for tensors in (own, given)))
        else:
            check_state_dict(own, given)
        loaded = sorted({name.split(".")[1] for name in common})
        if self._active_adapter not in loaded:
            warnings.warn(
                f"The state dict contains {', '.join(loaded)}, but not the active adapter {self._active_adapter}, "
                f"which is unchanged. To resume from a checkpoint, call set_adapter({loaded[0]!r}) before training.",
                stacklevel=2,
            )
        return super().load_state_dict(given, strict, assign)

    # -- gradient checkpointing -------------------------------------------------------------------------------------

    def activation_checkpointing_enable(  # type: ignore[override]  # versions differ
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recomputes layers in the backward pass, as the backbone's own method."""
        enable = getattr(self.base_model, "activation_checkpointing_enable", None)
        if enable is None:  # transformers before this name
            self.base_model.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        else:
            enable(activation_checkpointing_kwargs=activation_checkpointing_kwargs, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Reverts :meth:`activation_checkpointing_enable`."""
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


def _drop_backbone_keys(module: PreTrainedAdapterModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Removes the backbone's own tensors from a state dict, to which torch's tools add them.

    Raises:
        CheckpointError: it contains other values for them.
    """
    prefix = f"{prefix}base_model."
    keys = [name for name in state_dict if name.startswith(prefix)]
    if not keys:
        return
    base = module.base_model
    own = dict(base.named_parameters(remove_duplicate=False)) | dict(base.named_buffers(remove_duplicate=False))
    different = [name for name in keys if not _is_same(state_dict[name], own.get(name.removeprefix(prefix)))]
    if different:
        raise CheckpointError(
            f"Expected tensors of adapters, got {len(different)} of the backbone, such as {different[0]}. The backbone "
            "never changes: load it by its own from_pretrained, and only adapters here."
        )
    for name in keys:
        del state_dict[name]


def _is_same(given: Any, own: torch.Tensor | None) -> bool:
    if given is own or own is None or not isinstance(given, torch.Tensor):
        return given is own
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (given, own)]
    return kinds[0] == kinds[1] and torch.equal(given, own)


def _ignore_missing_backbone(module: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if not BACKBONE_KEY.search(name)]


def _unsupported(name: str, advice: str) -> Callable[..., NoReturn]:
    def method(*args: Any, **kwargs: Any) -> NoReturn:
        raise AdapterError(f"{name}() does not apply to a VPTModel. {advice}")

    method.__doc__ = f"Raises AdapterError. {advice}"
    return method


for _name in DELEGATED:
    setattr(PreTrainedAdapterModel, _name, property(attrgetter(f"base_model.{_name}"), doc="The backbone's."))
for _advice, _names in UNSUPPORTED.items():
    for _name in _names:
        setattr(PreTrainedAdapterModel, _name, _unsupported(_name, _advice))
