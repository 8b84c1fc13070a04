"""Around the forward pass of the backbone: the parts of a mixed batch before it, loss and logits after it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter
from ..backbones import Backbone
from ..errors import AdapterError
from ..injection import AdapterBatch, ForwardContext
from .arguments import BASE, check_adapters_exist


def mix_adapters(adapters: Mapping[str, Adapter], names: Sequence[str], num_images: int) -> list[AdapterBatch]:
    """The parts of a mixed batch, by adapter.

    Args:
        names: the adapter of each image; ``"__base__"``: the bare backbone with its own head.

    Raises:
        AdapterError: a name is unknown, their number differs from that of the images, or an adapter with copies of
            modules of the backbone, or with prompts in the image, is mixed with others.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != num_images:
        got = f"{len(names)} names" if isinstance(names, list | tuple) else repr(names)
        raise AdapterError(f"adapter_names must be a list of one name for each of the {num_images} images, got {got}.")
    check_adapters_exist(adapters, [name for name in names if name != BASE])
    distinct = list(dict.fromkeys(names))
    owners = [name for name in distinct if name != BASE and adapters[name].modules_to_save.paths]
    in_image = [name for name in distinct if name != BASE and adapters[name].is_in_image]
    for alone, reason in (
        (in_image, 'prompts in the image itself (location="border" or "channel")'),
        (owners, "copies of modules of the backbone (modules_to_save)"),
    ):
        if alone and len(distinct) > 1:
            raise AdapterError(
                f"The adapters {', '.join(alone)} have {reason}, so they cannot be mixed with "
                f"{', '.join(name for name in distinct if name != alone[0])}. Call the model once for each of them."
            )
    batches = []
    for name in distinct:
        rows = tuple(row for row, other in enumerate(names) if other == name) if len(distinct) > 1 else None
        batches.append(AdapterBatch(None if name == BASE else adapters[name], rows))
    return batches


def count_labels(adapters: Mapping[str, Adapter], names: Sequence[str], backbone: Backbone) -> list[int]:
    """Number of labels of each image's task; without a classifier, the number of features.

    Raises:
        AdapterError: it differs between tasks of a detector.
    """
    base_labels = backbone.model.config.num_labels
    counts = [base_labels if name == BASE else adapters[name].num_labels for name in names]
    if backbone.head.extra_outputs and len(set(counts)) > 1:
        raise AdapterError(
            f"Adapters of a {type(backbone.model).__name__} can be mixed if they have the same number of labels, since "
            f'its last output is for "no object", got {sorted(set(counts))}. Call the model once for each number.'
        )
    return [count or backbone.num_features for count in counts]


def mask_padded_logits(output: Any, num_labels: Sequence[int]) -> None:
    """Sets ``num_labels`` of a mixed batch's output, and ``-inf`` for the padded labels in its ``logits``.

    Args:
        output: with ``logits`` or ``heatmaps`` of shape ``(num_images, most labels, ...)``, of one head or of several.
        num_labels: of each image.
    """
    heads = {name: value for name, value in output.items() if name.endswith(("logits", "heatmaps"))}
    logits = next(iter(heads.values()))
    output["num_labels"] = torch.tensor(num_labels, device=logits.device)
    if len(set(num_labels)) > 1:
        padding = torch.arange(logits.shape[1], device=logits.device) >= output["num_labels"][:, None]
        padding = padding.view(*padding.shape, *[1] * (logits.ndim - 2))
        for name, value in heads.items():
            output[name] = value.masked_fill(padding, -torch.inf)


def watch_gradients(output: Any, context: ForwardContext) -> None:
    """Makes sure that no gradient of a training step is lost without a word.

    Adapters that are frozen between the forward and the backward pass, as by ``set_adapter``, raise an error in the
    backward pass; adapters of a mixed batch that do not train are warned about.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    adapters = [batch.adapter for batch in context.batches if batch.adapter is not None]
    trained = [adapter for adapter in adapters if adapter.is_trainable]
    if context.training and trained and len(trained) < len(adapters):
        warnings.warn(
            "Only the active adapter of a mixed batch gets gradients. Train adapters one at a time with set_adapter(), "
            "or call vpt.adapters[name].requires_grad_() for each that shall train.",
            stacklevel=4,
        )

    def check(_: Tensor) -> None:
        if not all(adapter.is_trainable for adapter in trained):
            raise AdapterError(
                "The adapter of this forward pass was frozen before the backward pass, by set_adapter() or "
                "delete_adapter(), so that its gradients would be lost. Call backward() first."
            )

    for value in output.values() if trained else ():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(check)


def check_own_loss(backbone: Backbone, adapter: Adapter) -> None:
    """Raises AdapterError where a model that computes the loss in its forward would refuse the number of labels."""
    counts = (backbone.model.config.num_labels, adapter.num_labels)
    if backbone.head.label_layers and 1 in counts:
        raise AdapterError(
            f"The loss of {type(backbone.model).__name__} needs at least two labels, got {counts[0]} in the "
            f"backbone's config and {counts[1]} in the adapter's. Load the backbone with more, or leave labels out."
        )


def add_loss(output: Any, labels: Tensor, loss_function: Any, config: Any, kwargs: dict[str, Any]) -> Any:
    """The output with the loss of its logits.

    Args:
        loss_function: ``loss_function(labels, logits, config)``; of a detector, that of transformers,
            ``loss_function(logits, labels, device, boxes, config)``.
        config: the backbone's config with the adapter's labels.
        kwargs: arguments of the forward call, of which ``num_items_in_batch`` is passed on.

    Raises:
        AdapterError: the output has no logits of labels.
    """
    if "logits" not in output or config.num_labels == 0:
        got = "num_labels=0" if "logits" in output else type(output).__name__
        raise AdapterError(
            f"labels need a model with a classifier, got {got}. Leave labels out, and compute the loss from the output."
        )
    if "pred_boxes" in output:
        logits = output.logits
        loss, parts, _ = loss_function(logits, labels, logits.device, output.pred_boxes, config)
        return type(output)(**{**output, "loss": loss, "loss_dict": parts})
    counted = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
    loss = loss_function(labels, output.logits, config, **counted)
    if "loss" in type(output).__dataclass_fields__:
        return type(output)(**{**output, "loss": loss})
    output["loss"] = loss  # for classes that transformers does not train, such as DeiT with two heads
    output.move_to_end("loss", last=False)
    return output
