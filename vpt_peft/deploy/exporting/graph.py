"""The computation that is exported: a backbone with its adapters as one module that torch.export can trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from ...adapter import Adapter, ProjectionCache
from ...backbones import Backbone
from ...injection import AdapterBatch, ForwardContext, activate

ATTENTION = "vpt_peft_export"


def exported_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers in the operations that all runtimes have, ``softmax(q k^T) v``.

    For a function of its own name, transformers makes no masks. For its other ones it makes a mask that hides nothing
    when a graph is traced, and translated to ONNX, "sdpa" then checks each probability for NaN: together a tenth of
    the time of a ViT in onnxruntime.
    """
    num_groups = query.shape[1] // key.shape[1]
    if num_groups > 1:  # several heads of queries share keys and values
        key, value = (part.repeat_interleave(num_groups, dim=1) for part in (key, value))
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-1, -2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(ATTENTION, exported_attention)


@contextmanager
def exportable_attention(backbone: Backbone) -> Iterator[None]:
    """A context in which the backbone computes its attention by :func:`exported_attention`."""
    configs = {id(config): config for config in _configs(backbone.model)}.values()
    previous = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        yield
    finally:
        for config, implementation in previous:  # outer models first: setting theirs sets the inner ones' too
            config._attn_implementation = implementation


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs of a model and its parts that name an attention function, from the outside in."""
    for module in model.modules():
        config = module.__dict__.get("config")
        config = getattr(config, "_original", config)  # of an attention module with prompts
        if getattr(config, "_attn_implementation", None) is not None:
            yield config


class ConstantProjections(ProjectionCache):
    """Keys and values of an adapter's prompts, computed in a first pass, and constants of the graph traced after it."""

    def __init__(self) -> None:
        self.constants: dict[int, list[Tensor]] = {}

    def get(
        self, layer: int, tokens: Tensor, modules: Sequence[nn.Module], compute: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """The projections of a layer's prompts; see :meth:`ProjectionCache.get`."""
        if not torch.compiler.is_exporting():
            self.constants[layer] = [part.detach().clone() for part in compute()]
        return self.constants[layer]


class Normalization(nn.Module):
    """What an image processor does with pixels after resizing: ``(pixels · factor - mean) / std`` for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, processor: Any, num_channels: int) -> None:
        super().__init__()
        self.factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
        normalizes = bool(getattr(processor, "do_normalize", False))
        for name, neutral in (("mean", 0.0), ("std", 1.0)):
            value = getattr(processor, f"image_{name}") if normalizes else neutral
            channels = torch.as_tensor(value, dtype=torch.float32).expand(num_channels)
            self.register_buffer(name, channels.clone().view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """
        Args:
            pixels: ``(num_images, num_channels, height, width)``, integers from 0 to 255.
        """
        return (pixels.to(self.mean.dtype) * self.factor - self.mean) / self.std


class ExportedModel(nn.Module):
    """A backbone with one adapter, or with several that a tensor of task numbers chooses from.

    Args:
        adapters: the adapters; None for the bare backbone.
        normalization: what turns the input into what the backbone takes.
        options: further arguments of the backbone's forward.
        num_labels: of each adapter; None: logits are not masked.
        activation: what turns logits into probabilities; None: logits are the output.
        check: called with the context after the backbone has run.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[Adapter | None],
        normalization: nn.Module,
        options: Mapping[str, Any],
        num_labels: Sequence[int] | None,
        activation: Callable[[Tensor], Tensor] | None,
        check: Callable[[ForwardContext], None],
    ) -> None:
        super().__init__()
        self.model = backbone.model
        self.adapters = nn.ModuleList(adapter for adapter in adapters if adapter is not None)
        self.normalization = normalization
        self.activation = activation
        self._backbone, self._options, self._num_labels, self._check = backbone, options, num_labels, check
        self._parts = [(adapter, ConstantProjections()) for adapter in adapters]

    def forward(self, pixel_values: Tensor, tasks: Tensor | None = None) -> dict[str, Tensor]:
        """
        Args:
            pixel_values: ``(num_images, num_channels, height, width)``.
            tasks: ``(num_images,)``, the index of each image's adapter; None: there is only one.

        Returns:
            The tensors of the backbone's output by name.
        """
        batches = [AdapterBatch(adapter, cache=constants) for adapter, constants in self._parts]
        context = ForwardContext(self._backbone, pixel_values.shape[0], batches, training=False, tasks=tasks)
        images = self.normalization(pixel_values)
        with activate(context):
            output = self.model(**{self._backbone.architecture.input_name: images}, return_dict=True, **self._options)
        self._check(context)
        tensors = flatten_output(output)
        if tasks is not None and self._num_labels is not None and len(set(self._num_labels)) > 1:
            for name in label_outputs(tensors):
                tensors[name] = self._mask_padding(tensors[name], tasks)
        if self.activation is not None:
            tensors = {"probabilities": self.activation(tensors["logits"])}
        return tensors

    def _mask_padding(self, logits: Tensor, tasks: Tensor) -> Tensor:
        """``-inf`` beyond the labels of an image's own task."""
        assert self._num_labels is not None
        labels = torch.arange(logits.shape[1], device=logits.device)
        padding = torch.tensor([[number] for number in self._num_labels], device=logits.device) <= labels
        padding = padding.index_select(0, tasks)
        return logits.masked_fill(padding.view(*padding.shape, *[1] * (logits.ndim - 2)), -torch.inf)


def flatten_output(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's output by name; those of a tuple are numbered, as ``feature_maps.0``."""
    tensors: dict[str, Tensor] = {}
    for name, value in output.items():
        if name in ("loss", "num_labels"):
            continue
        parts = {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
        tensors |= {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    return tensors


def label_outputs(names: Iterable[str]) -> list[str]:
    """The outputs with a value for each label, ``(num_images, num_labels, ...)``."""
    return [name for name in names if name.endswith(("logits", "heatmaps"))]
