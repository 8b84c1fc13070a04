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

The prompts are kept beside the image tokens, not among them, so that the shapes of hidden states stay the backbone's.
The attention module looks up its implementation by name in ``module.config``; :class:`AttentionOverride` puts
:func:`prompt_attention` in its place, which appends the prompts and calls the implementation that the user has set.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ..backbones import Layer
from .context import LayerContext, current_layer
from .masks import pad_mask
from .overrides import AttributeProxy
from .prompt_batch import LayerPrompts, PromptBatch, batch_prompts, gather_prompts

NAME = "vpt_peft"


class AttentionOverride:
    """Routes the calls of one attention module to :func:`prompt_attention`.

    The module's config is replaced by a proxy that names our implementation. The config itself is unchanged: masks are
    made for the implementation that the user has set, at any time.
    """

    def __init__(self, layer: Layer) -> None:
        self.module = layer.part("attention")
        self.config = self.module.config
        self.bare_module = AttributeProxy(self.module, config=self.config)
        self.eager: Any = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)

    def inject(self) -> None:
        """Replaces the module's config."""
        self.module.config = AttributeProxy(self.config, _attn_implementation=NAME, override=self)

    def remove(self) -> None:
        """Restores the module's config."""
        self.module.config = self.config

    @property
    def attend(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The attention function that the user has set."""
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.eager
        )
        return function


def prompt_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of image tokens to image tokens and prompts.

    Args:
        module: the attention module.
        query, key, value: of the image tokens, ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
        attention_mask: as the implementation set by the user takes it.

    Returns:
        The output ``(num_images · num_windows, num_tokens, num_heads, head_dim)``, and the attention weights of the
        image's queries, if the implementation returns them, with the prompts as the last keys.
    """
    override: AttentionOverride = module.config.override  # type: ignore[union-attr, assignment]
    attend, bare_module = override.attend, override.bare_module
    context = current_layer()
    prompts = gather_prompts(context) if context is not None else []
    num_tokens = query.shape[2]
    if isinstance(attention_mask, Tensor) and attention_mask.shape[-1] != num_tokens:
        prompts = []  # Swin on an image smaller than its window: the backbone's own code raises the error
    if not prompts or context is None:
        return attend(bare_module, query, key, value, attention_mask, **kwargs)

    context.attention_ran = True
    layer, num_images = context.layer, context.forward.num_images
    batch = batch_prompts(prompts, num_images)
    needs_output = any(own.needs_output for own in prompts)
    mask = pad_mask(attention_mask, query, batch.num_tokens, needs_output, batch.valid_mask)
    projections = project_prompts(layer, ("k_proj", "v_proj", *(["q_proj"] if needs_output else [])), batch, prompts)
    key = batch.append(key, projections[0], num_images)
    value = batch.append(value, projections[1], num_images)
    if not needs_output:
        return attend(bare_module, query, key, value, mask, **kwargs)

    query = batch.append(query, projections[2], num_images)
    output, weights = attend(bare_module, query, key, value, mask, **kwargs)
    prompt_output = output[:, num_tokens:].flatten(2).unflatten(0, (num_images, -1)).mean(1)
    finish_prompts(context, prompts, prompt_output)
    return output[:, :num_tokens], weights if weights is None else weights[:, :, :num_tokens]


def project_prompts(
    layer: Layer, names: Sequence[str], batch: PromptBatch, prompts: Sequence[LayerPrompts]
) -> list[Tensor]:
    """Keys, values and queries of the prompts.

    Args:
        names: projections of the layer, such as ``"k_proj"``.

    Returns:
        One tensor ``(1 or num_images, total, num_heads · head_dim)`` for each name.
    """
    norm, projections = layer.part("norm"), [layer.part(name) for name in names]

    def compute() -> list[Tensor]:
        normalized = norm(batch.tokens)
        return [projection(normalized) for projection in projections]

    cache = prompts[0].batch.cache
    if cache is None or not prompts[0].fresh:
        return compute()
    return cache.get(layer.index, batch.tokens, (norm, *projections), compute)


def finish_prompts(context: LayerContext, prompts: Sequence[LayerPrompts], attention_output: Tensor) -> None:
    """Computes the outputs of the prompts in a layer.

    Args:
        attention_output: of the prompts' queries, ``(num_images, p, num_heads · head_dim)``.
    """
    layer = context.layer
    for own in prompts:
        if own.needs_output:
            attended = own.batch.select(attention_output)[:, : own.tokens.shape[1]]
            context.prompts_out[own.index] = layer.finish(own.tokens, layer.part("o_proj")(attended))


# At import, so that a pickled model finds the implementation when it is loaded in another process.
AttentionInterface.register(NAME, prompt_attention)
