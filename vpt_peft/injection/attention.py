"""Attention to image tokens and prompts: the only place where the two meet.

Inside a layer, with ``n`` image tokens ``E`` (prefix tokens included), ``p`` prompts ``P`` and the layer's norm:

    q_E, k_E, v_E = W_q norm(E), W_k norm(E), W_v norm(E)          each (n, num_heads · head_dim)
    k_P, v_P      = W_k norm(P), W_v norm(P)                       each (p, num_heads · head_dim)

Both routes give image tokens the same output:

    A_E = softmax(q_E [k_E, k_P]^T / sqrt(head_dim)) [v_E, v_P]    (n, num_heads · head_dim)

- key/value route: that is all. Exact where the outputs of prompts are discarded, as in VPT-Deep (Jia et al., ECCV
  2022, equation 6: ``[x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])``).
- tokens route: the prompts are queries as well, and go through the rest of the layer (equations 4 and 5, VPT-Shallow,
  ``[x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}])``):

    A_P = softmax(W_q norm(P) [k_E, k_P]^T / sqrt(head_dim)) [v_E, v_P]
    H   = P + scale · W_o A_P,    Z = H + scale · MLP(norm(H))     each (p, width)

In Swin every window of an image attends to its prompts, and ``A_P`` is the mean over the windows.

A prefix (``kind="prefix"``) is keys ``K`` and values ``V``, each ``(p, num_heads · head_dim)``, that are learned
directly and have a softmax of their own, so that attention to the image stays as it is (zero-initialised attention,
Zhang et al., LLaMA-Adapter, 2023; cross-attention to prompts, Huang et al., CVPT, 2024):

    A_E = softmax(q_E k_E^T / sqrt(head_dim)) v_E + softmax(q_E K^T / sqrt(head_dim)) V

The prompts are kept beside the image tokens, not among them, so that the shapes of hidden states stay the backbone's.
The attention module looks up its implementation by name in ``module.config``; :class:`AttentionOverride` puts
:func:`prompt_attention` in its place, which appends the prompts and calls the implementation that the user has set.
Where a module calls ``F.scaled_dot_product_attention`` itself, :class:`SdpaOverride` catches that call; where it
computes attention step by step (Swin V2, Hiera), :class:`StepwiseOverride` runs the forward that is declared for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..backbones import Backbone, Layer
from ..errors import RouteError, UnsupportedModelError
from .context import ForwardContext, LayerContext, activate_alone, current_layer
from .fused import fused_attention, is_fused, share, unshare
from .joined import keep_parts
from .masks import pad_mask
from .overrides import AttributeProxy, ForwardOverride
from .prefix_attention import prefix_attention
from .prompt_batch import LayerPrompts, PromptBatch, batch_prompts, gather_prefixes, gather_prompts, select_by_task

NAME = "vpt_peft"
AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class AttentionOverride:
    """Routes the calls of one attention module to :func:`prompt_attention`.

    The module's config is replaced by a proxy that names our implementation. The config itself is unchanged: masks are
    made for the implementation that the user has set, at any time.
    """

    def __init__(self, layer: Layer) -> None:
        self.module = layer.part("caller")
        self.eager_masks = layer.architecture.eager_masks
        self.config = self.module.config
        self.bare_module = AttributeProxy(self.module, config=self.config)
        self.eager: Any = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)

    def inject(self) -> None:
        """Replaces the module's config."""
        self.module.config = AttributeProxy(self.config, _attn_implementation=NAME, override=self)

    def remove(self) -> None:
        """Restores the module's config."""
        self.module.config = self.config

    def attend(
        self, function: AttentionFunction, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention without prompts, by the function that the user has set.

        Raises:
            RouteError: the function ignores masks, and there is one.
        """
        if mask is not None and function is self.eager and not self.eager_masks:
            raise RouteError(
                f"Adapters with different numbers of prompts can be mixed if the attention takes masks, which that of "
                f'{type(self.module).__name__} does not with attn_implementation="eager". Use "sdpa", or call the '
                "model once for each adapter."
            )
        return function(self.bare_module, query, key, value, mask, **kwargs)

    @property
    def function(self) -> AttentionFunction:
        """The function that the user has set."""
        function: AttentionFunction = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        return function

    def is_plain(
        self, dropout: float = 0.0, is_causal: bool | None = None, position_bias: Any = None, **_: Any
    ) -> bool:
        """Whether the arguments of a function of transformers make it a plain attention, without dropout."""
        if is_causal is None:
            is_causal = getattr(self.module, "is_causal", True)  # as transformers
        return not dropout and not is_causal and position_bias is None


class SdpaOverride(ForwardOverride):
    """Routes the calls that one attention module makes to ``F.scaled_dot_product_attention`` to :func:`attend`."""

    def __init__(self, backbone: Backbone, layer: Layer) -> None:
        super().__init__(backbone, layer.part("caller"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_layer() is None:
            return self.forward(*args, **kwargs)
        with PromptSdpa():
            return self.forward(*args, **kwargs)


class StepwiseOverride(ForwardOverride):
    """Runs the declared forward of an attention module that computes attention step by step, with :func:`attend`.

    Where the layer has no prompts, the module's own code runs.

    Raises:
        UnsupportedModelError: that code is not the family's, so that its declared forward would differ.
    """

    def __init__(self, backbone: Backbone, layer: Layer, forward: Callable[..., Any]) -> None:
        super().__init__(backbone, layer.part("caller"))
        self.declared_forward = forward
        code = type(self.module).forward
        if not hasattr(self.module, "_hf_hook"):  # accelerate's override only moves tensors
            code = vars(self.module).get("forward", code)
        if getattr(code, "__module__", None) != type(layer.module).__module__:
            raise UnsupportedModelError(
                f"Prompts reach the attention of layer {layer.index} through a version of its code, that of "
                f"{type(layer.module).__module__}, got a {type(self.module).__name__} with other code, {code}. Remove "
                "that, or declare your model with vpt_peft.register_architecture (attention_forward)."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        context = current_layer()
        if context is None or not context.has_prompts:
            return self.forward(*args, **kwargs)
        return self.declared_forward(self.module, attend, *args, **kwargs)


def override_attention(backbone: Backbone, layer: Layer) -> AttentionOverride | SdpaOverride | StepwiseOverride:
    """The override that lets the attention of a layer see prompts."""
    if layer.architecture.attention_forward is not None:
        return StepwiseOverride(backbone, layer, layer.architecture.attention_forward)
    return SdpaOverride(backbone, layer) if layer.architecture.uses_sdpa else AttentionOverride(layer)


class PromptSdpa(TorchFunctionMode):
    """While it is open, ``F.scaled_dot_product_attention`` attends to prompts too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        kwargs |= dict(zip(names, args, strict=False))
        query, key, value = (kwargs.pop(name) for name in names[:3])

        def plain(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, None]:
            return function(query, key, value, attn_mask=mask, **kwargs).transpose(1, 2), None

        mask = kwargs.pop("attn_mask", None)
        if kwargs.get("is_causal"):
            raise RouteError("Prompts are visible to all tokens, got is_causal=True. Leave it out.")
        is_sdpa = not kwargs.get("dropout_p") and not kwargs.get("enable_gqa")
        return attend(plain, query, key, value, mask, kwargs.get("scale"), is_sdpa)[0].transpose(1, 2)


def prompt_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: the one that the user has set, with prompts; see :func:`attend`."""
    override: AttentionOverride = module.config.override  # type: ignore[union-attr, assignment]
    function = override.function
    is_sdpa = function is sdpa_attention_forward and override.is_plain(**kwargs)
    bare = partial(override.attend, function, **kwargs)
    return attend(bare, query, key, value, attention_mask, kwargs.get("scaling"), is_sdpa)


def attend(
    function: AttentionFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | Tensor | None,
    is_sdpa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of image tokens to image tokens and prompts.

    Args:
        function: attention without prompts: ``function(query, key, value, mask)``, with the same result.
        query, key, value: of the image tokens, ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
        mask: as the function takes it.
        scaling: factor of the products of queries and keys, or ``(num_heads, 1, 1)``; None: ``head_dim ** -0.5``.
        is_sdpa: the function is ``F.scaled_dot_product_attention``, without dropout.

    Returns:
        The output ``(num_images · num_windows, num_tokens, num_heads, head_dim)``, and the attention weights of the
        image's queries, if the function returns them, with the prompts as the last keys.
    """
    context = current_layer()
    # Swin on an image smaller than its window: the backbone's own code raises the error
    fits = not isinstance(mask, Tensor) or mask.shape[-1] == query.shape[2]
    if context is None or not fits or not context.has_prompts:
        return function(query, key, value, mask)

    context.attention_ran = True
    prompts, prefixes = gather_prompts(context), gather_prefixes(context, query.device)
    if prompts:
        output, weights = attend_to_tokens(context, prompts, function, query, key, value, mask, scaling, is_sdpa)
    else:
        output, weights = function(query, key, value, mask)
    if prefixes:
        output = attend_to_prefixes(output, query, prefixes, context.forward, scaling)
    return output, weights


def attend_to_tokens(
    context: LayerContext,
    prompts: Sequence[LayerPrompts],
    function: AttentionFunction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: Any,
    is_sdpa: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention in which prompts are tokens, by either route; see :func:`attend`."""
    layer, num_images, num_tokens = context.layer, context.forward.num_images, query.shape[2]
    batch = batch_prompts(prompts, context.forward)
    needs_output = any([own.needs_output for own in prompts])
    names = "kvq" if needs_output else "kv"
    heads = [
        layer.normalize(name, batch.split_heads(part, key))
        for name, part in zip(names, project_prompts(context, names, batch, prompts), strict=True)
    ]
    if is_sdpa and not needs_output and batch.valid_mask is None and is_fused(query, key, value, mask):
        prompt_key, prompt_value = (part.to(key.dtype) for part in heads)
        output = fused_attention(query, key, value, prompt_key, prompt_value, mask, scaling, num_images)
        return output.transpose(1, 2), None

    mask = pad_mask(mask, key, batch.num_tokens, needs_output, batch.valid_mask)
    parts = list(zip((key, value, query), heads, strict=False))
    joined = [batch.append(*both, num_images) for both in parts]
    with keep_parts(joined, parts, partial(batch.append, num_images=num_images)):
        key, value, query = joined if needs_output else (*joined, query)
        output, weights = function(query, key, value, mask)
    if not needs_output:
        return output, weights

    prompt_output = output.narrow(1, num_tokens, batch.num_tokens).flatten(2)
    if prompt_output.shape[0] != num_images:  # the mean over the windows of an image
        prompt_output = prompt_output.unflatten(0, (num_images, -1)).mean(1)
    finish_prompts(context, prompts, prompt_output)
    return output.narrow(1, 0, num_tokens), weights if weights is None else weights[:, :, :num_tokens]


def project_prompts(
    context: LayerContext, names: Sequence[str], batch: PromptBatch, prompts: Sequence[LayerPrompts]
) -> list[Tensor]:
    """Queries, keys or values of the prompts, in front of their own norms.

    Args:
        names: some of ``"q"``, ``"k"``, ``"v"``.

    Returns:
        One tensor ``(1 or num_images, total, num_heads · head_dim)`` for each name.
    """
    layer, forward = context.layer, context.forward

    def compute(tokens: Tensor) -> list[Tensor]:
        return layer.project(names, layer.attention_input(tokens))

    def compute_or_reuse(own: LayerPrompts, tokens: Tensor) -> list[Tensor]:
        cache = own.batch.cache
        if cache is None or not own.fresh:
            return compute(tokens)
        modules = (layer.part("norm"), *layer.projecting_modules(names))
        return cache.get(layer.index, tokens, modules, partial(compute, tokens))

    if forward.tasks is not None:
        by_task = {}
        for own in prompts:
            with activate_alone(forward, own.batch):
                by_task[own.index] = compute_or_reuse(own, own.tokens)
        return [select_by_task({i: part[n] for i, part in by_task.items()}, forward) for n in range(len(names))]
    if forward.mixes_biases:
        parts = []
        for own in prompts:
            with activate_alone(forward, own.batch):
                parts.append(compute(own.tokens.reshape(1, -1, own.tokens.shape[-1])))
        return [torch.cat(same, dim=1) for same in zip(*parts, strict=True)]
    return compute_or_reuse(prompts[0], batch.tokens)


def finish_prompts(context: LayerContext, prompts: Sequence[LayerPrompts], attention_output: Tensor) -> None:
    """Computes the outputs of the prompts in a layer.

    Args:
        attention_output: of the prompts' queries, ``(num_images, p, num_heads · head_dim)``.
    """
    layer = context.layer
    for own in prompts:
        if own.needs_output:
            attended = own.batch.select(attention_output).narrow(1, 0, own.tokens.shape[1])
            with activate_alone(context.forward, own.batch):
                context.prompts_out[own.index] = layer.finish(own.tokens, layer.part("o_proj")(attended))


def attend_to_prefixes(
    output: Tensor,
    query: Tensor,
    prefixes: Sequence[LayerPrompts],
    forward: ForwardContext,
    scaling: float | Tensor | None,
) -> Tensor:
    """Adds the attention to prefixes to the attention to the image.

    Args:
        output: of the attention to the image, ``(num_images · num_windows, num_tokens, num_heads, head_dim)``.
        query: ``(num_images · num_windows, num_heads, num_tokens, head_dim)``, as the attention to the image uses it.
        scaling: see :func:`attend`.
    """
    batch = batch_prompts(prefixes, forward)
    key, value = (batch.split_heads(part, query) for part in batch.tokens.chunk(2, dim=-1))
    if query.is_cuda:  # where one image after the other would keep too few cores busy
        key, value = (part.expand(forward.num_images, -1, -1, -1) for part in (key, value))
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:  # several heads of queries share keys and values
        key, value = (part.repeat_interleave(num_groups, dim=1) for part in (key, value))
    valid_mask = batch.valid_mask
    if valid_mask is not None:  # images without a prefix attend to zeros
        value = value * valid_mask[:, None, :, None]
        valid_mask = valid_mask | ~valid_mask.any(1, keepdim=True)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    added = prefix_attention(share(query, key.shape[0]), key * scaling, value, valid_mask)
    return output + unshare(added, query).transpose(1, 2)


# At import, so that a pickled model finds the implementation when it is loaded in another process.
AttentionInterface.register(NAME, prompt_attention)
