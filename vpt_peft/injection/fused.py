"""Fused attention to prompts on a CPU, whose memory for the backward pass does not grow with their number.

PyTorch's fused kernels keep no attention weights: ``output`` and, for each query, the logarithm ``l`` of the sum of the
exponentials of its scores are enough for the backward pass (Dao et al., FlashAttention, 2022). What is left to grow
with the prompts are their keys and values, copied to those of each image or window. The two ways here keep none of
those copies, and give the same output and gradients:

- joined: the keys are joined for the kernel, and once more in the backward pass.
- apart: the image and the prompts are attended to apart and merged, with ``l_E`` and ``l_P`` of the two parts:

      A = w A_E + (1 - w) A_P,   w = exp(l_E) / exp(l) = sigmoid(l_E - l_P),   l = log(exp(l_E) + exp(l_P))

  No key is copied: all images, or all windows of an image, are one long batch of queries for the prompts. In the
  backward pass, each part has the gradient of its kernel at the output and ``l`` of both.

Joined is faster for few prompts, apart for many, and where each window would need a copy. Either way, hidden keys fill
the last register of a row of scores, which the kernel would take number by number: 207 keys are slower than 208.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.overrides import has_torch_function

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LANES = 16  # numbers of float32 in a register of AVX-512
MANY_SCORES = 2**13  # from so many that fill no register on, it pays to fill it

attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def is_fused(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> bool:
    """Whether ``F.scaled_dot_product_attention`` would call the CPU's fused kernel, and nobody watches that call.

    A graph that is exported keeps to what other runtimes know.
    """
    return (
        query.device.type == "cpu"
        and query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and query.shape[1] == key.shape[1]
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4 and not mask.requires_grad))
        and query.numel() > 0  # else the kernel divides by zero
        and may_differentiate(query)
        and _is_enabled()
        and not torch.compiler.is_exporting()
        and not has_torch_function((query, key, value))
    )


def may_differentiate(query: Tensor) -> bool:
    """Whether an ``autograd.Function`` may compute attention: not if autocast would convert its input, nor inside the
    transforms of ``torch.func``, which know only the derivatives of PyTorch."""
    device = query.device.type
    converts = torch.is_autocast_enabled(device) and query.dtype != torch.get_autocast_dtype(device)
    return not converts and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_enabled() -> bool:
    """Whether the user allows fused kernels; the setting is that of all devices, despite its name."""
    return torch.backends.cuda.flash_sdp_enabled()


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    num_images: int,
) -> Tensor:
    """``softmax(scale · query [key, prompt_key]^T + mask) [value, prompt_value]``, if :func:`is_fused`.

    Args:
        query, key, value: of the image tokens, ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
        prompt_key, prompt_value: ``(1 or num_images, num_heads, p, head_dim)``, seen by all tokens of an image.
        mask: ``(..., num_tokens, num_tokens)``, boolean, True where visible, or additive.
        scale: None: ``head_dim ** -0.5``.

    Returns:
        ``(num_images · num_windows, num_heads, num_tokens, head_dim)``.
    """
    if mask is not None and mask.dtype != query.dtype:
        mask = make_additive(mask, query.dtype)
    if prompt_key.stride(-1) != 1 or prompt_value.stride(-1) != 1:  # which the kernel takes for granted
        prompt_key, prompt_value = prompt_key.contiguous(), prompt_value.contiguous()
    apart = key.shape[0] != num_images or prompt_key.shape[2] >= key.shape[2]
    prompt_mask = None
    missing = count_missing(query, prompt_key.shape[2] + (0 if apart else key.shape[2]))
    if missing:
        prompt_key, prompt_value, prompt_mask = fill_registers(prompt_key, prompt_value, missing)
    inputs = Inputs(query, key, value, prompt_key, prompt_value, mask, prompt_mask, scale)
    if torch.is_grad_enabled():
        output: Tensor = FusedAttention.apply(apart, *inputs)  # type: ignore[no-untyped-call]
        return output
    return (attend_apart if apart else attend_jointly)(inputs)[0]


def count_missing(query: Tensor, num_keys: int) -> int:
    """The number of hidden keys to append, so that ``num_keys`` fill whole registers; 0 where that does not pay.

    It pays from three numbers in each of many rows of scores (measured).
    """
    rest = num_keys % LANES
    return LANES - rest if rest > 2 and query.shape[:3].numel() * rest > MANY_SCORES else 0


def fill_registers(key: Tensor, value: Tensor, missing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with ``missing`` more, and the additive mask ``(1, 1, 1, num_keys)`` that hides these."""
    visible = key.new_zeros(1, 1, 1, key.shape[2])
    key, value = (nn.functional.pad(part, (0, 0, 0, missing)) for part in (key, value))
    return key, value, nn.functional.pad(visible, (0, missing), value=-torch.inf)


def make_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask, boolean or additive, as an additive one."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Inputs(NamedTuple):
    """What :func:`fused_attention` attends with, and to. Masks are additive."""

    query: Tensor
    key: Tensor
    value: Tensor
    prompt_key: Tensor
    prompt_value: Tensor
    mask: Tensor | None
    prompt_mask: Tensor | None
    scale: float | None


def attend_jointly(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and ``l``, with joined keys."""
    keys, values, mask = _join(inputs)
    output, total = attention(inputs.query, keys, values, attn_mask=mask, scale=inputs.scale)
    return output, total


def attend_apart(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Output and ``l``, merged from two parts."""
    query, key, value, prompt_key, prompt_value, mask, prompt_mask, scale = inputs
    output, total = attention(query, key, value, attn_mask=mask, scale=scale)
    if mask is not None and _may_be_zero(total):  # given for queries that see nothing of the image
        total = total.masked_fill(mask.amax(-1) == -torch.inf, -torch.inf)
    shared = share(query, prompt_key.shape[0])
    of_prompts = attention(shared, prompt_key, prompt_value, attn_mask=prompt_mask, scale=scale)
    added, total_added = (unshare(part, query) for part in of_prompts)
    weight_added = torch.sigmoid(total_added - total).unsqueeze(-1)
    output.lerp_(added, weight_added.to(output.dtype))
    return output, torch.logaddexp(total, total_added)


class FusedAttention(torch.autograd.Function):
    """:func:`attend_apart` or :func:`attend_jointly`. It has no second derivative, and says so."""

    @staticmethod
    def forward(ctx: Any, apart: bool, *inputs: Any) -> Tensor:
        output, total = (attend_apart if apart else attend_jointly)(Inputs(*inputs))
        query, key, value, prompt_key, prompt_value, mask, prompt_mask, ctx.scale = inputs
        ctx.differentiate = differentiate_apart if apart else differentiate_jointly
        if not any(ctx.needs_input_grad[1:4]):  # as in the first layer, whose input no parameter has changed
            ctx.differentiate = differentiate_prompts
            key = value = mask = None
        ctx.save_for_backward(query, key, value, prompt_key, prompt_value, mask, prompt_mask, output, total)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output, total = ctx.saved_tensors
        inputs = (*tensors, ctx.scale)
        return None, *ctx.differentiate(Inputs(*inputs), output, total, gradient), None, None, None


def differentiate_jointly(inputs: Inputs, output: Tensor, total: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :func:`attend_jointly` at the first five inputs; it joins the keys again."""
    keys, values, mask = _join(inputs)
    of_query, *of_joined = attention_backward(
        gradient, inputs.query, keys, values, output, total, 0.0, False, attn_mask=mask, scale=inputs.scale
    )
    sizes = [inputs.key.shape[2], inputs.prompt_key.shape[2]]
    (of_key, of_prompt_key), (of_value, of_prompt_value) = (part.split(sizes, dim=2) for part in of_joined)
    if inputs.prompt_key.shape[0] < inputs.key.shape[0]:
        of_prompt_key, of_prompt_value = (part.sum(0, keepdim=True) for part in (of_prompt_key, of_prompt_value))
    return of_query, of_key, of_value, of_prompt_key, of_prompt_value


def differentiate_apart(inputs: Inputs, output: Tensor, total: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """Gradients of :func:`attend_apart` at the first five inputs. Each kernel is given output and ``l`` of both."""
    query, key, value, *_, mask, _, scale = inputs
    of_query, of_key, of_value = attention_backward(
        gradient, query, key, value, output, total, 0.0, False, attn_mask=mask, scale=scale
    )
    added, _, _, of_prompt_key, of_prompt_value = differentiate_prompts(inputs, output, total, gradient)
    return of_query + added, of_key, of_value, of_prompt_key, of_prompt_value


def differentiate_prompts(
    inputs: Inputs, output: Tensor, total: Tensor, gradient: Tensor
) -> tuple[Tensor, None, None, Tensor, Tensor]:
    """The part of the gradients that is due to attention to prompts, given output and ``l`` of both."""
    query, _, _, prompt_key, prompt_value, _, prompt_mask, scale = inputs
    gradient, shared, output, total = (share(part, prompt_key.shape[0]) for part in (gradient, query, output, total))
    of_query, of_prompt_key, of_prompt_value = attention_backward(
        gradient, shared, prompt_key, prompt_value, output, total, 0.0, False, attn_mask=prompt_mask, scale=scale
    )
    return unshare(of_query, query), None, None, of_prompt_key, of_prompt_value


def _may_be_zero(total: Tensor) -> bool:
    """Whether a value is 0; True where values are not known yet."""
    return torch.compiler.is_compiling() or isinstance(total, FakeTensor) or bool((total == 0).any())


def share(part: Tensor, num_groups: int) -> Tensor:
    """Queries, or what belongs to each query, in groups of rows that see the same keys, as one long row each.

    Args:
        part: ``(num_rows, num_heads, num_tokens, ...)``.

    Returns:
        ``(num_groups, num_heads, num_rows / num_groups · num_tokens, ...)``, without a copy where ``part`` is a
        transposed output of a linear layer.
    """
    tokens_first = part.transpose(1, 2)
    return tokens_first.reshape(num_groups, -1, *tokens_first.shape[2:]).transpose(1, 2)


def unshare(part: Tensor, query: Tensor) -> Tensor:
    """The reverse of :func:`share`, for queries ``(num_rows, num_heads, num_tokens, head_dim)``."""
    tokens_first = part.transpose(1, 2)
    return tokens_first.reshape(query.shape[0], -1, *tokens_first.shape[2:]).transpose(1, 2)


def _join(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """The keys and values of image and prompts, and the mask for both."""
    _, key, value, prompt_key, prompt_value, mask, prompt_mask, _ = inputs
    num_rows = key.shape[0]
    if prompt_key.shape[0] != num_rows:
        prompt_key, prompt_value = (part.expand(num_rows, -1, -1, -1) for part in (prompt_key, prompt_value))
    keys, values = torch.cat((key, prompt_key), dim=2), torch.cat((value, prompt_value), dim=2)
    if mask is None:
        return keys, values, None if prompt_mask is None else nn.functional.pad(prompt_mask, (key.shape[2], 0))
    if prompt_mask is None:
        return keys, values, nn.functional.pad(mask, (0, prompt_key.shape[2]))
    return keys, values, torch.cat((mask, prompt_mask.expand(*mask.shape[:-1], -1)), dim=-1)
