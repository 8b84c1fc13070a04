"""Overrides of ``forward``: adapters' own modules and biases in place of the model's."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..adapter import is_quantized
from ..backbones import Backbone
from ..errors import RouteError
from .context import AdapterBatch, ForwardContext, activate, activate_alone, current_forward
from .locations import enter_image, project_with_channels
from .masks import adds_boolean_mask
from .prompt_batch import select_by_task


class AttributeProxy:
    """An object with some attributes replaced; all others are read from the original. Copies are of the original."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._original, name)

    def __reduce__(self) -> Any:
        return identity, (self._original,)


class ForwardOverride(ABC):
    """Takes the place of ``module.forward``. Outside of a forward pass of its backbone, it calls the original.

    Copies and pickles of the module have the original again: only a VPTModel knows how to remove an override.

    Attributes:
        forward: the original.
        earlier: another library's override that was there before, such as accelerate's; None if there was none.
    """

    def __init__(self, backbone: Backbone, module: nn.Module) -> None:
        self.backbone = backbone
        self.module: Any = module

    def inject(self) -> None:
        """Overrides ``module.forward``."""
        self.earlier = self.module.__dict__.get("forward")
        self.forward: Callable[..., Any] = self.module.forward
        self.module.forward = self

    def remove(self) -> None:
        """Restores ``module.forward``. Another library's override that was put on later stays, with a warning."""
        if self.module.__dict__.get("forward") is not self:
            warnings.warn(
                f"The forward of a {type(self.module).__name__} was overridden after the adapter was attached, by "
                "accelerate for example. That override stays; remove it before unload() to get the original back.",
                stacklevel=4,
            )
            return
        del self.module.forward
        if self.earlier is not None:
            self.module.forward = self.earlier

    def __reduce__(self) -> Any:
        return (getattr, (self.module, "forward")) if self.earlier is None else (identity, (self.earlier,))

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class EntryOverride(ForwardOverride):
    """Lets a forward pass enter the model and its encoder once. Further calls in the same pass, made by hooks of the
    user, are direct calls of the bare backbone."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current_forward(self.backbone)
        if context is None or self.module in context.entered:
            with activate(None):  # the context may be that of another backbone's pass
                return self.forward(*args, **kwargs)
        context.entered = (*context.entered, self.module)
        if self.module is self.backbone.model:
            architecture = self.backbone.architecture
            kwargs[architecture.input_name] = enter_image(context, kwargs[architecture.input_name])
            context.token_mask = kwargs.get(architecture.token_mask or "")
        if self.module is self.backbone.encoder and adds_boolean_mask(self.backbone, kwargs.get("attention_mask")):
            kwargs["attention_mask"] = self.backbone.layers[0].part("norm").weight.new_zeros(1, 1, 1, 1)
        output = self.forward(*args, **kwargs)
        if self.module is self.backbone.encoder and self.backbone.head.tokens is None and context.pools_tokens:
            context.last_hidden_state = output.last_hidden_state
            context.pooler_output = output.get("pooler_output")
        return output


class ModuleOverride(ForwardOverride):
    """Uses an adapter's copy of a module, or of its bias.

    In a mixed batch, each image gets the bias of its own adapter; adapters with copies of modules are never mixed.
    """

    def __init__(self, backbone: Backbone, path: str) -> None:
        super().__init__(backbone, backbone.model.get_submodule(path))
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current_forward(self.backbone)
        if context is not None and len(context.batches) > 1:
            return self._call_mixed(context, *args, **kwargs)
        adapter = context.batches[0].adapter if context is not None else None
        if adapter is None:
            return self.forward(*args, **kwargs)
        module = adapter.replacement(self.path)
        if module is not None:
            if context is not None and adapter.is_in_image and self.path in adapter.patch_embedding:
                output = project_with_channels(context, adapter, module, *args)
            else:
                output = call_in_own_precision(module, *args, **kwargs)
            return match_precision(output, *args[:1])
        bias = adapter.bias.find(self.path)
        if bias is None:
            return self.forward(*args, **kwargs)
        weight = getattr(self.module, "weight", None)
        bias = bias.to(args[0].device)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            bias = bias.to(weight.dtype)
        if is_quantized(self.module):
            bias = bias.clone()  # bitsandbytes overwrites the data of the bias that it is given
        if isinstance(self.module, nn.LayerNorm) and lacks_bias_gradient(args[0]):
            return self._call_with_bias(None, *args, **kwargs) + bias
        return self._call_with_bias(bias, *args, **kwargs)

    def _call_with_bias(self, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(AttributeProxy(self.module, bias=bias), *args, **kwargs)

    def _call_mixed(self, context: ForwardContext, *args: Any, **kwargs: Any) -> Any:
        """Computes the output without bias, and adds to each image, or each of its windows, the bias of its adapter."""
        own = [None if batch.adapter is None else batch.adapter.bias.find(self.path) for batch in context.batches]
        if all(bias is None for bias in own):
            return self.forward(*args, **kwargs)
        if not self.backbone.architecture.batch_first:
            raise RouteError(
                f"Adapters with bias='all' cannot be mixed on a {type(self.backbone.model).__name__}, whose linear "
                "layers are not all applied along the batch. Call the model once for each one."
            )
        if not isinstance(self.module, nn.Linear | nn.LayerNorm | _ConvNd):
            raise RouteError(
                "Adapters with bias='all' can be mixed if all biases belong to linear layers, layer norms and "
                f"convolutions, got {type(self.module).__name__} at '{self.path}'. Call the model once for each one."
            )
        output = self._call_with_bias(None, *args, **kwargs)
        bare: Tensor = self.module.bias  # type: ignore[assignment]
        biases = torch.stack([(bare if bias is None else bias).to(output) for bias in own])
        by_image = biases[context.batch_of_image].repeat_interleave(output.shape[0] // context.num_images, dim=0)
        channels_first = isinstance(self.module, _ConvNd)
        ones = [1] * (output.ndim - 2)
        return output + by_image.view(output.shape[0], *([-1, *ones] if channels_first else [*ones, -1]))


class HeadOverride(ForwardOverride):
    """Calls each adapter's own head on the features that its pooling selects."""

    def __init__(self, backbone: Backbone, path: str) -> None:
        super().__init__(backbone, backbone.model.get_submodule(path))
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        features, *rest = args or (kwargs.pop(next(iter(kwargs))),)  # DPT names its features
        context = current_forward(self.backbone)
        if context is None:
            return self.forward(features, *rest, **kwargs)
        outputs = [self._call_head(context, batch, features, *rest, **kwargs) for batch in context.batches]
        return outputs[0] if len(outputs) == 1 else merge_outputs(outputs, context)

    def _call_head(self, context: ForwardContext, batch: AdapterBatch, features: Any, *args: Any, **kwargs: Any) -> Any:
        if batch.pooling != "default":
            features = pool_tokens(context, batch, self.backbone)
        elif batch.rows is not None:
            features = map_tensors(batch.select, features)
        if context.cached is not None:
            features = context.cached.enter_head(self.path, features)
        head = batch.replacement(self.path)
        if head is None:
            return self.forward(features, *args, **kwargs)
        return call_in_own_precision(head, features, *args, **kwargs)


def pool_tokens(context: ForwardContext, batch: AdapterBatch, backbone: Backbone) -> Tensor:
    """What an adapter's classifier reads by its ``pooling``: ``[CLS]``, the mean over image tokens, prompts or both, or
    the model's pooled output. Padding is left out.

    Returns:
        ``(images of the adapter, width)``; where ``[CLS]`` and the mean are joined, twice the width.
    """
    if batch.pooling == "pooled":
        if context.pooler_output is None:
            raise RouteError(
                f'pooling="pooled" needs a pooled output, but {type(backbone.original).__name__} has none. '
                'Use pooling="default", "class" or "image".'
            )
        return batch.select(context.pooler_output)
    assert context.last_hidden_state is not None  # the encoder runs before the head
    hidden = batch.select(context.last_hidden_state)
    if backbone.has_added_head and not backbone.architecture.normed_output:
        hidden = backbone.final_norm(hidden)
    class_token, tokens = hidden[:, 0], backbone.image_tokens(hidden)
    mask = None if context.token_mask is None else batch.select(context.token_mask)
    # in a copy of the context, since the final norm may write the tokens of the image into it
    with activate(replace(context)), activate_alone(context, batch):
        if batch.pooling in ("prompt", "global"):
            assert batch.prompts is not None  # the plan makes sure of it
            prompts = backbone.final_norm(batch.prompts) if backbone.head_is_normed else batch.prompts
            if batch.pooling == "prompt":
                tokens, mask = prompts, None
            else:
                tokens = torch.cat([tokens, prompts], dim=1)
                mask = None if mask is None else nn.functional.pad(mask, (0, prompts.shape[1]), value=1)
        mean = average(tokens, mask)
        if backbone.pooled_norm is not None:
            class_token, mean = backbone.pooled_norm(class_token), backbone.pooled_norm(mean)
    if batch.pooling == "class":
        return class_token
    joins = backbone.head.joins_class_token or batch.pooling == "class_and_image"
    return torch.cat([class_token, mean], dim=-1) if joins else mean


def average(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens.

    Args:
        tokens: ``(num_images, num_tokens, width)``.
        mask: ``(num_images, num_tokens)``, 0 for tokens to leave out; None: there are none.
    """
    if mask is None:
        return tokens.mean(1)
    weights = mask.to(tokens).unsqueeze(-1)
    return (tokens * weights).sum(1) / weights.sum(1)


def merge_outputs(outputs: Sequence[Any], context: ForwardContext) -> Any:
    """Merges the outputs of several heads in the order of the batch.

    Returns:
        ``(num_images, most labels, ...)``, or a tuple of such. Missing labels are zeros, since segmentation models
        still interpolate the output.
    """
    if not isinstance(outputs[0], Tensor):
        return tuple(merge_outputs(parts, context) for parts in zip(*outputs, strict=True))
    if context.tasks is not None:
        return select_by_task(dict(enumerate(outputs)), context)
    width = max(output.shape[1] for output in outputs)
    padded = [
        nn.functional.pad(output, (*(0, 0) * (output.ndim - 2), 0, width - output.shape[1])) for output in outputs
    ]
    order = [row for batch in context.batches for row in batch.rows or ()]
    positions = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(padded)[positions]


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Applies a function to a tensor, or to each tensor in a list or tuple of feature maps."""
    if isinstance(value, Tensor):
        return function(value)
    if not isinstance(value, list | tuple):
        return value
    mapped = [map_tensors(function, item) for item in value]
    return tuple(mapped) if isinstance(value, tuple) else mapped


def call_in_own_precision(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module whose precision or device may differ from the backbone's."""
    parameter = next(module.parameters(), None)
    if parameter is None or not parameter.is_floating_point():
        return module(*args, **kwargs)

    def convert(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        autocast = torch.is_autocast_enabled(value.device.type)
        return value.to(parameter.device, value.dtype if autocast else parameter.dtype)

    return module(*(map_tensors(convert, value) for value in args), **kwargs)


def match_precision(output: Any, like: Any = None) -> Any:
    """The output of a module in the precision and on the device of its input, which are those of the backbone; under
    autocast, as it is."""
    if not isinstance(like, Tensor) or not like.is_floating_point() or torch.is_autocast_enabled(like.device.type):
        return output
    return map_tensors(lambda value: value.to(like) if value.is_floating_point() else value, output)


def lacks_bias_gradient(tokens: Tensor) -> bool:
    """PyTorch's layer norm on CUDA has no gradient for its bias if the weight is frozen and there are many tokens (seen
    in 2.11 with 200,000, not with 50,000): the bias must then be added apart."""
    return tokens.is_cuda and tokens.shape[:-1].numel() > 2**15


def identity(value: Any) -> Any:
    """For pickles: an object that is another one's copy."""
    return value
